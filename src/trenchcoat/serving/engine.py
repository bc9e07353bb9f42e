"""The model's side of the server: requests to tokens, tokens to pieces of an answer, one request after the other.

Runs in two threads: one reads requests (JSON, templates, tokenizing), one runs the model. The event loop only waits.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from trenchcoat.generation.generate import Session, end_tokens
from trenchcoat.models.rotary import length_dependence
from trenchcoat.models.text import clean_text, embeddings_of
from trenchcoat.serving.decoding import Chooser, Detokenizer, StopFilter, TokenInfo, probabilities
from trenchcoat.serving.refusals import Refused
from trenchcoat.serving.requests import Request, read_request
from trenchcoat.serving.tool_calls import AnswerParser, Part

DEFAULT_TOKENS = 1024
"""``max_tokens`` of requests that do not say."""
SCORED_TOKENS = 128
"""Tokens of an echoed prompt whose probabilities are computed at once."""
MAX_SCORED_TOKENS = 65_536
"""Tokens of all echoed prompts of a request whose probabilities are given."""
_LONGEST_TOKEN = 64
"""Characters of a token that count for the limit on a prompt's characters, at most."""


class Stopped(Exception):
    """The request ends early: its client is gone, or the server is stopping."""


@dataclass(frozen=True)
class Piece:
    """A piece of one of the texts of an answer."""

    choice: int
    parts: list[Part]
    tokens: list[TokenInfo] = field(default_factory=list)
    finish: str | None = None
    """stop, length or tool_calls, with the last piece of a choice."""


@dataclass
class Job:
    """A request that waits for the model, and what became of it."""

    request: Request
    prompts: list[list[int]]
    emit: Callable[[Piece], None]
    """Called in the model's thread."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set once the client has disconnected."""
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    written: int = 0
    """Tokens generated so far."""
    state_bytes: int = 0
    """Size of the model's state after the last choice."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


class Engine:
    """One model and its two threads. `stopping`, once set, ends every job within a token."""

    def __init__(self, model: Any, tokenizer: Any, context: int | None, stopping: threading.Event) -> None:
        self.model, self.context, self.stopping = model, context, stopping
        self.tokenizer, self._decoder = tokenizer, copy.deepcopy(tokenizer)  # one for each thread
        self.vocabulary = embeddings_of(model)
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self.max_characters = None if context is None else context * min(longest, _LONGEST_TOKEN)
        self._reader = ThreadPoolExecutor(1, "reader")
        self._runner = ThreadPoolExecutor(1, "model")

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's, if it has one."""
        return getattr(self.tokenizer, "chat_template", None)

    def read(self, body: bytes, *, chat: bool) -> Future[tuple[Request, list[list[int]]]]:
        """Read a request and the tokens of its prompts, in the reader's thread. The result may be Refused."""
        return self._reader.submit(self._read, body, chat)

    def run(self, job: Job) -> Future[None]:
        """Run a job once those before it are done."""
        return self._runner.submit(self._run, job)

    def wait(self, seconds: float) -> bool:
        """Wait until the model's thread is idle; whether it is."""
        try:
            self._runner.submit(lambda: None).result(timeout=seconds)
        except TimeoutError:
            return False
        return True

    # Requests to tokens

    def _read(self, body: bytes, chat: bool) -> tuple[Request, list[list[int]]]:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body is not a readable JSON object: {error}") from error
        request = read_request(found, chat=chat)
        prompts = [self._chat_tokens(request)] if chat else [self._tokens(prompt) for prompt in request.prompts]
        for prompt in prompts:
            self._check(prompt)
        if request.echo and request.logprobs is not None:
            self._check_scored(prompts)
        for token in request.logit_bias or ():
            if token >= self.vocabulary:
                raise Refused(f"logit_bias names token {token}; the model has {self.vocabulary}", "logit_bias")
        return request, prompts

    def _chat_tokens(self, request: Request) -> list[int]:
        if self.chat_template is None:
            raise Refused(
                "this model's tokenizer has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE"
            )
        self._check_length(sum(len(str(value)) for message in request.messages for value in message.values()))
        try:
            text = self.tokenizer.apply_chat_template(
                list(request.messages),
                tools=list(request.tools) or None,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (TemplateError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise Refused(f"the chat template cannot render these messages: {reason}", "messages") from error
        return self._tokens(str(text), special=False)

    def _tokens(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        self._check_length(len(prompt))
        return list(self.tokenizer(clean_text(prompt), add_special_tokens=special)["input_ids"])

    def _check_length(self, characters: int) -> None:
        """Refuse a text that cannot fit before it is tokenized, which takes time and memory."""
        if self.max_characters is not None and characters > self.max_characters:
            raise Refused(
                f"the prompt has {characters} characters; this server takes fewer than {self.context} tokens and at "
                f"most {self.max_characters} characters"
            )

    def _check(self, prompt: list[int]) -> None:
        if not prompt:
            raise Refused("the prompt has no token; give a text")
        if self.context is not None and len(prompt) >= self.context:
            raise Refused(f"the prompt has {len(prompt)} tokens; this server takes fewer than {self.context}")
        if not 0 <= min(prompt) <= max(prompt) < self.vocabulary:
            raise Refused(f"the prompt has a token id outside 0 to {self.vocabulary - 1}", "prompt")

    def _check_scored(self, prompts: list[list[int]]) -> None:
        """Refuse probabilities of prompts that are too long for them: they are computed in short pieces."""
        scored, rotary = sum(map(len, prompts)), length_dependence(self.model.config)
        if scored > MAX_SCORED_TOKENS:
            raise Refused(f"the prompts have {scored} tokens; probabilities are given of {MAX_SCORED_TOKENS} at most")
        if rotary is not None and max(map(len, prompts)) > rotary.limit:
            raise Refused(f"probabilities are given of prompts of at most {rotary.limit} tokens: {rotary}", "logprobs")

    # Tokens to pieces

    def _stop_if_needed(self, job: Job) -> None:
        if self.stopping.is_set() or job.gone.is_set():
            raise Stopped

    def _run(self, job: Job) -> None:
        self._stop_if_needed(job)
        job.started = time.monotonic()
        for place, prompt in enumerate(job.prompts):
            self._answer(job, place, prompt)

    def _answer(self, job: Job, place: int, prompt: list[int]) -> None:
        """All choices of one prompt: it is read once."""
        request, session = job.request, Session.new(self.model)
        echoed = self._echo(job, session, prompt)
        n = request.n
        for sample in range(n):
            copied = session if sample == n - 1 else Session(self.model, session.fork(1), list(session.pending))
            choice = _Choice(self, job, place * n + sample, prompt)
            choice.echo(echoed)
            choice.write(
                copied, Chooser(request, self.model.generation_config, prompt, device=self.model.device, sample=sample)
            )
            job.state_bytes = copied.nbytes()

    def _echo(self, job: Job, session: Session, prompt: list[int]) -> list[TokenInfo]:
        """Read all but the last token; the prompt's tokens with their probabilities if the request wants them."""
        request = job.request
        if not (request.echo and request.logprobs is not None):
            session.read(prompt, lambda: self._stop_if_needed(job))
            return []
        infos = list(self._scored(job, session, prompt, request.logprobs))
        session.pending = prompt[-1:]
        return infos

    def _scored(self, job: Job, session: Session, prompt: list[int], alternatives: int) -> Iterator[TokenInfo]:
        """Every token of the prompt with its probability after those before it; the session reads all but the last."""
        text, detokenizer = "", Detokenizer(self._decoder, special=False)
        scores = session.logits(prompt[:-1], SCORED_TOKENS)
        logits_TV, row = None, 0
        for place, token in enumerate(prompt):
            if place == 0:
                yield TokenInfo(self._text(token), 0, None)
            else:
                if logits_TV is None or row == logits_TV.shape[0]:
                    self._stop_if_needed(job)
                    logits_TV, row = next(scores), 0
                yield self.token_info(token, len(text), logits_TV[row], alternatives)
                row += 1
            text += detokenizer.push(token)

    def token_info(self, token: int, offset: int, logits_V: Tensor, alternatives: int) -> TokenInfo:
        """A token with its probability, and the most likely ones."""
        logprob, top = probabilities(logits_V, token, alternatives)
        return TokenInfo(
            self._text(token), offset, logprob, tuple((self._text(other), value) for other, value in top.items())
        )

    def _text(self, token: int) -> str:
        """The text of one token, special tokens included."""
        return str(self._decoder.decode([token]))


class _Choice:
    """One text of an answer while it is written."""

    def __init__(self, engine: Engine, job: Job, index: int, prompt: list[int]) -> None:
        self.engine, self.job, self.index = engine, job, index
        request = job.request
        self.parser = (
            AnswerParser.of(engine.model, engine._decoder, prompt, list(request.tools) or None)
            if request.chat
            else None
        )
        self.detokenizer = Detokenizer(engine._decoder, special=self.parser is not None)
        self.filter = StopFilter(request.stop)
        self.prompt, self.received, self.passed = prompt, 0, 0
        self.infos: list[TokenInfo] = []
        self.tools = 0
        room = None if engine.context is None else engine.context - len(prompt)
        wanted = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
        self.limit = wanted if room is None else min(wanted, room)

    def echo(self, infos: list[TokenInfo]) -> None:
        """Pass the prompt on, if the request wants it."""
        if self.job.request.echo:
            text = str(self.engine._decoder.decode(self.prompt, skip_special_tokens=True))
            self.received = self.passed = len(text)
            self.job.emit(Piece(self.index, [Part(text)], infos))

    def write(self, session: Session, chooser: Chooser) -> None:
        """Generate until an end token, a stop string or the limit."""
        ends = set(end_tokens(self.engine.model, self.engine.tokenizer))
        finish = "length"
        for _ in range(self.limit):
            self.engine._stop_if_needed(self.job)
            logits_V = session.next_logits()
            token = chooser.choose(logits_V)
            self._count()
            if token not in ends or self.parser is not None:
                self._token(token, logits_V)
            if token in ends or self.filter.stopped:
                finish = "stop"
                break
            session.pending = [token]
        self._end(finish)

    def _count(self) -> None:
        self.job.written += 1
        if self.job.first_token is None:
            self.job.first_token = time.monotonic()

    def _token(self, token: int, logits_V: Any) -> None:
        alternatives = self.job.request.logprobs
        if alternatives is not None:
            self.infos.append(self.engine.token_info(token, self.received, logits_V, alternatives))
        text = self.detokenizer.push(token)
        self.received += len(text)
        self._pass(self.filter.push(text))

    def _pass(self, text: str, finish: str | None = None) -> None:
        """Pass visible text on, with the tokens that it is made of."""
        self.passed += len(text)
        parts = [Part(text)] if text else []
        if self.parser is not None:
            parts = self.parser.push(text) + (self.parser.flush() if finish else [])
        self.tools += sum(part.kind == "tool" for part in parts)
        if finish is not None and self.tools:
            finish = "tool_calls"
        if not parts and finish is None:
            return
        infos, self.infos = self.infos, []
        if self.filter.stopped:
            infos = [info for info in infos if info.offset < self.passed]
        self.job.emit(Piece(self.index, parts, infos, finish))

    def _end(self, finish: str) -> None:
        rest = self.filter.push(self.detokenizer.flush())
        self._pass(rest + self.filter.flush(), "stop" if self.filter.stopped else finish)

"""A conversation with a model: turns in its chat template (or a plain transcript), answers streamed.

Each turn reads only the new tokens; the state of a linearized model has a constant size and can be saved to a file
(:mod:`trenchcoat.generation.statefile`), however long the conversation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, TextStreamer

from trenchcoat.config import UserError
from trenchcoat.generation.generate import Sampling, Session, prompt_tokens
from trenchcoat.models.attach import mode_of

USER, ANSWER = "User:", "Assistant:"
"""Speaker labels of a plain transcript."""

_ASKED, _ANSWERED, _NEXT = "first-question", "the-answer-given", "next-question"
"""Placeholders that show what a template puts between an answer and the next question."""


@dataclass(frozen=True)
class Reply:
    """An answer of the model, and its cost."""

    text: str
    tokens: int
    seconds: float
    """From the question to the last token, prefill included."""
    seen: int
    """Tokens of the conversation so far that the model has read."""
    state_bytes: int
    stopped: bool
    """Whether the caller stopped it early."""

    @property
    def summary(self) -> str:
        """One line: speed, length and size of the state."""
        rate = self.tokens / max(self.seconds, 1e-9)
        size = self.state_bytes / 2**20
        return f"{self.tokens} tokens, {rate:.1f} tokens/s, {self.seen} tokens seen, state {size:.2f} MiB"


class _TextPieces(TextStreamer):
    """Passes text on as soon as whole words are complete, and collects it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.written = on_text, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by Transformers."""
        if text:
            self.written += text
            self.on_text(text)


class Conversation:
    """Turns with one model; `sampling` applies to every answer."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, sampling.seed
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        if not self.templated:
            sampling = replace(sampling, more={"stop_strings": [f"\n{USER}"], **sampling.more})
        self.config = sampling.config(model, tokenizer)
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.session = Session.new(self.model)
        self.turns = 0
        self._asking = False

    def save(self, path: Path | str) -> None:
        """Write the state to a file. Raises UserError in softmax mode, whose cache grows with the text."""
        if mode_of(self.model) != "student":
            raise UserError("only a linearized model's state has a constant size and can be saved")
        self.session.save(path)

    def load(self, path: Path | str) -> None:
        """Continue from a saved state."""
        self.session = Session.load(path, self.model)
        self.turns = 1
        self._asking = False

    def ask(self, text: str, on_text: Callable[[str], None], halt: Callable[[], bool] = lambda: False) -> Reply:
        """Generate the answer, streaming it to `on_text`; `halt` is called after every token, and True stops."""
        ids, streamer = self._turn(text), _TextPieces(self.tokenizer, on_text)
        started = time.perf_counter()
        new = self.session.write(
            ids,
            self.config,
            streamer=streamer,
            halt=halt,
            seed=self.seed + self.turns,
            **({} if self.templated else {"tokenizer": self.tokenizer}),
        )
        seconds = time.perf_counter() - started
        self.turns += 1
        answer = streamer.written.rstrip()
        self._asking = not self.templated and answer.endswith(f"\n{USER}")
        answer = answer.removesuffix(USER).strip()
        return Reply(answer, len(new), seconds, self.session.seen, self.session.nbytes(), halt())

    def _turn(self, text: str) -> list[int]:
        """The tokens of this turn: the question as the template formats it, and the start of the answer."""
        first = self.turns == 0
        if not self.templated:
            name = USER if first else "" if self._asking else f"\n{USER}"
            return self._ids(f"{name} {text}\n{ANSWER}", special=first)
        if first:
            return self._ids(self._render([("user", text)]), special=False)
        whole = self._render([("user", _ASKED), ("assistant", _ANSWERED), ("user", _NEXT)])
        _, found, tail = whole.rpartition(_ANSWERED)
        if not found or _NEXT not in tail:
            raise UserError("the tokenizer's chat template does not contain answers unchanged; it cannot be used")
        ends = self.config.eos_token_id or []
        pending = self.session.pending
        if pending and pending[-1] in ends:  # the template adds the end token itself
            del pending[-1]
        return self._ids(tail.replace(_NEXT, text), special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return prompt_tokens(self.model, self.tokenizer, text, add_special_tokens=special)

    def _render(self, turns: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise UserError(f"the tokenizer's chat template refuses this conversation: {error}") from error

"""Text generation: left-padded batches of prompts through Transformers' own ``generate``.

A linearized model creates its constant-size cache itself, so the same code runs teacher and student. Prompts are read
in chunks of ``PREFILL_TOKENS``, so that memory does not grow with their length. A :class:`Session` is one row that can
be continued later, from memory or from a file.
"""

from __future__ import annotations

import copy
import difflib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from trenchcoat.config import UserError
from trenchcoat.generation.statefile import load_state, save_state
from trenchcoat.models.attach import set_mode
from trenchcoat.models.cache import cache_nbytes, new_cache
from trenchcoat.models.lora import remove_lora
from trenchcoat.models.rotary import length_dependence
from trenchcoat.models.text import clean_text, embeddings_of, tokenize, without_embedding
from trenchcoat.runtime.sharding import run_decoder

PREFILL_TOKENS = 2048
"""Tokens of a prompt processed at once."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many tokens are generated, and how each is chosen: greedily unless ``do_sample`` or ``num_beams`` is set."""

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    """``temperature``, ``top_k`` and ``top_p`` have an effect only with ``do_sample``."""
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    seed: int = 0
    """Set at each batch, or at each turn of a chat; the caller's random state is restored afterwards."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further options of Transformers' ``GenerationConfig``, by name."""

    def __post_init__(self) -> None:
        for name, (kind, expected) in _KINDS.items():
            value = getattr(self, name)
            missing = value is None and name in ("top_k", "top_p")
            if not missing and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
                raise UserError(f"{name} is {value!r}; expected {expected}")
        _require_positive("num_beams", self.num_beams)
        if not self.temperature > 0:
            raise UserError(
                f"temperature is {self.temperature}; expected a number above 0 (for greedy text leave sampling off)"
            )
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (no limit) or a whole number above it")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a share above 0, at most 1")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sampling:
        """From options by name; names that are not fields go to Transformers (``more``)."""
        own = {each.name for each in fields(cls)} - {"more"}
        known = {name: value for name, value in options.items() if name in own}
        return cls(**known, more={name: value for name, value in options.items() if name not in own})

    def config(self, model: Any, tokenizer: Any) -> GenerationConfig:
        """The GenerationConfig, with the model's end tokens and none of the checkpoint's other generation settings.

        Raises ``UserError`` for an unknown option (suggesting the closest one) or an invalid value.
        """
        known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
        for name in self.more:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "Transformers' GenerationConfig lists them"
                raise UserError(f"no generation option {name!r}; {hint}")
        ends, embeddings = end_tokens(model, tokenizer), embeddings_of(model)
        pads = (token for token in (tokenizer.pad_token_id, *ends) if token is not None and token < embeddings)
        options: dict[str, Any] = {
            "eos_token_id": ends or None,
            "pad_token_id": next(pads, 0),  # any token will do: padding is masked
            "bos_token_id": tokenizer.bos_token_id,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
        }
        if self.do_sample:
            top_p = 1.0 if self.top_p is None else self.top_p
            options |= {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": top_p}
        try:
            made = GenerationConfig(**(options | dict(self.more)))
            made.validate(strict=True)
        except (ValueError, TypeError) as error:
            raise UserError(f"these generation options do not go together: {' '.join(str(error).split())}") from error
        return made


_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("max_new_tokens", "num_beams", "top_k", "seed"), (int, "a whole number")),
    **dict.fromkeys(("temperature", "top_p"), (int | float, "a number")),
    "do_sample": (bool, "true or false"),
}
"""Field of :class:`Sampling` -> its type, and what that is called; options of a command line can hold anything."""


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}; expected a whole number of at least 1")


def softmax_twin(model: Any) -> Any:
    """A second model that shares all weights but runs softmax attention, without LoRA."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    remove_lora(twin)
    set_mode(twin, "teacher")
    return twin


@dataclass(frozen=True)
class Generation:
    """A prompt and the model's continuation."""

    prompt: str
    text: str
    """The continuation only, special tokens left out."""
    tokens: int
    """New tokens, including the end-of-text token if there is one."""
    seconds: float
    """Wall time of the whole batch."""


def generate_rows(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    compare: bool = False,
    start: Path | None = None,
    end: Path | None = None,
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """The fields of a :class:`Generation` for each prompt, batch by batch.

    ``compare`` adds `softmax`: the continuation by the same weights with softmax attention, without LoRA. Every prompt
    continues from the saved state ``start``; the state after a single prompt and its continuation is saved to ``end``.
    Raises ``UserError``.
    """
    prompts = [clean_text(prompt) for prompt in prompts]
    _require_positive("batch_size", batch_size)
    if end is not None:
        if len(prompts) != 1 or compare:
            raise UserError(f"a state can be saved after one prompt, without comparison; got {len(prompts)} prompts")
        yield _continue_and_save(model, tokenizer, prompts[0], sampling, start=start, end=end)
        return
    if compare and start is not None:
        raise UserError("the softmax model cannot continue from a linearized model's state; leave out one of the two")
    session = None if start is None else Session.load(start, model)
    twin = softmax_twin(model) if compare else None
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        made = generate_text(model, tokenizer, batch, sampling, batch_size=batch_size, start=session)
        other = made if twin is None else generate_text(twin, tokenizer, batch, sampling, batch_size=batch_size)
        for one, old in zip(made, other, strict=True):
            yield asdict(one) | ({} if twin is None else {"softmax": old.text})


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    start: Session | None = None,
) -> list[Generation]:
    """Continue every prompt; with ``num_return_sequences`` a prompt has several results.

    An empty prompt starts from the tokenizer's beginning-of-text token. Every prompt continues from ``start`` (which is
    not changed): a shared prefix that is computed once. Raises ``UserError`` naming the option that is out of range, or
    the prompt that has no token to start from.
    """
    _require_positive("max_new_tokens", sampling.max_new_tokens)
    _require_positive("batch_size", batch_size)
    config, ends = sampling.config(model, tokenizer), end_tokens(model, tokenizer)
    encoded = [_encode(model, tokenizer, prompt, start) for prompt in prompts]
    was_training = model.training
    model.eval()
    written: list[Generation] = []
    try:
        for first in range(0, len(prompts), batch_size):
            started = time.perf_counter()
            new = _generate_batch(model, encoded[first : first + batch_size], config, sampling.seed, start)
            seconds = time.perf_counter() - started
            samples = config.num_return_sequences or 1
            sources = [prompt for prompt in prompts[first : first + batch_size] for _ in range(samples)]
            for prompt, tokens in zip(sources, new, strict=True):
                kept = _until_end(tokens, ends)
                written.append(Generation(prompt, tokenizer.decode(kept, skip_special_tokens=True), len(kept), seconds))
    finally:
        model.train(was_training)
    return written


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-text ids: those of the model's generation config, else the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if own is not None else tokenizer.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _encode(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, start: Session | None) -> list[int]:
    if start is not None:
        ids = [*start.pending, *prompt_tokens(model, tokenizer, prompt, add_special_tokens=False)]
        if not ids:
            raise UserError("the prompt is empty and the state has no pending token; give a text to continue with")
        return ids
    ids = prompt_tokens(model, tokenizer, prompt)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError(
            f"prompt {prompt!r} has no token, and the tokenizer has no beginning-of-text token; give a text"
        )
    return ids


def prompt_tokens(model: Any, tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text that the model reads; ``UserError`` for a text that it cannot read."""
    ids = list(tokenize(tokenizer, text, add_special_tokens=add_special_tokens)["input_ids"])
    foreign = without_embedding(tokenizer, ids, embeddings_of(model))
    if foreign is not None:
        raise UserError(f"prompt {text[:80]!r}: {foreign}")
    return ids


def _generate_batch(
    model: PreTrainedModel, rows: list[list[int]], config: GenerationConfig, seed: int, start: Session | None
) -> list[list[int]]:
    """Left-pad the rows, generate, return each row's new tokens (padding after an early end included)."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[config.pad_token_id] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    options: dict[str, Any] = {}
    if start is not None:
        copies = max(config.num_return_sequences or 1, config.num_beams or 1)
        options["past_key_values"] = start.fork(len(rows) * copies)
        mask = torch.cat([mask.new_ones(len(rows), start.seen), mask], 1)
    return [row[length:] for row in _generate(model, ids, mask, config, seed, **options)]


def _generate(
    model: Any, ids: Tensor, mask: Tensor, config: GenerationConfig, seed: int | None, **options: Any
) -> list[list[int]]:
    """The tokens that `model.generate` returns, with long prompts read in chunks, and ``seed`` set if given."""
    chunk = _chunk_tokens(model, mask.shape[1])
    if ids.shape[1] > chunk and config.prefill_chunk_size is None:
        config = copy.deepcopy(config)
        config.prefill_chunk_size = chunk
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        out: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    return out.tolist()


def _chunk_tokens(model: Any, length: int) -> int:
    """Tokens of a chunk of a text of ``length`` tokens: all of it where the rotary frequencies change on the way."""
    rotary = length_dependence(model.config)
    return PREFILL_TOKENS if rotary is None or length <= rotary.limit else max(PREFILL_TOKENS, length)


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Tokens up to and including the first end token."""
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]


# One row that can be continued


class _Halt(StoppingCriteria):
    def __init__(self, halt: Callable[[], bool]) -> None:
        self.halt = halt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.halt(), device=input_ids.device)


def _continue_and_save(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling, *, start: Path | None, end: Path
) -> dict[str, Any]:
    """Continue one prompt (after the state `start`, if given) and write the state after it to `end`.

    ``max_new_tokens=0`` only reads the prompt. Returns the fields of a Generation.
    """
    session = Session.new(model) if start is None else Session.load(start, model)
    if sampling.num_beams != 1 or sampling.more.get("num_return_sequences", 1) != 1:
        raise UserError("a state can be saved after one continuation only; leave out beams and num_return_sequences")
    ids = _encode(model, tokenizer, prompt, None if start is None else session)[len(session.pending) :]
    began = time.perf_counter()
    if sampling.max_new_tokens == 0:
        session.read(ids)
        new = []
    else:
        new = session.write(ids, sampling.config(model, tokenizer), seed=sampling.seed)
    session.save(end)
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    return asdict(Generation(prompt, text, len(new), time.perf_counter() - began))


@dataclass
class Session:
    """One row of text that a model reads and continues; the state of a linearized model has a constant size."""

    model: Any
    cache: Cache
    pending: list[int] = field(default_factory=list)
    """Tokens not read yet, such as the last one generated."""

    @classmethod
    def new(cls, model: Any) -> Session:
        """An empty session."""
        return cls(model, new_cache(model))

    @classmethod
    def load(cls, path: Path | str, model: Any) -> Session:
        """Load a saved session; see :func:`trenchcoat.generation.statefile.load_state` for the errors."""
        cache, pending = load_state(path, model)
        rows = {layer.state.seen_B.shape[0] for layer in cache.layers if getattr(layer, "state", None) is not None}
        if rows != {1}:
            raise UserError(f"{path} holds a batch of {max(rows)} rows; a session is one row")
        return cls(model, cache, pending)

    def save(self, path: Path | str) -> None:
        """Write the state to a file of constant size; see :func:`trenchcoat.generation.statefile.save_state`."""
        save_state(path, self.model, self.cache, self.pending)

    @property
    def seen(self) -> int:
        """Number of tokens read."""
        return int(self.cache.get_seq_length())

    def fork(self, rows: int) -> Cache:
        """A copy of the cache with `rows` equal rows."""
        twin = copy.deepcopy(self.cache)
        if rows > 1:
            twin.batch_repeat_interleave(rows)
        return twin

    def read(self, ids: Sequence[int], before_chunk: Callable[[], None] = lambda: None) -> None:
        """Read tokens in chunks; the last one stays pending, since its logits choose the next token.

        `before_chunk` is called before each chunk; what it raises ends the reading.
        """
        row = [*self.pending, *ids]
        if not row:
            raise UserError("there is nothing to read: the text has no tokens")
        given = torch.tensor([row], device=self.model.device)
        with torch.no_grad():
            for piece in given[:, :-1].split(_chunk_tokens(self.model, self.seen + len(row)), 1):
                before_chunk()
                if piece.shape[1]:
                    run_decoder(self.model, input_ids=piece, past_key_values=self.cache, use_cache=True)
        self.pending = row[-1:]

    def logits(self, ids: Sequence[int], piece: int = PREFILL_TOKENS) -> Iterator[Tensor]:
        """Read `ids`, all of them; after every `piece` of them, the logits [tokens, V] that follow each."""
        given = torch.tensor([[*self.pending, *ids]], device=self.model.device)
        self.pending = []
        for part in given.split(piece, 1):
            with torch.no_grad():
                found = self.model(input_ids=part, past_key_values=self.cache, use_cache=True).logits
            yield found[0]

    def next_logits(self) -> Tensor:
        """Read the pending tokens; the logits [V] of what follows, in float32."""
        (*_, last) = self.logits(())
        return last[-1].float()

    def write(
        self,
        ids: Sequence[int],
        config: GenerationConfig,
        *,
        streamer: BaseStreamer | None = None,
        halt: Callable[[], bool] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Read `ids` and generate; returns the new tokens, the end token included.

        `halt` is called after every token; generation stops when it returns True. With `seed`, sampling starts from it
        and the caller's random state is restored afterwards. `options` go to Transformers' ``generate``.
        """
        row = [*self.pending, *ids]
        if not row:
            raise UserError("there is nothing to continue: the text has no tokens")
        before = self.seen
        given = torch.tensor([row], device=self.model.device)
        mask = torch.ones(1, before + len(row), dtype=torch.int64, device=given.device)
        if halt is not None:
            options["stopping_criteria"] = StoppingCriteriaList([_Halt(halt)])
        options |= {"past_key_values": self.cache, "streamer": streamer}
        (out,) = _generate(self.model, given, mask, config, seed, **options)
        self.pending = out[self.seen - before :]
        return out[len(row) :]

    def nbytes(self) -> int:
        """Bytes of the cache."""
        return cache_nbytes(self.cache)

"""Text from a model: batches of prompts, left-padded, through Transformers' own ``generate``.

The linearized model brings its constant-size cache itself, so one function serves teacher and student. Prompts are read
in pieces of ``PREFILL_TOKENS``, so that the memory they need does not depend on their length. A :class:`Session` is one
row that goes on from where it was, token by token or from a file.
"""

from __future__ import annotations

import copy
import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from trenchcoat.config import UserError
from trenchcoat.generation.statefile import load_state, save_state
from trenchcoat.models.cache import cache_nbytes
from trenchcoat.runtime.sharding import run_decoder

PREFILL_TOKENS = 2048
"""Tokens of a prompt that are read at once."""


@dataclass(frozen=True)
class Generation:
    """One prompt and what the model wrote after it."""

    prompt: str
    text: str
    """The continuation only, special tokens left out."""
    tokens: int
    """New tokens, the end-of-text token included when it was written."""
    seconds: float
    """Wall time of the whole batch this prompt was in."""


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    start: Session | None = None,
    **more: Any,
) -> list[Generation]:
    """Continue every prompt; greedy unless ``do_sample`` or ``num_beams`` say otherwise.

    ``temperature``, ``top_k`` and ``top_p`` shape sampling only. Sampling starts from ``seed`` at each batch and leaves
    the caller's random state as it was. An empty prompt starts from the tokenizer's beginning-of-text token. ``start``
    is read before every prompt (and not changed): a common beginning that is computed once. ``more`` are further
    settings of Transformers' ``GenerationConfig``; with ``num_return_sequences`` a prompt has several results.
    Raises ``ValueError`` naming the option that is out of range, or the prompt that has no token to start from.
    """
    _check(max_new_tokens, temperature, top_k, top_p, num_beams, batch_size)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": num_beams}
    if do_sample:
        options |= {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    config = generation_config(model, tokenizer, {**options, **more})
    ends, pad, samples = _end_tokens(model, tokenizer), config.pad_token_id, config.num_return_sequences or 1
    encoded = [_encode(tokenizer, prompt, start) for prompt in prompts]
    was_training = model.training
    model.eval()
    written: list[Generation] = []
    try:
        for first in range(0, len(prompts), batch_size):
            rows = encoded[first : first + batch_size]
            started = time.perf_counter()
            new = _generate_batch(model, rows, config, pad, seed, start, samples)
            seconds = time.perf_counter() - started
            sources = [prompt for prompt in prompts[first : first + batch_size] for _ in range(samples)]
            for prompt, tokens in zip(sources, new, strict=True):
                kept = _until_end(tokens, ends)
                written.append(Generation(prompt, tokenizer.decode(kept, skip_special_tokens=True), len(kept), seconds))
    finally:
        model.train(was_training)
    return written


def _check(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, num_beams: int, batch_size: int
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected a whole number of at least 1")
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; expected a number above 0 (for greedy text leave sampling off)"
        )
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k is {top_k}; expected 0 (no limit) or a whole number above it")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a share above 0, at most 1")


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: those of the model's own generation settings, else the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if own is not None else tokenizer.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _pad_token(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int:
    """Any id will do, padding is masked; the tokenizer's own when it has one."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if ends else 0


def generation_config(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> GenerationConfig:
    """Transformers' settings from ``options``, with the model's end tokens; nothing else of the checkpoint's own.

    Raises ``UserError`` for an option that does not exist (with the nearest that does) or a value it refuses.
    """
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "Transformers' GenerationConfig lists them"
            raise UserError(f"no generation option {name!r}; {hint}")
    ends = _end_tokens(model, tokenizer)
    tokens = {"eos_token_id": ends or None, "pad_token_id": _pad_token(tokenizer, ends)}
    try:
        made = GenerationConfig(**{**tokens, "bos_token_id": tokenizer.bos_token_id, **options})
        made.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"these generation options do not go together: {' '.join(str(error).split())}") from error
    return made


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, start: Session | None) -> list[int]:
    if start is not None:
        ids = [*start.pending, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        if not ids:
            raise ValueError("the prompt is empty and the state has no token waiting; give a text to go on with")
        return ids
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ValueError(
            f"prompt {prompt!r} has no token, and the tokenizer has no beginning-of-text token; give a text"
        )
    return ids


def _generate_batch(
    model: PreTrainedModel,
    rows: list[list[int]],
    config: GenerationConfig,
    pad: int,
    seed: int,
    start: Session | None,
    samples: int,
) -> list[list[int]]:
    """Left-pad the rows, generate, return each row's new tokens (padding after an early end included)."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    options: dict[str, Any] = {}
    if start is not None:
        copies = max(samples, config.num_beams or 1)
        options["past_key_values"] = start.fork(len(rows) * copies)
        mask = torch.cat([mask.new_ones(len(rows), start.seen), mask], 1)
    with torch.no_grad(), torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        out = _generate(model, ids, mask, config, **options)
    return [row[length:] for row in out.tolist()]


def _devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _generate(model: Any, ids: Tensor, mask: Tensor, config: GenerationConfig, **options: Any) -> Tensor:
    """`model.generate`, with long prompts read in pieces."""
    if ids.shape[1] > PREFILL_TOKENS and config.prefill_chunk_size is None:
        config = copy.deepcopy(config)
        config.prefill_chunk_size = PREFILL_TOKENS
    out: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    return out


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


# One row that goes on


class _Halt(StoppingCriteria):
    def __init__(self, halt: Callable[[], bool]) -> None:
        self.halt = halt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.halt(), device=input_ids.device)


def continue_and_save(
    model: Any, tokenizer: Any, prompt: str, *, start: Path | None, end: Path, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Continue one prompt (after the state `start`, when given) and write the state after it to `end`.

    `options` as those of :func:`generate_text`; ``max_new_tokens=0`` only reads. Returns the fields of a Generation.
    """
    session = Session.new(model) if start is None else Session.load(start, model)
    several = options.get("num_beams", 1) != 1 or options.get("num_return_sequences", 1) != 1
    if several:
        raise UserError("a state is saved of one continuation; leave out beams and num_return_sequences")
    ids = _encode(tokenizer, prompt, None if start is None else session)[len(session.pending) :]
    began = time.perf_counter()
    if options.get("max_new_tokens") == 0:
        session.read(ids)
        new = []
    else:
        options = {name: value for name, value in options.items() if value is not None}
        new = session.write(ids, generation_config(model, tokenizer, options), seed=seed)
    session.save(end)
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    return asdict(Generation(prompt, text, len(new), time.perf_counter() - began))


@dataclass
class Session:
    """One row of text that a model reads and continues; with a linearized model its state has a constant size."""

    model: Any
    cache: Cache
    pending: list[int] = field(default_factory=list)
    """Tokens that come next and have not been read: those of an empty reading, or the last one generated."""

    @classmethod
    def new(cls, model: Any) -> Session:
        """Nothing read yet."""
        return cls(model, DynamicCache(config=model.config))

    @classmethod
    def load(cls, path: Path | str, model: Any) -> Session:
        """As it was saved; see :func:`trenchcoat.generation.statefile.load_state` for the errors."""
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
        """Tokens read."""
        return int(self.cache.get_seq_length())

    def fork(self, rows: int) -> Cache:
        """A copy of the cache with `rows` equal rows; this one is not touched."""
        twin = copy.deepcopy(self.cache)
        if rows > 1:
            twin.batch_repeat_interleave(rows)
        return twin

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens in pieces; the last one stays pending, as its logits are what comes next."""
        row = [*self.pending, *ids]
        if not row:
            raise UserError("there is nothing to read: the text has no tokens")
        given = torch.tensor([row], device=self.model.device)
        with torch.no_grad():
            for piece in given[:, :-1].split(PREFILL_TOKENS, 1):
                if piece.shape[1]:
                    run_decoder(self.model, input_ids=piece, past_key_values=self.cache, use_cache=True)
        self.pending = row[-1:]

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

        `halt` is asked after every token whether to stop. With `seed`, sampling starts from it and the caller's random
        state stays as it was.
        """
        row = [*self.pending, *ids]
        if not row:
            raise UserError("there is nothing to go on from: the text has no tokens")
        before = self.seen
        given = torch.tensor([row], device=self.model.device)
        mask = torch.ones(1, before + len(row), dtype=torch.int64, device=given.device)
        if halt is not None:
            options["stopping_criteria"] = StoppingCriteriaList([_Halt(halt)])
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(self.model), enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            out = _generate(self.model, given, mask, config, past_key_values=self.cache, streamer=streamer, **options)[
                0
            ].tolist()
        self.pending = out[self.seen - before :]
        return out[len(row) :]

    def nbytes(self) -> int:
        """Bytes of the cache."""
        return cache_nbytes(self.cache)

"""Text from a model: batches of prompts, left-padded, through Transformers' own ``generate``.

The linearized model brings its constant-size cache itself, so one function serves teacher and student.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
) -> list[Generation]:
    """Continue every prompt; greedy unless ``do_sample`` or ``num_beams`` say otherwise.

    ``temperature``, ``top_k`` and ``top_p`` shape sampling only. Sampling starts from ``seed`` at each batch and leaves
    the caller's random state as it was. An empty prompt starts from the tokenizer's beginning-of-text token.
    Raises ``ValueError`` naming the option that is out of range, or the prompt that has no token to start from.
    """
    _check(max_new_tokens, temperature, top_k, top_p, num_beams, batch_size)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": num_beams}
    if do_sample:
        options |= {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    ends = _end_tokens(model, tokenizer)
    pad = _pad_token(tokenizer, ends)
    config = GenerationConfig(
        **options, eos_token_id=ends or None, pad_token_id=pad, bos_token_id=tokenizer.bos_token_id
    )
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    was_training = model.training
    model.eval()
    written: list[Generation] = []
    try:
        for first in range(0, len(prompts), batch_size):
            rows = encoded[first : first + batch_size]
            started = time.perf_counter()
            new = _generate_batch(model, rows, config, pad, seed)
            seconds = time.perf_counter() - started
            for prompt, tokens in zip(prompts[first : first + batch_size], new, strict=True):
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


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ValueError(
            f"prompt {prompt!r} has no token, and the tokenizer has no beginning-of-text token; give a text"
        )
    return ids


def _generate_batch(
    model: PreTrainedModel, rows: list[list[int]], config: GenerationConfig, pad: int, seed: int
) -> list[list[int]]:
    """Left-pad the rows, generate, return each row's new tokens (padding after an early end included)."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [row[length:] for row in out.tolist()]


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens

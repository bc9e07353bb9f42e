"""Decoding on a GPU: an 8B-shaped Llama, one token at a time in a captured CUDA graph, students against softmax.

Both models run the same greedy loop. The softmax model gets the best cache layout for a given context: keys and values
in buffers of exactly that length, the new pair written in place, no mask, no copy, so that PyTorch's attention reads
each pair once for all query heads that share it. Times are means over W tokens, so that folds are fully counted. Caches
hold random numbers.

Shape legend: B rows, G key/value heads, T tokens of context, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from trenchcoat.bench.benchmark import Target, at_least, at_most
from trenchcoat.bench.kernel_part import KernelPart, Measurement
from trenchcoat.bench.llama import LLAMA_8B, TINY_LLAMA, TOY_LLAMA, LlamaShape, random_llama
from trenchcoat.bench.timing import Ceilings, Timer, attempt, captured, repeated
from trenchcoat.models.attach import set_mode, students_of
from trenchcoat.models.cache import new_cache, state_layer

SOFTMAX_CACHE = "buffers of exactly the context, PyTorch's attention without a mask, CUDA graph"


@dataclass(frozen=True)
class DecodePartSizes:
    """What is measured."""

    shape: LlamaShape = LLAMA_8B
    layers: int = 32
    context: int = 32768
    batches: tuple[int, ...] = (1, 64)
    """Batch sizes compared with the memory roofline."""
    same_batch: int = 16
    """Batch size of the comparison with the softmax model."""
    filled: float = 0.92
    """Share of the free memory used by the caches of the largest batch."""
    memory: int | None = None
    """Bytes to fill instead of the free memory (required on a CPU)."""


class FullLayer(DynamicLayer):
    """A softmax layer's cache at a fixed length: the newest pair always goes to the last position."""

    def __init__(self, keys_BGTD: Tensor, values_BGTD: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys_BGTD, values_BGTD
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the pair of one new token in place; returns all keys and values."""
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the new one."""
        return int(self.keys.shape[2]) - 1


def softmax_cache(model: Any, rows: int, context: int) -> Cache:
    """A full softmax cache of random keys and values."""
    config = model.config
    shape = (rows, config.num_key_value_heads, context, config.head_dim)
    make: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    pairs = ([torch.empty(shape, **make).normal_() for _ in range(2)] for _ in range(config.num_hidden_layers))
    return Cache(layers=[FullLayer(*pair) for pair in pairs])


def student_cache(model: Any, rows: int, context: int) -> Cache:
    """Random students' states after `context` tokens."""
    cache = new_cache(model)
    for index, student in students_of(model).items():
        state = student.empty_state(rows, dtype=model.dtype, device=model.device)
        for name, tensor in state.tensors().items():
            if name in state.near_fields:
                tensor.normal_()
            elif tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        state.seen_B += context
        state_layer(cache, index).advance(state, context)
    return cache


class Loop:
    """Greedy decoding of `rows` rows from a cache, one token per call of :meth:`step`, at fixed addresses."""

    def __init__(self, model: Any, cache: Cache, rows: int, context: int, *, advance: bool) -> None:
        self.model, self.cache, self.move = model, cache, int(advance)
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self.place = torch.full_like(self.ids, context)

    @torch.no_grad()
    def step(self) -> None:
        """Replace the last token of every row in `ids` [B, 1] by the next one."""
        inputs = {"input_ids": self.ids, "position_ids": self.place, "past_key_values": self.cache}
        logits = self.model(**inputs, use_cache=True).logits
        self.ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.place.add_(self.move)


def seconds_a_token(sizes: DecodePartSizes, timer: Timer, model: Any, kind: str, rows: int) -> float:
    """Seconds per token of all rows together; `kind`: student or softmax."""
    set_mode(model, "student" if kind == "student" else "teacher")
    if kind == "student":
        loop = Loop(model, student_cache(model, rows, sizes.context), rows, sizes.context, advance=True)
    else:
        loop = Loop(model, softmax_cache(model, rows, sizes.context), rows, sizes.context - 1, advance=False)
    window = sizes.shape.window
    return timer(repeated(captured(loop.step, timer.device), window)) / window


def row_bytes(model: Any, kind: str, context: int) -> int:
    """Bytes of one row's cache."""
    if kind == "student":
        students = students_of(model).values()
        return sum(student.empty_state(1, dtype=torch.bfloat16, device="meta").nbytes() for student in students)
    config = model.config
    return 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters that every token reads: all but the embedding."""
    embedding = model.get_input_embeddings().weight
    return sum(p.nbytes for p in model.parameters() if p is not embedding)


def _roofline(sizes: DecodePartSizes, timer: Timer, limits: Ceilings, rows: int) -> dict[str, Any]:
    """Time of a token over the time to read weights and state once."""
    model = random_llama(sizes.shape, sizes.layers, timer.device)
    taken = seconds_a_token(sizes, timer, model, "student", rows)
    needed = weight_bytes(model) + rows * row_bytes(model, "student", sizes.context)
    entry = limits.entry(taken, (0.0, float(needed)))
    return {"rows": rows, "layers": sizes.layers, **entry, "ratio": taken / entry["least"]}


def _same_batch(sizes: DecodePartSizes, timer: Timer) -> dict[str, Any]:
    """Tokens/s against the softmax model at one batch size and context."""
    model = random_llama(sizes.shape, sizes.layers, timer.device)
    rows = sizes.same_batch
    ours, softmax = (seconds_a_token(sizes, timer, model, kind, rows) for kind in ("student", "softmax"))
    result = {"rows": rows, "layers": sizes.layers, "context": sizes.context, "softmax_cache": SOFTMAX_CACHE}
    return {**result, "ours": rows / ours, "softmax": rows / softmax, "ratio": softmax / ours}


def _largest(sizes: DecodePartSizes, timer: Timer, kind: str, key_maps: str) -> dict[str, Any]:
    """Tokens/s at the largest batch: computed from the free memory, reduced by a tenth at a time until it fits.

    Besides its cache a row has logits (bfloat16, and temporarily float32) and the widest activations.
    """
    shape = sizes.shape
    model = random_llama(shape, sizes.layers, timer.device, key_maps)
    row = row_bytes(model, kind, sizes.context) + 6 * shape.vocab + 8 * shape.inner
    free = sizes.memory
    if free is None:
        torch.cuda.empty_cache()
        free = int(torch.cuda.mem_get_info()[0])
    most_rows = int(sizes.filled * free / row)
    result = {"layers": sizes.layers, "context": sizes.context, "row_bytes": row, "free_bytes": free}
    tried: list[int] = []
    for tenths in (10, 9, 8, 7):
        rows = max(1, most_rows * tenths // 10)
        tried.append(rows)
        found = attempt(lambda rows=rows: {"seconds": seconds_a_token(sizes, timer, model, kind, rows)})  # type: ignore[misc]
        if "seconds" in found:
            return {**result, "rows": rows, "tried": tried, **found, "tokens_per_second": rows / found["seconds"]}
    return {**result, "tried": tried, **found}


def _roofline_target(rows: int) -> Target:
    what = f"decode, batch {rows}: a token over reading weights and state once"
    return at_most(1.2, what, lambda row: row["ratio"], f"batch {rows}")


class DecodePart(KernelPart[DecodePartSizes]):
    """``bench kernels --only decode``."""

    full = DecodePartSizes()
    quick = DecodePartSizes(TINY_LLAMA, layers=2, context=512, batches=(1,), same_batch=2, filled=0.02)
    toy = DecodePartSizes(TOY_LLAMA, layers=1, context=9, batches=(1,), same_batch=2, filled=0.5, memory=5000)
    depths = ("layers",)
    targets = (
        _roofline_target(1), _roofline_target(64),
        at_least(
            4.0, "decode, 16 rows at 32768: tokens/s over the softmax model's", lambda row: row["ratio"], "same batch"
        ),
        at_least(
            25.0, "decode, largest batch at 32768: tokens/s over the softmax model's",
            lambda ours, softmax: ours["tokens_per_second"] / softmax["tokens_per_second"],
            "largest batch, student", "largest batch, softmax",
        ),
    )  # fmt: skip

    def memory(self, sizes: DecodePartSizes) -> float:
        """For the comparison at one batch size; the largest batch uses all memory."""
        cache = 4.0 * sizes.layers * sizes.shape.kv_heads * sizes.shape.dim * sizes.context
        return sizes.shape.bytes(sizes.layers) + sizes.same_batch * cache

    def measurements(self, sizes: DecodePartSizes, timer: Timer, limits: Ceilings) -> Iterator[Measurement]:
        """Against the roofline, at one batch size, at the largest batch."""
        for rows in sizes.batches:
            yield f"batch {rows}", partial(_roofline, sizes, timer, limits, rows)
        yield "same batch", partial(_same_batch, sizes, timer)
        yield "largest batch, student", partial(_largest, sizes, timer, "student", "per_query_head")
        yield "largest batch, student per_kv_head", partial(_largest, sizes, timer, "student", "per_kv_head")
        yield "largest batch, softmax", partial(_largest, sizes, timer, "softmax", "per_query_head")

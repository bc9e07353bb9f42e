"""The operator on a GPU: one layer's attention by the kernels, against the roofline and other attentions.

B 1, H 32, G 8, D 128, feature dim 64, W 64, bfloat16, including feature maps. A pass's roofline time is the larger of
its operations over peak FLOP/s and its bytes over peak bandwidth; operations are those of the formula, not counting
recomputation. Softmax attention is PyTorch's, with the default backend, FlashAttention and cuDNN; ratios are to the
fastest of these.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head dim, F features, P columns of a map, W window.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from trenchcoat.bench.benchmark import Target, at_least
from trenchcoat.bench.kernel_part import KernelPart, Measurement
from trenchcoat.bench.layer import Layer, LayerSizes
from trenchcoat.bench.timing import Ceilings, Timer, captured, repeated

SOFTMAX: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class OperatorPartSizes(LayerSizes):
    """What is measured."""

    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    chunkwise_to: int = 8192
    """Longest row for which the chunkwise implementation is measured."""
    backward_to: int = 32768
    transfer: tuple[int, int] = (8, 1024)
    """(rows, tokens) of the transfer step."""
    batches: tuple[int, ...] = (1, 64)
    """Rows of a decode step."""


def work_of(sizes: LayerSizes, tokens: int, rows: int = 1) -> dict[str, tuple[float, float]]:
    """(operations, bytes) of each pass: two operations per multiply-add, every input read once, every output written
    once.

    Multiply-adds per token and head, with F = 2 P: forward 3 F D + 4 W D, full backward 9 F D + 10 W D, transfer
    backward 4 F D.
    """
    d, f, w = sizes.dim, 2 * sizes.columns, sizes.window
    places = rows * tokens * sizes.heads
    q, kv = 2.0 * places * d, 2.0 * rows * tokens * sizes.kv_heads * d
    ahead, back, learn = 3 * f * d + 4 * w * d, 9 * f * d + 10 * w * d, 4 * f * d
    return {
        "forward": (2.0 * places * ahead, 2 * q + 2 * kv),
        "backward": (2.0 * places * back, 4 * q + 4 * kv),
        "training": (2.0 * places * (ahead + back), 6 * q + 6 * kv),
        "transfer": (2.0 * places * (ahead + learn), 4 * q + 4 * kv),
    }


def decode_bytes(sizes: LayerSizes, rows: int) -> float:
    """Bytes of weights and state that one decode step must read (far sums in float32, buffers in bfloat16)."""
    far = 4.0 * rows * sizes.heads * 2 * sizes.columns * (sizes.dim + 1)
    ring = 2.0 * rows * sizes.kv_heads * 2 * sizes.window * 2 * sizes.dim
    return far + ring + 4.0 * sizes.heads * sizes.dim * sizes.columns


def _softmax(timer: Timer, work: Callable[[], object]) -> tuple[dict[str, float], dict[str, str]]:
    """(seconds of each backend that runs, why the others do not)."""
    taken, refused = {}, {}
    for name, backend in SOFTMAX.items():
        with nullcontext() if backend is None else sdpa_kernel(backend):
            try:
                taken[name] = timer(work)
            except torch.cuda.OutOfMemoryError:
                refused[name] = "out of memory"
            except RuntimeError as error:
                if backend is None:
                    raise
                refused[name] = str(error).splitlines()[0]
    return taken, refused


def _linear_attention(layer: Layer, columns: int) -> Callable[[], object] | None:
    """flash-linear-attention's chunked linear attention on features of the same size, if installed."""
    if find_spec("fla") is None:
        return None
    attend = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn

    batch, heads, tokens, dim = layer.q.shape
    make: dict[str, Any] = {"device": layer.q.device, "dtype": torch.bfloat16}
    fq, fk = (torch.rand(batch, tokens, heads, 2 * columns, **make) for _ in range(2))
    v = torch.randn(batch, tokens, heads, dim, **make)
    return lambda: attend(fq, fk, v, normalize=False)


def _forward(sizes: OperatorPartSizes, timer: Timer, limits: Ceilings, tokens: int) -> dict[str, Any]:
    ours = Layer(sizes, "triton", tokens, timer.device)
    row: dict[str, Any] = dict(limits.entry(timer(ours.forward), work_of(sizes, tokens)["forward"]))
    row["others"], row["not_run"] = _softmax(timer, ours.softmax_forward)
    linear = _linear_attention(ours, sizes.columns)
    if linear is not None:
        row["others"]["fla"] = timer(linear)
    if tokens <= sizes.chunkwise_to:
        row["others"]["chunkwise"] = timer(Layer(sizes, "chunkwise", tokens, timer.device).forward)
    return {"tokens": tokens, **row}


def _training(sizes: OperatorPartSizes, timer: Timer, limits: Ceilings, tokens: int) -> dict[str, Any]:
    """Forward and backward together; backward alone is the difference to the forward's time."""
    ours, work = Layer(sizes, "triton", tokens, timer.device), work_of(sizes, tokens)
    both, ahead = timer(ours.training), timer(ours.forward)
    row: dict[str, Any] = dict(limits.entry(both, work["training"]))
    row["backward"] = limits.entry(max(both - ahead, 1e-9), work["backward"])
    row["others"], row["not_run"] = _softmax(timer, ours.softmax_training)
    return {"tokens": tokens, **row}


def _transfer(sizes: OperatorPartSizes, timer: Timer, limits: Ceilings) -> dict[str, Any]:
    rows, tokens = sizes.transfer
    taken = timer(Layer(sizes, "triton", tokens, timer.device, rows).transfer)
    return {"rows": rows, "tokens": tokens, **limits.entry(taken, work_of(sizes, tokens, rows)["transfer"])}


def _decode(sizes: OperatorPartSizes, timer: Timer, limits: Ceilings, rows: int) -> dict[str, Any]:
    """A captured decode step (mean over W, so that folds count) over the time to read its state and weights once."""
    step = captured(Layer(sizes, "triton", 1, timer.device, rows).decoding(), timer.device)
    taken = timer(repeated(step, sizes.window)) / sizes.window
    return {"rows": rows, **limits.entry(taken, (0.0, decode_bytes(sizes, rows)))}


def fastest_softmax(row: dict[str, Any]) -> float:
    """Seconds of the fastest backend."""
    return min(taken for name, taken in row["others"].items() if name in SOFTMAX)


def _faster(tokens: int, factor: float) -> Target:
    what = f"operator, forward at T = {tokens}: times as fast as softmax attention"
    return at_least(factor, what, lambda row: fastest_softmax(row) / row["seconds"], f"forward {tokens}")


def _share(tokens: int, share: float) -> Target:
    what = f"operator, forward at T = {tokens}: share of its roofline"
    return at_least(share, what, lambda row: row["share"], f"forward {tokens}")


class OperatorPart(KernelPart[OperatorPartSizes]):
    """``bench kernels --only operator``."""

    full = OperatorPartSizes()
    quick = OperatorPartSizes(heads=4, kv_heads=2, dim=64, lengths=(512,), transfer=(1, 256), batches=(1,))
    toy = OperatorPartSizes(
        heads=2, kv_heads=1, dim=8, columns=4, window=3, lengths=(4, 7), chunkwise_to=4, backward_to=4,
        transfer=(1, 4), batches=(1,),
    )  # fmt: skip
    targets = (
        _faster(2048, 1.0), _faster(8192, 4.0), _faster(32768, 16.0), _faster(131072, 60.0),
        _share(8192, 0.35), _share(32768, 0.45),
        at_least(
            4.0, "operator, forward + backward at T = 8192: times as fast",
            lambda row: fastest_softmax(row) / row["seconds"], "training 8192",
        ),
        at_least(
            0.25, "operator, backward at T = 8192: share of its roofline", lambda row: row["backward"]["share"],
            "training 8192",
        ),
    )  # fmt: skip

    def memory(self, sizes: OperatorPartSizes) -> float:
        """For a forward pass or a backward pass, each at its longest row."""
        row = 2.0 * sizes.dim * (3 * sizes.heads + 2 * sizes.kv_heads)
        other = 2.0 * sizes.heads * (4 * sizes.columns + 2 * sizes.dim)
        gradients = row + 16.0 * sizes.heads * sizes.dim
        backward = min(max(sizes.lengths), sizes.backward_to)
        return max(max(sizes.lengths) * (row + other), backward * (row + gradients))

    def measurements(self, sizes: OperatorPartSizes, timer: Timer, limits: Ceilings) -> Iterator[Measurement]:
        """Forward and training by length, transfer, decode steps."""
        for tokens in sizes.lengths:
            yield f"forward {tokens}", partial(_forward, sizes, timer, limits, tokens)
            if tokens <= sizes.backward_to:
                yield f"training {tokens}", partial(_training, sizes, timer, limits, tokens)
        yield "transfer", partial(_transfer, sizes, timer, limits)
        for rows in sizes.batches:
            yield f"decode {rows}", partial(_decode, sizes, timer, limits, rows)

"""The operator on a GPU: one layer's attention by the kernels, against the roofline and other attentions.

B 1, H 32, G 8, D 128, feature dim 64, W 64, bfloat16, feature maps included. A pass's least time is the larger of its
operations over the device's and its bytes over the device's; operations are those the formula needs, whatever a kernel
does again. Softmax attention is PyTorch's: its own choice of backend, FlashAttention and cuDNN each by name; ratios
to it are to the fastest of these.

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
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trenchcoat.bench.gpu import Ceilings, Timer, captured, judge, least, repeated
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.students import StudentAttention, TransferRequest, build_student

Measurement = tuple[str, Callable[[], dict[str, Any]]]
"""Name of a measurement, and what makes it."""

SOFTMAX: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    columns: int = 64
    window: int = 64
    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    chunkwise_to: int = 8192
    """Longest row the chunkwise implementation is measured with."""
    backward_to: int = 32768
    transfer: tuple[int, int] = (8, 1024)
    """(rows, tokens) of the transfer step."""
    batches: tuple[int, ...] = (1, 64)
    """Rows of a decode step."""


FULL = Sizes()
QUICK = Sizes(heads=4, kv_heads=2, dim=64, lengths=(512,), transfer=(1, 256), batches=(1,))

FASTER = {2048: 1.0, 8192: 4.0, 32768: 16.0, 131072: 60.0}
"""Tokens -> times as fast as softmax attention that the forward pass is to be, at least."""
SHARES = {8192: 0.35, 32768: 0.45}
"""Tokens -> share of its roofline that the forward pass is to reach, at least."""
BACKWARD_AT, BACKWARD_FASTER, BACKWARD_SHARE = 8192, 4.0, 0.25


def work_of(sizes: Sizes, tokens: int, rows: int = 1) -> dict[str, tuple[float, float]]:
    """(operations, bytes) of each pass: two operations a multiply-add, every input read once, every output written.

    Multiply-adds of a token and head, with F = 2 P: forward 3 F D + 4 W D, full backward 9 F D + 10 W D, transfer
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


def decode_bytes(sizes: Sizes, rows: int) -> float:
    """Bytes of weights and state that one decode step must read (far sums in float32, buffers in bfloat16)."""
    far = 4.0 * rows * sizes.heads * 2 * sizes.columns * (sizes.dim + 1)
    ring = 2.0 * rows * sizes.kv_heads * 2 * sizes.window * 2 * sizes.dim
    return far + ring + 4.0 * sizes.heads * sizes.dim * sizes.columns


def memory(sizes: Sizes) -> float:
    """Bytes of device memory that the largest measurement takes, roughly."""
    row = 2.0 * sizes.dim * (3 * sizes.heads + 2 * sizes.kv_heads)
    other = 2.0 * sizes.heads * (4 * sizes.columns + 2 * sizes.dim)
    gradients = row + 16.0 * sizes.heads * sizes.dim
    backward = min(max(sizes.lengths), sizes.backward_to)
    return max(max(sizes.lengths) * (row + other), backward * (row + gradients))


class Bench:
    """A student on an implementation, and random q, k, v."""

    def __init__(
        self, sizes: Sizes, impl: str, tokens: int, device: str, rows: int = 1, *, kind: str = "terrace"
    ) -> None:
        torch.manual_seed(0)
        cfg = StudentConfig(
            name=kind,
            window=sizes.window,
            feature_map=FeatureMapConfig(feature_dim=sizes.columns),
            impl=impl,  # type: ignore[arg-type]
        )
        heads = {"num_heads": sizes.heads, "num_kv_heads": sizes.kv_heads, "head_dim": sizes.dim}
        self.student: StudentAttention = build_student(cfg, **heads).to(device)
        self.student.request = TransferRequest(backward=True)
        self.scale = sizes.dim**-0.5

        def random(count: int) -> Tensor:
            x = torch.randn(rows, count, tokens, sizes.dim, device=device, dtype=torch.bfloat16)
            return x.requires_grad_()

        self.q, self.k, self.v = (random(n) for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads))
        self.dy = torch.randn_like(self.q)

    @torch.no_grad()
    def forward(self) -> None:
        """Outputs."""
        self.student(self.q, self.k, self.v, scale=self.scale)

    def training(self) -> None:
        """Outputs and every gradient."""
        leaves = [self.q, self.k, self.v, *self.student.parameters()]
        torch.autograd.grad(self.student(self.q, self.k, self.v, scale=self.scale)[0], leaves, self.dy)

    @torch.no_grad()
    def transfer(self) -> None:
        """Loss and gradients of maps and mix."""
        self.student.transfer(self.q, self.k, self.v, self.dy, scale=self.scale)

    @torch.no_grad()
    def cross_entropy(self) -> None:
        """The same with the cross-entropy of attention rows, all of whose weight is in the loss."""
        before, self.student.request = self.student.request, TransferRequest(mse_weight=0.0, xent_weight=1.0)
        self.transfer()
        self.student.request = before

    def decoding(self) -> Callable[[], object]:
        """A step of the first token of every row, on a state ten windows on."""
        state = self.student.empty_state(len(self.q), dtype=torch.bfloat16, device=self.q.device)
        state.seen_B += 10 * self.student.cfg.window + 1
        x = [t.detach()[:, :, :1] for t in (self.q, self.k, self.v)]
        return partial(self.student.decode, *x, state=state, scale=self.scale)

    @torch.no_grad()
    def softmax_forward(self) -> None:
        """PyTorch's causal attention."""
        scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True)

    def softmax_training(self) -> None:
        """The same with its backward."""
        y = scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True)
        torch.autograd.grad(y, [self.q, self.k, self.v], self.dy)


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


def _linear_attention(bench: Bench, sizes: Sizes) -> Callable[[], object] | None:
    """flash-linear-attention's chunked linear attention on features of the same size, where it is installed."""
    if find_spec("fla") is None:
        return None
    attend = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn

    batch, heads, tokens, _ = bench.q.shape
    make: dict[str, Any] = {"device": bench.q.device, "dtype": torch.bfloat16}
    fq, fk = (torch.rand(batch, tokens, heads, 2 * sizes.columns, **make) for _ in range(2))
    v = torch.randn(batch, tokens, heads, sizes.dim, **make)
    return lambda: attend(fq, fk, v, normalize=False)


def measurements(sizes: Sizes, timer: Timer, limits: Ceilings) -> Iterator[Measurement]:
    """Every measurement of the operator."""
    for tokens in sizes.lengths:
        yield f"forward {tokens}", partial(_forward, sizes, timer, limits, tokens)
        if tokens <= sizes.backward_to:
            yield f"training {tokens}", partial(_training, sizes, timer, limits, tokens)
    yield "transfer", partial(_transfer, sizes, timer, limits)
    for rows in sizes.batches:
        yield f"decode {rows}", partial(_decode, sizes, timer, limits, rows)


def _forward(sizes: Sizes, timer: Timer, limits: Ceilings, tokens: int) -> dict[str, Any]:
    ours = Bench(sizes, "triton", tokens, timer.device)
    row: dict[str, Any] = dict(limits.entry(timer(ours.forward), work_of(sizes, tokens)["forward"]))
    row["others"], row["not_run"] = _softmax(timer, ours.softmax_forward)
    linear = _linear_attention(ours, sizes)
    if linear is not None:
        row["others"]["fla"] = timer(linear)
    if tokens <= sizes.chunkwise_to:
        row["others"]["chunkwise"] = timer(Bench(sizes, "chunkwise", tokens, timer.device).forward)
    return {"tokens": tokens, **row}


def _training(sizes: Sizes, timer: Timer, limits: Ceilings, tokens: int) -> dict[str, Any]:
    """Forward and backward together; backward alone is what remains when the forward's time is taken off."""
    ours, work = Bench(sizes, "triton", tokens, timer.device), work_of(sizes, tokens)
    both, ahead = timer(ours.training), timer(ours.forward)
    row: dict[str, Any] = dict(limits.entry(both, work["training"]))
    row["backward"] = limits.entry(max(both - ahead, 1e-9), work["backward"])
    row["others"], row["not_run"] = _softmax(timer, ours.softmax_training)
    return {"tokens": tokens, **row}


def _transfer(sizes: Sizes, timer: Timer, limits: Ceilings) -> dict[str, Any]:
    rows, tokens = sizes.transfer
    taken = timer(Bench(sizes, "triton", tokens, timer.device, rows).transfer)
    return {"rows": rows, "tokens": tokens, **limits.entry(taken, work_of(sizes, tokens, rows)["transfer"])}


def _decode(sizes: Sizes, timer: Timer, limits: Ceilings, rows: int) -> dict[str, Any]:
    """A captured decode step (mean of W, so that folds count), over the time of reading its state and weights once."""
    step = captured(Bench(sizes, "triton", 1, timer.device, rows).decoding(), timer.device)
    taken = timer(repeated(step, sizes.window)) / sizes.window
    return {"rows": rows, **limits.entry(taken, (0.0, decode_bytes(sizes, rows)))}


def fastest_softmax(row: dict[str, Any]) -> float:
    """Seconds of the fastest backend."""
    return min(taken for name, taken in row["others"].items() if name in SOFTMAX)


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured against wanted."""
    rows = []
    for tokens, factor in FASTER.items():
        target = least(f"operator, forward at T = {tokens}: times as fast as softmax attention", factor)
        rows.append(judge(target, found, f"forward {tokens}", lambda row: fastest_softmax(row) / row["seconds"]))
    for tokens, share in SHARES.items():
        target = least(f"operator, forward at T = {tokens}: share of its roofline", share)
        rows.append(judge(target, found, f"forward {tokens}", lambda row: row["share"]))
    name = f"training {BACKWARD_AT}"
    target = least(f"operator, forward + backward at T = {BACKWARD_AT}: times as fast", BACKWARD_FASTER)
    rows.append(judge(target, found, name, lambda row: fastest_softmax(row) / row["seconds"]))
    target = least(f"operator, backward at T = {BACKWARD_AT}: share of its roofline", BACKWARD_SHARE)
    rows.append(judge(target, found, name, lambda row: row["backward"]["share"]))
    return rows


def table(found: dict[str, Any]) -> list[str]:
    """The measurements as text."""
    lines = [f"{'tokens':>8} {'pass':>9} {'ms':>9} {'roofline':>9}   times as fast as"]
    for name, row in found.items():
        kind = name.split()[0]
        if "out_of_memory" in row:
            lines.append(f"{name}: out of memory ({row['out_of_memory']})")
        elif kind in ("forward", "training"):
            ratios = ", ".join(f"{other} {taken / row['seconds']:.2f}x" for other, taken in row["others"].items())
            lines.append(_line(row["tokens"], kind, row) + f"   {ratios}")
            if kind == "training":
                lines.append(_line(row["tokens"], "backward", row["backward"]))
            lines += [f"{'':>8} {other} did not run: {why}" for other, why in row["not_run"].items()]
        elif kind == "transfer":
            lines.append(_line(row["rows"] * row["tokens"], kind, row) + f"   {row['rows']} rows")
        else:
            lines.append(
                f"decode step, batch {row['rows']}: {1e6 * row['seconds']:.1f} us, "
                f"{row['seconds'] / row['least']:.2f}x the time of reading weights and state once"
            )
    return lines


def _line(tokens: int, name: str, row: dict[str, Any]) -> str:
    return f"{tokens:>8} {name:>9} {1e3 * row['seconds']:>9.3f} {row['share']:>9.1%}"

"""What the operator costs: against the quadratic reference, against PyTorch's own attention, and per token.

All of it for one layer's attention: one row, 8 heads of 64, feature dim 64, window 64, float32. The student's times
include its feature maps.

Shape legend: B rows (1), H heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trenchcoat.bench.clock import Clock, seconds
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.runtime.runlog import environment
from trenchcoat.students import StudentAttention, TransferRequest, build_student

TARGETS: dict[str, float] = {
    "transfer_speedup": 25.0,
    "transfer_memory_ratio": 15.0,
    "forward_speedup": 5.0,
    "training_speedup": 6.0,
    "break_even": 1024,
    "flatness": 1.5,
}
"""Lower limits, but for `break_even` (tokens) and `flatness` (largest over smallest time per token): at most these."""

_HEADS, _DIM, _WINDOW, _SCALE = 8, 64, 64, 64**-0.5


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    transfer_tokens: int = 2048
    long_tokens: int = 16384
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    flat_from: int = 1024
    repeats: int = 5


QUICK = Sizes(transfer_tokens=256, long_tokens=512, lengths=(128, 256, 512), flat_from=128, repeats=1)


class Bench:
    """A terrace student, its quadratic reference, and random q, k, v of T tokens."""

    def __init__(self, tokens: int, *, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.student = self._build("chunkwise", device)
        self.reference = self._build("reference", device)
        self.q, self.k, self.v = (
            torch.randn(1, _HEADS, tokens, _DIM, device=device, requires_grad=True) for _ in range(3)
        )
        self.dy = torch.randn_like(self.q)

    @staticmethod
    def _build(impl: str, device: str) -> StudentAttention:
        cfg = StudentConfig(window=_WINDOW, feature_map=FeatureMapConfig(feature_dim=64), impl=impl)  # type: ignore[arg-type]
        student = build_student(cfg, num_heads=_HEADS, num_kv_heads=_HEADS, head_dim=_DIM).to(device)
        student.request = TransferRequest(backward=True)
        return student

    @torch.no_grad()
    def teacher(self) -> Tensor:
        """Softmax attention's outputs, what transfer learns from."""
        return scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=_SCALE)

    def transfer(self, y_BHTD: Tensor) -> None:
        """Loss and gradients of maps and mix in closed form."""
        with torch.no_grad():
            self.student.transfer(self.q, self.k, self.v, y_BHTD, scale=_SCALE)

    def quadratic_transfer(self, y_BHTD: Tensor) -> None:
        """The same by autograd through the quadratic reference."""
        y_hat, _ = self.reference(self.q.detach(), self.k.detach(), self.v.detach(), scale=_SCALE)
        (1000.0 * (y_hat - y_BHTD).square().mean()).backward()

    @torch.no_grad()
    def forward(self) -> None:
        """The student's outputs, feature maps included."""
        self.student(self.q, self.k, self.v, scale=_SCALE)

    @torch.no_grad()
    def softmax_forward(self) -> None:
        """PyTorch's causal attention."""
        scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=_SCALE)

    def training(self) -> None:
        """Forward and backward with gradients of q, k, v, maps and mix."""
        y, _ = self.student(self.q, self.k, self.v, scale=_SCALE)
        y.backward(self.dy)

    def softmax_training(self) -> None:
        """Forward and backward of PyTorch's causal attention."""
        y = scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=_SCALE)
        y.backward(self.dy)


def _peak(work: Callable[[], None], student: StudentAttention) -> int:
    """Peak live bytes of `work` beyond parameters and their gradients."""
    work()
    with live_tensor_memory() as memory:
        work()
    student.zero_grad(set_to_none=True)
    return memory.peak


def _transfer(sizes: Sizes, device: str) -> dict[str, Any]:
    bench = Bench(sizes.transfer_tokens, device=device)
    y = bench.teacher()
    ours, theirs = partial(bench.transfer, y), partial(bench.quadratic_transfer, y)
    clocks = seconds({"chunkwise": ours, "quadratic": theirs}, sizes.repeats, device)
    peaks = {"chunkwise": _peak(ours, bench.student), "quadratic": _peak(theirs, bench.reference)}
    return {
        "tokens": sizes.transfer_tokens,
        "seconds": {name: clock.wall for name, clock in clocks.items()},
        "processor_seconds": {name: clock.processor for name, clock in clocks.items()},
        "peak_bytes": peaks,
    }


def _lengths(sizes: Sizes, device: str) -> dict[str, dict[str, float]]:
    rows = {}
    for tokens in sizes.lengths:
        bench = Bench(tokens, device=device)
        repeats = max(1, sizes.repeats if tokens < sizes.long_tokens else min(3, sizes.repeats))
        clocks = seconds({"student": bench.forward, "softmax": bench.softmax_forward}, repeats, device)
        rows[str(tokens)] = _row(clocks, tokens)
    return rows


def _row(clocks: dict[str, Clock], tokens: int) -> dict[str, float]:
    return {
        "student": clocks["student"].wall,
        "softmax": clocks["softmax"].wall,
        "speedup": clocks["softmax"].wall / clocks["student"].wall,
        "processor_speedup": clocks["softmax"].processor / clocks["student"].processor,
        "microseconds_per_token": 1e6 * clocks["student"].wall / tokens,
        "processor_microseconds_per_token": 1e6 * clocks["student"].processor / tokens,
    }


def _training(sizes: Sizes, device: str) -> dict[str, float]:
    bench = Bench(sizes.long_tokens, device=device)
    work = {"student": bench.training, "softmax": bench.softmax_training}
    return _row(seconds(work, min(2, sizes.repeats), device), sizes.long_tokens)


def break_even(rows: dict[str, dict[str, float]]) -> int | None:
    """The shortest measured length from which on the student is never slower; None when there is none."""
    found = None
    for tokens in sorted(map(int, rows), reverse=True):
        if rows[str(tokens)]["speedup"] < 1.0:
            break
        found = tokens
    return found


def measure(
    *, threads: int | None = None, quick: bool = False, repeats: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Run every measurement; JSON-ready. ``quick``: small sizes, a check that it runs."""
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = QUICK if quick else Sizes()
    sizes = sizes if repeats is None else replace(sizes, repeats=repeats)
    transfer, rows, training = _transfer(sizes, device), _lengths(sizes, device), _training(sizes, device)
    flat = [row["microseconds_per_token"] for tokens, row in rows.items() if int(tokens) >= sizes.flat_from]
    shape = {"rows": 1, "heads": _HEADS, "head_dim": _DIM, "feature_dim": 64, "window": _WINDOW, "dtype": "float32"}
    return {
        "benchmark": "ops",
        "shape": shape,
        "transfer": transfer,
        "transfer_speedup": transfer["seconds"]["quadratic"] / transfer["seconds"]["chunkwise"],
        "transfer_memory_ratio": transfer["peak_bytes"]["quadratic"] / transfer["peak_bytes"]["chunkwise"],
        "forward_by_tokens": rows,
        "forward_speedup": rows[str(sizes.long_tokens)]["speedup"],
        "break_even": break_even(rows),
        "flatness": max(flat) / min(flat),
        "training": {"tokens": sizes.long_tokens, **training},
        "training_speedup": training["speedup"],
        "targets": None if quick else TARGETS,
        "environment": environment(implementation="chunkwise", device=device),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    shape, transfer, training = result["shape"], result["transfer"], result["training"]
    peaks = {name: size / 2**20 for name, size in transfer["peak_bytes"].items()}
    lines = [
        f"One layer's attention, {shape['heads']} heads of {shape['head_dim']}, feature dim {shape['feature_dim']}, "
        f"window {shape['window']}, float32, {result['environment']['threads']} threads",
        f"transfer, forward + backward, T = {transfer['tokens']}: {1e3 * transfer['seconds']['chunkwise']:.1f} ms, "
        f"quadratic reference {1e3 * transfer['seconds']['quadratic']:.1f} ms: {result['transfer_speedup']:.1f}x"
        + _target(result, "transfer_speedup", ">="),
        f"  peak memory {peaks['chunkwise']:.1f} MiB, quadratic {peaks['quadratic']:.1f} MiB: "
        f"{result['transfer_memory_ratio']:.1f}x" + _target(result, "transfer_memory_ratio", ">="),
        f"{'tokens':>8} {'student':>11} {'softmax':>11} {'speed-up':>9} {'us/token':>9}   forward",
    ]
    for tokens, row in result["forward_by_tokens"].items():
        lines.append(
            f"{tokens:>8} {1e3 * row['student']:>8.1f} ms {1e3 * row['softmax']:>8.1f} ms {row['speedup']:>8.2f}x "
            f"{row['microseconds_per_token']:>9.2f}"
        )
    lines += [
        f"forward at the longest: {result['forward_speedup']:.2f}x" + _target(result, "forward_speedup", ">="),
        f"never slower from T = {result['break_even']}" + _target(result, "break_even", "<="),
        f"time per token, largest over smallest: {result['flatness']:.2f}x" + _target(result, "flatness", "<="),
        f"forward + backward, T = {training['tokens']}: {1e3 * training['student']:.0f} ms, softmax "
        f"{1e3 * training['softmax']:.0f} ms: {result['training_speedup']:.2f}x"
        + _target(result, "training_speedup", ">="),
    ]
    return "\n".join(lines)


def _target(result: dict[str, Any], name: str, sign: str) -> str:
    return "" if result["targets"] is None else f"  (target {sign} {result['targets'][name]:g})"

"""What the Triton kernels cost on this GPU: time, share of the device's roofline, and ratios to other attentions.

One layer's attention: B 1, H 32, G 8, D 128, feature dim 64, W 64, bfloat16 (``--quick``: a small shape). Times are
medians of CUDA events, feature maps included. The ceilings are measured in the same run: a copy of 1 GiB and a matrix
product of 8192 x 8192 x 8192. A kernel's least time is the larger of its operations over the one and its bytes over
the other; operations are those the formula needs, whatever a kernel does again.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head dim, F features, W window.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trenchcoat.config import FeatureMapConfig, StudentConfig, UserError
from trenchcoat.runlog import environment
from trenchcoat.students import StudentAttention, TransferRequest, build_student


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
    repeats: int = 20


QUICK = Sizes(heads=4, kv_heads=2, dim=64, lengths=(512,), transfer=(1, 256), batches=(1,), repeats=3)


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
        "training": (2.0 * places * (ahead + back), 6 * q + 6 * kv),
        "transfer": (2.0 * places * (ahead + learn), 4 * q + 4 * kv),
    }


def decode_bytes(sizes: Sizes, rows: int) -> float:
    """Bytes of weights and state that one decode step must read (far sums in float32, buffers in bfloat16)."""
    far = 4.0 * rows * sizes.heads * 2 * sizes.columns * (sizes.dim + 1)
    ring = 2.0 * rows * sizes.kv_heads * 2 * sizes.window * 2 * sizes.dim
    return far + ring + 4.0 * sizes.heads * sizes.dim * sizes.columns


class Timer:
    """Medians of CUDA events, in seconds."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def __call__(self, work: Callable[[], object]) -> float:
        for _ in range(2):
            work()
        taken = []
        for _ in range(self.repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            taken.append(1e-3 * start.elapsed_time(stop))
        return statistics.median(taken)


def ceilings(timer: Timer, device: str) -> dict[str, float]:
    """Bytes/s of a copy (read and write counted) and operations/s of a matrix product."""
    a = torch.empty(1 << 29, dtype=torch.bfloat16, device=device)
    b = torch.empty_like(a)
    bytes_s = 2.0 * a.nbytes / timer(partial(b.copy_, a))
    del a, b
    n = 8192
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"bytes_per_second": bytes_s, "operations_per_second": 2.0 * n**3 / timer(partial(torch.matmul, x, y))}


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
        self.student(self.q, self.k, self.v, scale=self.scale)[0].backward(self.dy)

    @torch.no_grad()
    def transfer(self) -> None:
        """Loss and gradients of maps and mix."""
        self.student.transfer(self.q, self.k, self.v, self.dy, scale=self.scale)

    @torch.no_grad()
    def softmax_forward(self) -> None:
        """PyTorch's causal attention."""
        scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True)

    def softmax_training(self) -> None:
        """The same with its backward."""
        y = scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True)
        y.backward(self.dy)


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


def _rows(sizes: Sizes, timer: Timer, limits: dict[str, float], device: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for tokens in sizes.lengths:
        ours = Bench(sizes, "triton", tokens, device)
        row: dict[str, Any] = {"forward": _entry(timer(ours.forward), work_of(sizes, tokens)["forward"], limits)}
        others = {"sdpa": ours.softmax_forward, "fla": _linear_attention(ours, sizes)}
        if tokens <= sizes.chunkwise_to:
            others["chunkwise"] = Bench(sizes, "chunkwise", tokens, device).forward
        row["forward"]["others"] = {name: timer(work) for name, work in others.items() if work is not None}
        if tokens <= sizes.backward_to:
            row["training"] = _entry(timer(ours.training), work_of(sizes, tokens)["training"], limits)
            row["training"]["others"] = {"sdpa": timer(ours.softmax_training)}
        found[str(tokens)] = row
    return found


def _entry(taken: float, work: tuple[float, float], limits: dict[str, float]) -> dict[str, Any]:
    least = max(work[0] / limits["operations_per_second"], work[1] / limits["bytes_per_second"])
    return {"seconds": taken, "operations": work[0], "bytes": work[1], "least": least, "share": least / taken}


def _decode(sizes: Sizes, timer: Timer, limits: dict[str, float], device: str) -> dict[str, dict[str, float]]:
    """A captured decode step at several batch sizes, over the time of reading its state and weights once."""
    found = {}
    for rows in sizes.batches:
        bench = Bench(sizes, "triton", 1, device, rows)
        state = bench.student.empty_state(rows, dtype=torch.bfloat16, device=device)
        state.seen_B += 10 * sizes.window + 1
        x = [t.detach() for t in (bench.q, bench.k, bench.v)]
        bench.student.decode(*x, state=state, scale=bench.scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bench.student.decode(*x, state=state, scale=bench.scale)
        taken, least = timer(graph.replay), decode_bytes(sizes, rows) / limits["bytes_per_second"]
        found[str(rows)] = {"seconds": taken, "least": least, "ratio": taken / least}
    return found


def measure(
    *, threads: int | None = None, quick: bool = False, repeats: int | None = None, device: str = "cuda"
) -> dict[str, Any]:
    """Run every measurement; JSON-ready.

    Raises:
        UserError: there is no CUDA device, or `device` is not one.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():
        found = "no CUDA device was found" if device.startswith("cuda") else f"--device is {device}"
        raise UserError(
            f"bench kernels measures Triton kernels on a GPU, but {found}; give it a machine with one and --device "
            "cuda (`bench ops` measures on CPUs)"
        )
    sizes = QUICK if quick else Sizes()
    timer = Timer(sizes.repeats if repeats is None else repeats)
    limits = ceilings(timer, device)
    by_tokens = _rows(sizes, timer, limits, device)
    rows, tokens = sizes.transfer
    learned = timer(Bench(sizes, "triton", tokens, device, rows).transfer)
    transfer = _entry(learned, work_of(sizes, tokens, rows)["transfer"], limits)
    return {
        "benchmark": "kernels",
        "shape": {"heads": sizes.heads, "kv_heads": sizes.kv_heads, "head_dim": sizes.dim, "window": sizes.window},
        "ceilings": limits,
        "by_tokens": by_tokens,
        "transfer": {"rows": rows, "tokens": tokens, **transfer},
        "decode": _decode(sizes, timer, limits, device),
        "gpu": torch.cuda.get_device_name(device),
        "environment": environment(implementation="triton", device=device),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    limits, shape = result["ceilings"], result["shape"]
    lines = [
        f"{result['gpu']}: {limits['bytes_per_second'] / 1e12:.2f} TB/s (copy), "
        f"{limits['operations_per_second'] / 1e12:.0f} TFLOP/s (matrix product)",
        f"{shape['heads']} heads of {shape['head_dim']}, {shape['kv_heads']} key/value heads, window "
        f"{shape['window']}, bfloat16",
        f"{'tokens':>8} {'pass':>9} {'ms':>9} {'roofline':>9}   times as fast as",
    ]
    for tokens, row in result["by_tokens"].items():
        for name, entry in row.items():
            ratios = ", ".join(f"{n} {t / entry['seconds']:.2f}x" for n, t in entry["others"].items())
            lines.append(f"{tokens:>8} {name:>9} {1e3 * entry['seconds']:>9.3f} {entry['share']:>9.1%}   {ratios}")
    transfer = result["transfer"]
    lines.append(
        f"transfer step, {transfer['rows']} rows of {transfer['tokens']}: {1e3 * transfer['seconds']:.3f} ms, "
        f"{transfer['share']:.1%} of its roofline"
    )
    for rows, step in result["decode"].items():
        lines.append(
            f"decode step, batch {rows}: {1e6 * step['seconds']:.1f} us, {step['ratio']:.2f}x the time of reading "
            "weights and state once"
        )
    return "\n".join(lines)

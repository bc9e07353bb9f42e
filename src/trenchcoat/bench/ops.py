"""Cost of the operator: against the quadratic reference, PyTorch's attention, and the least time the machine allows.

All for one layer's attention: one row, 8 heads of 64, feature dim 64, window 64, float32. The student's times
include its feature maps. `chunkwise` is measured beside the implementation that a student chooses by itself.

Shape legend: B rows (1), H heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trenchcoat.bench.benchmark import Benchmark, Settings, at_least, at_most, grid, listed
from trenchcoat.bench.layer import Layer, LayerSizes
from trenchcoat.bench.limits import Limits, Work
from trenchcoat.bench.timing import peak_bytes, seconds
from trenchcoat.config import StudentConfig
from trenchcoat.ops.compiled.call import scratch_peak_bytes
from trenchcoat.students import operator_of

LAYER = LayerSizes(heads=8, kv_heads=8, dim=64)


@dataclass(frozen=True)
class OpsSizes:
    """What is measured."""

    transfer_tokens: int = 2048
    training_lengths: tuple[int, ...] = (1024, 4096, 16384)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    flat_from: int = 1024
    repeats: int = 5


def layer_of(tokens: int, device: str, impl: str = "chunkwise") -> Layer:
    """The layer's attention on T tokens."""
    return Layer(LAYER, impl, tokens, device, dtype=torch.float32)


def quadratic_transfer(layer: Layer, y_BHTD: Tensor) -> None:
    """Loss and gradients of attention transfer by autograd."""
    y_hat, _ = layer.student(layer.q.detach(), layer.k.detach(), layer.v.detach(), scale=layer.scale)
    (1000.0 * (y_hat - y_BHTD).square().mean()).backward()


def implementations(device: str) -> tuple[str, ...]:
    """What a student of :data:`LAYER` runs on `device` by itself, then `chunkwise` if that is another one."""
    chosen = operator_of(StudentConfig(), head_dim=LAYER.dim, dtype=torch.float32, device=torch.device(device))
    return tuple(dict.fromkeys((chosen, "chunkwise")))


def _transfer(sizes: OpsSizes, device: str) -> dict[str, Any]:
    layers = {impl: layer_of(sizes.transfer_tokens, device, impl) for impl in (*implementations(device), "reference")}
    y = layers["chunkwise"].softmax().detach()
    work: dict[str, Callable[[], object]] = {impl: partial(layer.transfer, y) for impl, layer in layers.items()}
    work["quadratic"] = partial(quadratic_transfer, layers["reference"], y)
    del work["reference"]
    learned = [p for layer in layers.values() for p in layer.student.parameters()]
    return {
        "tokens": sizes.transfer_tokens,
        "seconds": seconds(work, sizes.repeats, device),
        "peak_bytes": {name: _peak(name, call, learned) for name, call in work.items()},
    }


def _peak(name: str, call: Callable[[], object], learned: list[Parameter]) -> int:
    """Bytes at the peak, with what the compiled kernels hold besides tensors."""
    if name != "compiled":
        return peak_bytes(call, learned)
    scratch_peak_bytes()
    return peak_bytes(call, learned) + scratch_peak_bytes()


def _forward(sizes: OpsSizes, device: str) -> dict[str, Any]:
    rows = {}
    for tokens in sizes.lengths:
        layers = {impl: layer_of(tokens, device, impl) for impl in implementations(device)}
        work = {impl: layer.forward for impl, layer in layers.items()}
        work["softmax"] = layers["chunkwise"].softmax_forward
        rows[str(tokens)] = seconds(work, sizes.repeats if tokens < 8192 else min(3, sizes.repeats), device)
    return rows


def _training(sizes: OpsSizes, device: str) -> dict[str, Any]:
    rows = {}
    for tokens in sizes.training_lengths:
        layers = {impl: layer_of(tokens, device, impl) for impl in implementations(device)}
        work = {impl: layer.training for impl, layer in layers.items()}
        work["softmax"] = layers["chunkwise"].softmax_training
        rows[str(tokens)] = seconds(work, sizes.repeats if tokens < 8192 else min(2, sizes.repeats), device)
    return rows


def _limits(sizes: OpsSizes, device: str) -> dict[str, Any]:
    """The machine's ceilings, and pass -> tokens -> what it has to do and the least seconds for it."""
    machine = Limits.measured(sizes.repeats, device)
    lengths = {
        "forward": sizes.lengths,
        "training": sizes.training_lengths,
        "transfer": (sizes.transfer_tokens,),
    }
    found: dict[str, Any] = {"machine": asdict(machine)}
    for name, tokens in lengths.items():
        work = {n: Work.of(LAYER, n)[name] for n in tokens}
        found[name] = {str(n): {**asdict(w), "seconds": machine.seconds(w)} for n, w in work.items()}
    return found


def speedup(row: dict[str, dict[str, float]], name: str | None = None, other: str = "softmax") -> float:
    """Speedup of `name` (by default the implementation that students choose) over `other`."""
    return row[other]["wall"] / row[name or next(iter(row))]["wall"]


def break_even(rows: dict[str, dict[str, dict[str, float]]]) -> int | None:
    """The shortest measured length from which on the student is never slower, or None."""
    found = None
    for tokens in sorted(map(int, rows), reverse=True):
        if speedup(rows[str(tokens)]) < 1.0:
            break
        found = tokens
    return found


def flatness(found: dict[str, Any]) -> float:
    """Time per token, largest over smallest, from a minimum length on."""
    rows = {int(n): next(iter(row.values()))["wall"] for n, row in found["forward"].items()}
    flat = [wall / n for n, wall in rows.items() if n >= found["flat_from"]]
    return max(flat) / min(flat)


def _at(part: str, tokens: int | None = None) -> Callable[[dict[str, Any]], float | None]:
    """The speedup over softmax in `part` at `tokens` (None: the longest), if it was measured."""

    def figure(found: dict[str, Any]) -> float | None:
        """The ratio."""
        row = found[part].get(str(tokens)) if tokens else list(found[part].values())[-1]
        return None if row is None else speedup(row)

    return figure


def _peak_ratio(found: dict[str, Any]) -> float:
    peak = found["transfer"]["peak_bytes"]
    return float(peak["quadratic"] / next(iter(peak.values())))


class OpsBenchmark(Benchmark[OpsSizes]):
    """``bench ops``."""

    implementation = None
    full = OpsSizes()
    quick = OpsSizes(transfer_tokens=256, training_lengths=(256,), lengths=(128, 256), flat_from=128, repeats=1)
    targets = (
        at_least(
            35.0, "transfer: times as fast as the quadratic reference",
            lambda found: speedup(found["transfer"]["seconds"], other="quadratic"),
        ),
        at_least(15.0, "transfer: the quadratic reference's memory over ours", _peak_ratio),
        at_least(10.0, "forward at the longest: times as fast as softmax", _at("forward")),
        at_least(8.0, "forward + backward at the longest: times as fast as softmax", _at("training")),
        at_least(0.9, "forward at 256: times as fast as softmax", _at("forward", 256)),
        at_least(1.0, "the same at 512", _at("forward", 512)),
        at_least(1.2, "the same at 1024", _at("forward", 1024)),
        at_least(2.0, "the same at 2048", _at("forward", 2048)),
        at_most(1.5, "time per token, largest over smallest", flatness),
    )  # fmt: skip

    def run(self, sizes: OpsSizes, settings: Settings) -> dict[str, Any]:
        """Transfer, forward by length, training, and the limit of each."""
        return {
            "shape": {"rows": 1, **asdict(LAYER), "dtype": "float32"},
            "limits": _limits(sizes, settings.device),
            "transfer": _transfer(sizes, settings.device),
            "forward": _forward(sizes, settings.device),
            "flat_from": sizes.flat_from,
            "training": _training(sizes, settings.device),
        }

    def table(self, record: dict[str, Any]) -> list[str]:
        """The machine, then for each pass a row for each length: milliseconds, ratios, the least milliseconds."""
        limits = record["limits"]
        transfer = {str(record["transfer"]["tokens"]): record["transfer"]["seconds"]}
        return [
            f"one layer's attention: {listed(record['shape'])}",
            f"this machine: {listed(limits['machine'])}",
            *grid("forward, tokens", _table(record["forward"], limits["forward"], "softmax")),
            *grid("forward + backward", _table(record["training"], limits["training"], "softmax")),
            *grid("transfer", _table(transfer, limits["transfer"], "quadratic")),
            f"transfer, peak bytes: {listed(record['transfer']['peak_bytes'])}",
            f"tokens from which forward is never slower than softmax: {break_even(record['forward'])}",
        ]


def _table(
    rows: dict[str, dict[str, dict[str, float]]], limits: dict[str, dict[str, float]], other: str
) -> dict[str, dict[str, Any]]:
    """Tokens -> milliseconds by implementation, times as fast as `other`, times the least time."""
    found: dict[str, dict[str, Any]] = {}
    for tokens, row in rows.items():
        cells: dict[str, Any] = {f"{name} ms": 1e3 * clock["wall"] for name, clock in row.items()}
        cells |= {f"{other} / {name}": speedup(row, name, other) for name in row if name != other}
        least = limits[tokens]["seconds"]
        found[tokens] = {**cells, "limit ms": 1e3 * least, "over it": next(iter(row.values()))["wall"] / least}
    return found

"""Cost of the operator: against the quadratic reference, against PyTorch's attention, and per token.

All for one layer's attention: one row, 8 heads of 64, feature dim 64, window 64, float32. The student's times
include its feature maps.

Shape legend: B rows (1), H heads, T tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trenchcoat.bench.benchmark import Benchmark, Settings, at_least, at_most, grid, listed
from trenchcoat.bench.layer import Layer, LayerSizes
from trenchcoat.bench.timing import peak_bytes, seconds

LAYER = LayerSizes(heads=8, kv_heads=8, dim=64)


@dataclass(frozen=True)
class OpsSizes:
    """What is measured."""

    transfer_tokens: int = 2048
    long_tokens: int = 16384
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


def _transfer(sizes: OpsSizes, device: str) -> dict[str, Any]:
    chunkwise, reference = (layer_of(sizes.transfer_tokens, device, impl) for impl in ("chunkwise", "reference"))
    y = chunkwise.softmax().detach()
    ours, theirs = partial(chunkwise.transfer, y), partial(quadratic_transfer, reference, y)
    return {
        "tokens": sizes.transfer_tokens,
        "seconds": seconds({"chunkwise": ours, "quadratic": theirs}, sizes.repeats, device),
        "peak_bytes": {
            "chunkwise": peak_bytes(ours, chunkwise.student.parameters()),
            "quadratic": peak_bytes(theirs, reference.student.parameters()),
        },
    }


def _forward(sizes: OpsSizes, device: str) -> dict[str, Any]:
    rows = {}
    for tokens in sizes.lengths:
        layer = layer_of(tokens, device)
        repeats = max(1, sizes.repeats if tokens < sizes.long_tokens else min(3, sizes.repeats))
        rows[str(tokens)] = seconds({"student": layer.forward, "softmax": layer.softmax_forward}, repeats, device)
    return rows


def _training(sizes: OpsSizes, device: str) -> dict[str, Any]:
    layer = layer_of(sizes.long_tokens, device)
    work = {"student": layer.training, "softmax": layer.softmax_training}
    return {"tokens": sizes.long_tokens, "seconds": seconds(work, min(2, sizes.repeats), device)}


def speedup(row: dict[str, dict[str, float]], name: str = "student", other: str = "softmax") -> float:
    """Speedup of `name` over `other`."""
    return row[other]["wall"] / row[name]["wall"]


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
    flat = [row["student"]["wall"] / int(n) for n, row in found["forward"].items() if int(n) >= found["flat_from"]]
    return max(flat) / min(flat)


class OpsBenchmark(Benchmark[OpsSizes]):
    """``bench ops``."""

    full = OpsSizes()
    quick = OpsSizes(transfer_tokens=256, long_tokens=512, lengths=(128, 256, 512), flat_from=128, repeats=1)
    targets = (
        at_least(
            25.0, "transfer: times as fast as the quadratic reference",
            lambda found: speedup(found["transfer"]["seconds"], "chunkwise", "quadratic"),
        ),
        at_least(
            15.0, "transfer: the quadratic reference's memory over ours",
            lambda found: found["transfer"]["peak_bytes"]["quadratic"] / found["transfer"]["peak_bytes"]["chunkwise"],
        ),
        at_least(
            5.0, "forward at the longest: times as fast as softmax",
            lambda found: speedup(found["forward"][str(found["training"]["tokens"])]),
        ),
        at_least(
            6.0, "forward + backward at the longest: times as fast as softmax",
            lambda found: speedup(found["training"]["seconds"]),
        ),
        at_most(1024, "tokens from which forward is never slower than softmax", lambda x: break_even(x["forward"])),
        at_most(1.5, "time per token, largest over smallest", flatness),
    )  # fmt: skip

    def run(self, sizes: OpsSizes, settings: Settings) -> dict[str, Any]:
        """Transfer, forward by length, training."""
        return {
            "shape": {"rows": 1, **asdict(LAYER), "dtype": "float32"},
            "transfer": _transfer(sizes, settings.device),
            "forward": _forward(sizes, settings.device),
            "flat_from": sizes.flat_from,
            "training": _training(sizes, settings.device),
        }

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each length, transfer, training."""
        forward = {
            tokens: {
                "student ms": 1e3 * row["student"]["wall"],
                "softmax ms": 1e3 * row["softmax"]["wall"],
                "speed-up": speedup(row),
                "us/token": 1e6 * row["student"]["wall"] / int(tokens),
            }
            for tokens, row in record["forward"].items()
        }
        return [
            f"one layer's attention: {listed(record['shape'])}",
            *grid("forward, tokens", forward),
            f"transfer: {listed(record['transfer'])}",
            f"forward + backward: {listed(record['training'])}",
        ]

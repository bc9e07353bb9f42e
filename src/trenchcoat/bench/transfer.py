"""Cost of an attention-transfer step: against the plain teacher forward, by depth, and against a naive implementation.

The naive implementation keeps what layer-local learning avoids: every layer's T x T maps of teacher and student and
their autograd graphs, until one backward pass at the end. It exists only here.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head dim, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trenchcoat.bench.benchmark import Benchmark, Settings, Target, at_most, grid, listed
from trenchcoat.bench.llama import SMALL_LLAMA, TimedTrainingStep, random_llama
from trenchcoat.bench.timing import peak_bytes, seconds
from trenchcoat.config import TransferConfig
from trenchcoat.models.attach import freeze_for_transfer, set_mode, students_of
from trenchcoat.ops.reference import teacher_weights, weights
from trenchcoat.ops.state import Features, HeadWeights, Rule, Tokens
from trenchcoat.students import StudentAttention, SumAttention
from trenchcoat.training.objectives import transfer_objective


class TransferStep(TimedTrainingStep):
    """A step of attention transfer, its forward pass alone, and the naive implementation."""

    def __init__(self, model: Any, tokens: int, *, rows: int = 1) -> None:
        freeze_for_transfer(model)
        cfg = TransferConfig()
        super().__init__(model, cfg, transfer_objective(cfg), rows, tokens)
        self.batch["attention_mask"] = torch.ones_like(self.batch["input_ids"])

    def teacher(self, *, head: bool = False) -> None:
        """The original model's forward pass, without the vocabulary head (which transfer skips) unless `head` is
        set."""
        set_mode(self.model, "teacher")
        with torch.no_grad():
            (self.model if head else self.model.model)(input_ids=self.batch["input_ids"], use_cache=False)

    def gradients(self) -> None:
        """Forward pass with every layer's loss and gradients."""
        set_mode(self.model, "transfer")
        self.objective(self.model, self.batch)

    def step(self) -> None:
        """A whole training step: gradients, clipping by layer, AdamW."""
        self.gradients()
        self.update()

    def naive_gradients(self) -> None:
        """The same losses and gradients by the naive implementation: all maps and graphs are kept until one backward
        pass."""
        set_mode(self.model, "transfer")
        students, kept = students_of(self.model).values(), []  # type: ignore[var-annotated]
        for student in students:
            student.transfer = partial(_naive_transfer, kept, student)  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                self.model.model(input_ids=self.batch["input_ids"], use_cache=False)
        finally:
            for student in students:
                del student.transfer
        torch.stack([loss for loss, *_ in kept]).sum().backward()

    def naive_step(self) -> None:
        """A whole naive training step."""
        self.naive_gradients()
        self.update()

    def peak(self, work: Callable[[], None]) -> int:
        """Peak live bytes of ``work`` above parameters, the students' gradients and the optimizer state."""
        self.step()
        return peak_bytes(work, self.parameters)


def small_step(layers: int, tokens: int, *, device: str = "cpu") -> TransferStep:
    """One row through a random float32 Llama with terrace students."""
    return TransferStep(random_llama(SMALL_LLAMA, layers, device, dtype=torch.float32), tokens)


@torch.enable_grad()
def _naive_transfer(
    kept: list[tuple[Tensor, ...]], student: StudentAttention, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor,
    y_BHTD: Tensor, *, scale: float, **options: Any,
) -> None:  # fmt: skip
    """Append (1000 x mean squared error, student's map [B, H, T, T], teacher's map), with their graphs, to `kept`."""
    assert isinstance(student, SumAttention) and student.mix_H is not None  # noqa: PT018
    assert student.query_map is not None and student.key_map is not None  # noqa: PT018
    tokens, rule = Tokens(q_BHTD, k_BGTD, v_BGTD), Rule(kind="terrace", window=SMALL_LLAMA.window, scale=scale)
    features = Features(student.query_map(q_BHTD), student.key_map(k_BGTD))
    student_BHTT = weights(tokens, features, HeadWeights(student.mix_H), rule)
    v_BHTD = v_BGTD.repeat_interleave(q_BHTD.shape[1] // k_BGTD.shape[1], dim=1)
    loss = 1000.0 * (student_BHTT @ v_BHTD - y_BHTD).square().mean()
    kept.append((loss, student_BHTT, teacher_weights(tokens, rule)))


@dataclass(frozen=True)
class TransferSizes:
    """What is measured."""

    depths: tuple[int, ...] = (4, 16)
    lengths: tuple[int, ...] = (1024, 4096)
    naive_length: int = 1024
    layers: int = 8
    repeats: int = 7


def _memory(sizes: TransferSizes, device: str) -> dict[str, dict[str, int]]:
    """Layers -> peak bytes of a step, and of a naive step at the smallest depth."""
    found: dict[str, dict[str, int]] = {}
    for depth in sizes.depths:
        step = small_step(depth, sizes.naive_length, device=device)
        found[str(depth)] = {"step": step.peak(step.gradients)}
        if depth == sizes.depths[0]:
            found[str(depth)]["naive"] = step.peak(step.naive_gradients)
    return found


def _times(sizes: TransferSizes, device: str) -> dict[str, dict[str, dict[str, float]]]:
    found = {}
    for length in sizes.lengths:
        step = small_step(sizes.layers, length, device=device)
        rare: dict[str, Callable[[], None]] = {"teacher_with_head": partial(step.teacher, head=True)}
        if length == sizes.naive_length:
            rare["naive"] = step.naive_step
        clocks = seconds({"teacher": step.teacher, "step": step.step}, sizes.repeats, device)
        found[str(length)] = clocks | seconds(rare, min(sizes.repeats, 3), device)
    return found


def _ratio(row: dict[str, Any], clock: str = "wall") -> float:
    return float(row["step"][clock] / row["teacher"][clock])


def _time_target(tokens: int, limit: float) -> Target:
    def figure(found: dict[str, Any]) -> float | None:
        """The ratio, if this length was measured."""
        row = found["seconds_by_tokens"].get(str(tokens))
        return None if row is None else _ratio(row)

    return at_most(limit, f"a step of {tokens} tokens over the teacher's forward", figure)


def memory_growth(found: dict[str, Any]) -> float:
    """Memory of a step of the deepest model over that of the shallowest."""
    shallow, deep = found["memory_bytes_by_layers"].values()
    return float(deep["step"] / shallow["step"])


class TransferBenchmark(Benchmark[TransferSizes]):
    """``bench transfer``."""

    implementation = None
    full = TransferSizes()
    quick = TransferSizes(depths=(2, 4), lengths=(128,), naive_length=128, layers=2, repeats=1)
    targets = (
        at_most(1.1, "memory of a step, the deepest model over the shallowest", memory_growth),
        _time_target(1024, 1.25),
        _time_target(4096, 1.1),
    )

    def run(self, sizes: TransferSizes, settings: Settings) -> dict[str, Any]:
        """Memory by depth, time by length."""
        return {
            "model": {**asdict(SMALL_LLAMA), "layers": sizes.layers, "dtype": "float32", "rows": 1},
            "memory_tokens": sizes.naive_length,
            "memory_bytes_by_layers": _memory(sizes, settings.device),
            "seconds_by_tokens": _times(sizes, settings.device),
        }

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each length, then memory and the naive implementation."""
        times = {
            tokens: {f"{name} s": clock["wall"] for name, clock in row.items()}
            | {"step/teacher": _ratio(row), "(CPU time)": _ratio(row, "processor")}
            for tokens, row in record["seconds_by_tokens"].items()
        }
        memory, tokens = record["memory_bytes_by_layers"], record["memory_tokens"]
        depth, shallow = next(iter(memory.items()))
        naive = record["seconds_by_tokens"][str(tokens)]
        return [
            f"attention-transfer step: {listed(record['model'])}",
            *grid("tokens", times),
            *grid(f"layers, T = {tokens}: peak bytes", memory),
            "the naive implementation (all graphs and T x T maps kept): "
            f"{naive['naive']['wall'] / naive['step']['wall']:.1f}x the time, "
            f"{shallow['naive'] / shallow['step']:.0f}x the memory (at {depth} layers; it grows with depth)",
        ]

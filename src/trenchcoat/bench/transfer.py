"""What an attention-transfer step costs: against the bare teacher forward, against depth, and against the naive way.

The naive way keeps what the layer-local way avoids: every layer's T x T maps of teacher and student and their autograd
graphs, until one backward pass at the end. It exists only here.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head dim, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trenchcoat.bench.clock import seconds
from trenchcoat.config import FeatureMapConfig, StudentConfig, TransferConfig
from trenchcoat.models.attach import attach_students, freeze_for_transfer, set_mode
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.runtime.runlog import environment
from trenchcoat.students import StudentAttention, SumAttention, operator_of
from trenchcoat.training.gradients import average_and_clip, clip_groups
from trenchcoat.training.objectives import Objective, transfer_objective

TARGETS: dict[str, Any] = {"memory_growth": 1.1, "time_ratio": {"1024": 1.35, "4096": 1.2}}
"""Upper limits: step memory of 16 layers over 4, and step time over the teacher's forward by length."""

_WINDOW = 64
_LLAMA: dict[str, Any] = {
    "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 1408, "vocab_size": 4096, "max_position_embeddings": 8192,
}  # fmt: skip


def _operator(device: str) -> str:
    """What the students of the measured model run on."""
    dim = _LLAMA["head_dim"]
    return operator_of(StudentConfig(), head_dim=dim, dtype=torch.float32, device=torch.device(device))


class Bench:
    """A model with students in transfer mode, rows of T random tokens, and its training step."""

    def __init__(self, model: Any, tokens: int, *, rows: int = 1) -> None:
        self.model = model
        self.parameters = freeze_for_transfer(self.model)
        cfg = TransferConfig()
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.groups = clip_groups(self.model, named, cfg.clip_scope)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=cfg.lr)
        self.clip = cfg.clip
        self.objective: Objective = transfer_objective(cfg)
        ids = torch.randint(0, model.config.vocab_size, (rows, tokens), device=self.parameters[0].device)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def teacher(self, *, head: bool = False) -> None:
        """The untouched model's forward pass, without the vocabulary head (which transfer skips) unless asked for."""
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

    def update(self) -> None:
        """Clip and step the optimizer."""
        average_and_clip(self.groups, 1, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def naive_gradients(self) -> None:
        """The same losses and gradients the naive way: all maps and graphs kept until one backward pass."""
        set_mode(self.model, "transfer")
        with _naive_transfer(self.model) as kept:
            with torch.no_grad():
                self.model.model(input_ids=self.batch["input_ids"], use_cache=False)
            torch.stack([loss for loss, *_ in kept]).sum().backward()

    def naive_step(self) -> None:
        """A whole naive training step."""
        self.naive_gradients()
        self.update()

    def peak(self, work: Callable[[], None]) -> int:
        """Peak live bytes of ``work`` above parameters, the students' gradients and the optimizer state."""
        self.step()
        work()
        with live_tensor_memory() as memory:
            work()
        self.optimizer.zero_grad(set_to_none=True)
        return memory.peak


def small_bench(layers: int, tokens: int, *, device: str = "cpu") -> Bench:
    """One row through a random float32 Llama with terrace students."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **_LLAMA)).eval().to(device)
    attach_students(model, StudentConfig(window=_WINDOW, feature_map=FeatureMapConfig(feature_dim=_LLAMA["head_dim"])))
    return Bench(model.to(device), tokens)


@contextmanager
def _naive_transfer(model: nn.Module) -> Iterator[list[tuple[Tensor, ...]]]:
    """Replace every student's transfer by one that only records its loss, its graph and both maps."""
    kept: list[tuple[Tensor, ...]] = []
    students = [module for module in model.modules() if isinstance(module, StudentAttention)]

    def replacement(student: StudentAttention) -> Callable[..., None]:
        def transfer(q: Tensor, k: Tensor, v: Tensor, y: Tensor, *, scale: float, **options: Any) -> None:
            with torch.enable_grad():
                kept.append(_naive_loss(student, q, k, v, y, scale))

        return transfer

    for student in students:
        student.transfer = replacement(student)  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        for student in students:
            del student.transfer


def _naive_loss(
    student: StudentAttention, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, y_BHTD: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(1000 x mean squared error, student's map [B, H, T, T], teacher's map), by the terrace's formula spelled out."""
    assert student.query_map is not None
    assert student.key_map is not None
    assert isinstance(student, SumAttention) and student.mix_H is not None  # noqa: PT018
    groups, tokens = q_BHTD.shape[1] // k_BGTD.shape[1], q_BHTD.shape[2]
    k_BHTD, v_BHTD = k_BGTD.repeat_interleave(groups, dim=1), v_BGTD.repeat_interleave(groups, dim=1)
    position = torch.arange(tokens, device=q_BHTD.device)
    causal_TT = position[:, None] >= position
    far_TT = position < (position[:, None] // _WINDOW - 1) * _WINDOW
    near_TT = causal_TT & ~far_TT
    score_BHTT = scale * q_BHTD @ k_BHTD.transpose(-1, -2)
    teacher_BHTT = score_BHTT.masked_fill(~causal_TT, -torch.inf).softmax(-1)
    near_score_BHTT = score_BHTT.masked_fill(~near_TT, -torch.inf)
    weight = student.mix_H.sigmoid()[:, None, None]
    near_BHTT = weight * (near_score_BHTT - near_score_BHTT.amax(-1, keepdim=True)).exp()
    features = student.query_map(q_BHTD) @ student.key_map(k_BGTD).transpose(-1, -2)
    weights_BHTT = near_BHTT + features.masked_fill(~far_TT, 0.0)
    student_BHTT = weights_BHTT / weights_BHTT.sum(-1, keepdim=True)
    loss = 1000.0 * (student_BHTT @ v_BHTD - y_BHTD).square().mean()
    return loss, student_BHTT, teacher_BHTT


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    depths: tuple[int, ...] = (4, 16)
    lengths: tuple[int, ...] = (1024, 4096)
    naive_length: int = 1024
    layers: int = 8
    repeats: int = 7


QUICK = Sizes(depths=(2, 4), lengths=(128,), naive_length=128, layers=2, repeats=1)


def _memory(sizes: Sizes, device: str) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for depth in sizes.depths:
        bench = small_bench(depth, sizes.naive_length, device=device)
        found[depth] = {"step": bench.peak(bench.gradients)}
        if depth == sizes.depths[0]:
            found[depth]["naive"] = bench.peak(bench.naive_gradients)
    return found


def _times(sizes: Sizes, device: str) -> dict[int, dict[str, float]]:
    found = {}
    for length in sizes.lengths:
        bench = small_bench(sizes.layers, length, device=device)
        work: dict[str, Callable[[], None]] = {"teacher": bench.teacher, "step": bench.step}
        clocks = seconds(work, sizes.repeats, device)
        rare: dict[str, Callable[[], None]] = {"teacher_with_head": partial(bench.teacher, head=True)}
        if length == sizes.naive_length:
            rare["naive"] = bench.naive_step
        clocks |= seconds(rare, min(sizes.repeats, 3), device)
        found[length] = {
            **{name: clock.wall for name, clock in clocks.items()},
            "ratio": clocks["step"].wall / clocks["teacher"].wall,
            "processor_ratio": clocks["step"].processor / clocks["teacher"].processor,
        }
    return found


def measure(
    *, threads: int | None = None, quick: bool = False, repeats: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Run every measurement; JSON-ready. ``quick``: small sizes, a check that it runs."""
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = QUICK if quick else Sizes()
    sizes = sizes if repeats is None else replace(sizes, repeats=repeats)
    memory, times = _memory(sizes, device), _times(sizes, device)
    shallow, deep = (memory[depth] for depth in sizes.depths)
    model = {**_LLAMA, "layers": sizes.layers, "dtype": "float32", "window": _WINDOW}
    return {
        "benchmark": "transfer",
        "model": {**model, "feature_dim": _LLAMA["head_dim"], "rows": 1},
        "memory_tokens": sizes.naive_length,
        "memory_bytes_by_layers": {str(depth): row for depth, row in memory.items()},
        "memory_growth": deep["step"] / shallow["step"],
        "naive_memory_ratio": shallow["naive"] / shallow["step"],
        "seconds_by_tokens": {str(length): row for length, row in times.items()},
        "naive_time_ratio": times[sizes.naive_length]["naive"] / times[sizes.naive_length]["step"],
        "targets": None if quick else TARGETS,
        "environment": environment(implementation=_operator(device), device=device),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    depths = list(result["memory_bytes_by_layers"])
    limits = result["targets"] or {"memory_growth": None, "time_ratio": {}}
    lines = [
        f"Attention-transfer step, {result['model']['layers']} layers, float32, "
        f"{result['environment']['threads']} threads",
        f"{'tokens':>8} {'teacher':>10} {'with head':>10} {'step':>10} {'step/teacher':>13} "
        f"{'(CPU time)':>11} {'target':>8}",
    ]
    for tokens, row in result["seconds_by_tokens"].items():
        lines.append(
            f"{tokens:>8} {row['teacher']:>9.3f}s {row['teacher_with_head']:>9.3f}s {row['step']:>9.3f}s "
            f"{row['ratio']:>12.2f}x {row['processor_ratio']:>10.2f}x {_limit(limits['time_ratio'].get(tokens))}"
        )
    steps = ", ".join(f"{d} layers {result['memory_bytes_by_layers'][d]['step'] / 2**20:.1f} MiB" for d in depths)
    lines += [
        f"memory above parameters and gradients at T = {result['memory_tokens']}: {steps}; "
        f"growth {result['memory_growth']:.3f}x {_limit(limits['memory_growth']).strip()}",
        f"the naive way (all graphs and T x T maps kept) at T = {result['memory_tokens']}: "
        f"{result['naive_time_ratio']:.1f}x the time, {result['naive_memory_ratio']:.0f}x the memory (at {depths[0]} "
        "layers; it grows with depth)",
    ]
    return "\n".join(lines)


def _limit(value: float | None) -> str:
    return f"{'':>8}" if value is None else f"{f'<= {value}x':>8}"

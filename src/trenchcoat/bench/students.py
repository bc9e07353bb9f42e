"""What each student costs in a whole model, against its softmax teacher: reading, generating, the cache, a step of each
stage.

Shape legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from trenchcoat.bench.benchmark import Benchmark, Settings, grid, listed
from trenchcoat.bench.llama import LlamaShape
from trenchcoat.bench.stage2 import KEPT, SMOLLM2, Stage2Step, random_softmax
from trenchcoat.bench.timing import seconds
from trenchcoat.bench.transfer import TransferStep
from trenchcoat.config import StudentConfig
from trenchcoat.generation.generate import Session
from trenchcoat.models.attach import attach_students, set_mode

TEACHER = "teacher"


@dataclass(frozen=True)
class StudentsSizes:
    """What is measured."""

    shape: LlamaShape = SMOLLM2
    layers: int = 30
    kept: tuple[str, ...] = KEPT
    names: tuple[str, ...] = ("terrace", "terrace_gated", "gdn", "kda", "lightning")
    context: int = 2048
    """Tokens read before others are generated."""
    generated: int = 128
    """Tokens a turn: a multiple of the window, so that every turn folds as many chunks."""
    row: int = 1024
    """Tokens of a training step."""
    repeats: int = 3

    def student(self, name: str) -> StudentConfig | None:
        """The settings of a student; None for the teacher."""
        return None if name == TEACHER else replace(self.shape.student(keep=self.kept), name=name, sinks=4)

    def model(self, name: str, device: str) -> Any:
        """A frozen model with the student; all have the same weights."""
        model, student = random_softmax(self.shape, self.layers, device), self.student(name)
        if student is not None:
            attach_students(model, student)
            set_mode(model, "student")
        return model.requires_grad_(False)


def _read(sessions: dict[str, Session], name: str, model: Any, ids: list[int]) -> None:
    """Leave a new session that has read `ids` in `sessions`."""
    sessions[name] = Session.new(model)
    sessions[name].read(ids)


def _generate(session: Session, number: int) -> None:
    """Read `number` tokens one by one, as `generate()` does."""
    for _ in range(number):
        session.read([1])


class StudentsBenchmark(Benchmark[StudentsSizes]):
    """``bench students``."""

    implementation = None
    full = StudentsSizes()
    quick = StudentsSizes(
        shape=replace(SMOLLM2, hidden=64, heads=2, kv_heads=2, dim=16, inner=96, vocab=128, window=8, columns=8),
        layers=2, kept=("0.1",), context=40, generated=8, row=48, repeats=1,
    )  # fmt: skip

    def run(self, sizes: StudentsSizes, settings: Settings) -> dict[str, Any]:
        """Seconds and bytes by student and teacher."""
        models = {name: sizes.model(name, settings.device) for name in (TEACHER, *sizes.names)}
        ids = torch.randint(0, sizes.shape.vocab, (sizes.context,), generator=torch.Generator().manual_seed(1)).tolist()
        sessions: dict[str, Session] = {}
        reading = {name: partial(_read, sessions, name, model, ids) for name, model in models.items()}
        read = seconds(reading, sizes.repeats, settings.device)
        held = {name: session.nbytes() for name, session in sessions.items()}
        generating: dict[str, Callable[[], object]] = {
            name: partial(_generate, session, sizes.generated) for name, session in sessions.items()
        }
        generated = seconds(generating, sizes.repeats, settings.device)
        del sessions
        steps = {name: TransferStep(models[name], sizes.row) for name in sizes.names}
        learning = {name: step.step for name, step in steps.items()} | {TEACHER: next(iter(steps.values())).teacher}
        learned = seconds(learning, sizes.repeats, settings.device)
        del models, steps, learning
        repairing: dict[str, Callable[[], object]] = {
            name: Stage2Step(random_softmax(sizes.shape, sizes.layers, settings.device), sizes.student(name), sizes.row)
            for name in held
        }
        repaired = seconds(repairing, max(1, sizes.repeats // 3), settings.device)
        return {
            "model": {**asdict(sizes.shape), "layers": sizes.layers, "kept": len(sizes.kept), "dtype": "float32"},
            "tokens": {"context": sizes.context, "generated": sizes.generated, "row": sizes.row},
            "by_student": {
                name: {
                    "read_seconds": read[name]["wall"],
                    "token_milliseconds": 1e3 * generated[name]["wall"] / sizes.generated,
                    "cache_bytes": held[name],
                    "stage_1_seconds": learned[name]["wall"],
                    "stage_2_seconds": repaired[name]["wall"],
                }
                for name in held
            },
        }

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each student; the teacher's steps are its forward pass and a LoRA step by the next token."""
        tokens = record["tokens"]
        head = f"{tokens['context']} tokens read, {tokens['generated']} generated, steps of {tokens['row']}"
        return [f"students: {listed(record['model'])}", *grid(head, record["by_student"])]

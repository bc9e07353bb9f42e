"""What stage 2 and selection cost, against plain training steps of the softmax model.

A step by the divergence runs the teacher forward and the student forward and backward; a plain step has no teacher.
The gates of a selection run a row forward, again layer by layer, and backward to its gates; a plain pass of training
runs it forward, and backward to the weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM

from trenchcoat.bench.benchmark import Benchmark, Settings, at_most, grid, listed
from trenchcoat.bench.llama import LlamaShape, TimedTrainingStep
from trenchcoat.bench.timing import seconds
from trenchcoat.config import LoraConfig, StudentConfig
from trenchcoat.config.settings import SelectConfig
from trenchcoat.conversion.selection.gates import gate_gradients
from trenchcoat.conversion.selection.probe import Probe, copied, observer_of
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.lora import add_lora
from trenchcoat.models.stage2 import as_teacher, freeze_for_stage_2
from trenchcoat.runtime.runlog import RunLog
from trenchcoat.training.logits import own_teacher
from trenchcoat.training.objectives import next_token_objective, stage_2_objective

SMOLLM2 = LlamaShape(hidden=576, heads=9, kv_heads=3, dim=64, inner=1536, vocab=49152, window=128, impl="auto")
KEPT = ("7.2", "8.0", "14.1", "17.1", "18.2", "20.1", "20.2", "23.0", "23.2", "24.0", "24.2", "28.0")
"""The groups that the reference run keeps of its 90."""


@dataclass(frozen=True)
class Stage2Sizes:
    """What is measured."""

    shape: LlamaShape = SMOLLM2
    layers: int = 30
    kept: tuple[str, ...] = KEPT
    tokens: int = 1024
    rows: int = 2
    """Rows of text, and as many of copies, of the selection."""
    row_tokens: int = 512
    repeats: int = 3


def random_softmax(shape: LlamaShape, layers: int, device: str) -> Any:
    """A Llama of random float32 weights, always the same."""
    torch.manual_seed(0)
    config = shape.config(layers, tie_word_embeddings=True)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


class Stage2Step(TimedTrainingStep):
    """A step of stage 2 on one row: by the divergence, or (`student` None) a plain LoRA step of the softmax model."""

    def __init__(self, model: Any, student: StudentConfig | None, tokens: int) -> None:
        cfg = LoraConfig(loss="ce" if student is None else "kl")
        if student is not None:
            attach_students(model, student)
            set_mode(model, "student")
        add_lora(model, cfg)
        freeze_for_stage_2(model, cfg)
        objective = next_token_objective() if student is None else stage_2_objective(cfg, own_teacher(as_teacher))
        super().__init__(model, cfg, objective, 1, tokens)

    def __call__(self) -> None:
        """One step."""
        self.objective(self.model, self.batch)
        self.update()


def _passes(sizes: Stage2Sizes, device: str, log: RunLog) -> dict[str, Callable[[], object]]:
    """The gradients of a selection's gates, and as many plain passes."""
    cfg = SelectConfig(rows=sizes.rows, seq_len=sizes.row_tokens)
    model = random_softmax(sizes.shape, sizes.layers, device)
    text = torch.randint(0, sizes.shape.vocab, (sizes.rows, sizes.row_tokens))
    near = StudentConfig(name="window_sinks", window=sizes.shape.window, sinks=4)
    probe = Probe(
        model=model, observe=observer_of(model), near=near, whole=(), text_NT=text, copy_NT=copied(text), cfg=cfg,
        seed=0, log=log,
    )  # fmt: skip
    own, batch = random_softmax(sizes.shape, sizes.layers, device), text[:1].to(device)

    def plain() -> None:
        """A forward and a backward pass for each that the gates have."""
        for _ in range(2 * sizes.rows * len(cfg.gates)):
            own(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            own.zero_grad(set_to_none=True)

    return {"gates": partial(gate_gradients, probe), "plain": plain}


def _ratio(found: dict[str, Any], part: str, ours: str) -> float:
    return float(found[part][ours]["wall"] / found[part]["plain"]["wall"])


class Stage2Benchmark(Benchmark[Stage2Sizes]):
    """``bench stage2``."""

    implementation = None
    full = Stage2Sizes()
    quick = Stage2Sizes(
        shape=replace(SMOLLM2, hidden=64, heads=2, kv_heads=2, dim=16, inner=96, vocab=128, window=16, columns=16),
        layers=2, kept=("0.1",), tokens=96, rows=1, row_tokens=64, repeats=1,
    )  # fmt: skip
    targets = (
        at_most(1.5, "a step by the divergence over a plain LoRA step", partial(_ratio, part="steps", ours="kl")),
        at_most(1.1, "gates over as many plain passes", partial(_ratio, part="selection", ours="gates")),
    )

    def run(self, sizes: Stage2Sizes, settings: Settings) -> dict[str, Any]:
        """Time of both steps, and of a selection and its plain passes."""
        students = {"plain": None, "kl": sizes.shape.student(keep=sizes.kept)}
        steps = {
            name: Stage2Step(random_softmax(sizes.shape, sizes.layers, settings.device), student, sizes.tokens)
            for name, student in students.items()
        }
        timed = seconds(steps, sizes.repeats, settings.device)
        del steps
        with tempfile.TemporaryDirectory() as folder, RunLog(folder, progress="off") as log:
            passes = _passes(sizes, settings.device, log)
            selection = seconds(passes, max(1, sizes.repeats // 3), settings.device)
        return {
            "model": {**asdict(sizes.shape), "layers": sizes.layers, "kept": len(sizes.kept), "dtype": "float32"},
            "tokens": {"steps": sizes.tokens, "selection": sizes.row_tokens},
            "steps": timed,
            "selection": selection,
        }

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each comparison."""
        rows = {
            part: {f"{name} s": clock["wall"] for name, clock in record[part].items()}
            | {"ratio": _ratio(record, part, ours)}
            for part, ours in (("steps", "kl"), ("selection", "gates"))
        }
        return [
            f"stage 2 and selection: {listed(record['model'])}",
            *[line for part, row in rows.items() for line in grid(f"{part}, T = {record['tokens'][part]}", {"": row})],
        ]

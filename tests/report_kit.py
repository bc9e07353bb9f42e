"""Synthetic results with known differences, for the tests of the report."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trenchcoat.evaluation.results import CacheSize, DecodePoint, LengthScores, Results, Sample, Scores, StageFacts
from trenchcoat.evaluation.rows import REPORT_ROWS
from trenchcoat.evaluation.statistics import Estimate, RowSums, mean_estimate
from trenchcoat.evaluation.task_results import ModelScore, ProbeRecord, TaskRecord, TaskResults

TEXT_ROWS, LENGTH, WINDOW = 16, 512, 32
GOOD: dict[str, tuple[float, float]] = {
    "teacher": (0.0, 0.0),
    "teacher_lora": (-0.1, -0.1),
    "window_sinks": (0.0, 0.30),
    "kept_window_sinks": (0.0, 0.10),
    "untrained_swap": (0.0, 2.3),
    "transfer_only": (0.0, 0.08),
    "transfer_lora": (0.0, 0.02),
    "constant": (0.0, 0.20),
    "far_off": (0.0, 0.21),
    "lora_only": (0.0, 0.25),
    "window_sinks_lora": (0.0, 0.09),
}
"""Row -> mean loss above the teacher's, below and past 2W."""
COPY = 10.0
"""Loss above the teacher's on copied text, as a multiple of that past 2W."""
LONGER, LONGER_ROWS = 4, 6


def made_scores(near: float, far: float, recall: float, seed: int) -> Scores:
    """Scores with text noise shared by all rows of the table, and a little noise of their own."""
    text, own = random.Random(5), random.Random(seed)
    queries = LENGTH - 1
    by_row: list[list[float]] = []
    for _ in range(TEXT_ROWS):
        hard = text.gauss(0, 0.3)
        base = [1.6 + 3.5 / (1 + n) ** 0.6 + hard + text.gauss(0, 0.4) for n in range(queries)]
        extra = own.gauss(0, 0.005)
        by_row.append([b + (near if n < 2 * WINDOW else far) + own.gauss(0, 0.02) + extra for n, b in enumerate(base)])
    probes = [20 + text.randrange(20) for _ in range(TEXT_ROWS)]
    copies = LengthScores(*(RowSums([], []) for _ in range(2)), *_made_copies(far, text, own))
    longer = LengthScores(
        _sums([row[2 * WINDOW :] for row in by_row[:LONGER_ROWS]]),
        _sums([row[: 2 * WINDOW] for row in by_row[:LONGER_ROWS]]),
        *_made_copies(far, text, own),
    )
    return Scores(
        window=WINDOW,
        seq_len=LENGTH,
        all=_sums(by_row),
        far=_sums([row[2 * WINDOW :] for row in by_row]),
        near=_sums([row[: 2 * WINDOW] for row in by_row]),
        copy=copies.copy,
        copy_hits=copies.copy_hits,
        random_hits=copies.copy_hits,
        longer={LONGER: longer},
        recall=RowSums([(4 - 2 * recall) * p for p in probes], probes),
        recall_hits=RowSums(
            [float(round(p * min(1.0, max(0.0, recall + own.gauss(0, 0.03))))) for p in probes], probes
        ),
        position_loss=[sum(column) / TEXT_ROWS for column in zip(*by_row, strict=True)],
        position_count=[TEXT_ROWS] * queries,
    )


def _sums(rows: list[list[float]]) -> RowSums:
    return RowSums([sum(row) for row in rows], [len(row) for row in rows])


def _made_copies(far: float, text: random.Random, own: random.Random) -> tuple[RowSums, RowSums]:
    losses = [[0.1 + text.uniform(0, 0.02) + COPY * far + own.gauss(0, 0.005)] * 256 for _ in range(4)]
    return _sums(losses), RowSums([float(round(256 * math.exp(-COPY * far)))] * 4, [256] * 4)


def made_results(offsets: Mapping[str, tuple[float, float]] | None = None, **changes: tuple[float, float]) -> Results:
    """Results in which every answer is yes; ``changes`` override rows: row=(below, past 2W), loss above the teacher."""
    rows = {**(GOOD if offsets is None else offsets), **changes}
    made = {
        name: made_scores(near, far, 0.6 * math.exp(-6 * far), list(REPORT_ROWS).index(name))
        for name, (near, far) in rows.items()
    }
    return Results(
        window=WINDOW,
        seq_len=LENGTH,
        rows={name: replace(scores, cache=TEACHER_CACHE if "teacher" in name else CACHE)
              for name, scores in made.items()},
        model={"groups": 90, "kept groups": 12},
        decode={
            "teacher": [DecodePoint(n, 2 + n / 900, (1.9 + n / 900, 2.2 + n / 900), n / 20, 4096 * n) for n in LENGTHS],
            "student": [DecodePoint(n, 2.6, (2.5, 2.8), n / 15, 400_000, 2.7) for n in LENGTHS],
        },
        samples=[Sample("def fold(a):\n    ```", {"teacher": "return a | 1", "transfer_lora": "return a"})],
        stages=[StageFacts("transfer", 200, 1_638_400, 75.0, 3.21), StageFacts("lora", 100, 819_200, 62.5)],
        recipe={"model": {"path": "made-up"}, "student": {"name": "terrace"}, "transfer": {"lr": 0.01},
                "lora": {"lr": 1e-4}, "eval": {"sinks": 4, "decode_lengths": [128, 256]}},
        environment={"packages": {"torch": "2.13.0"}, "threads": 1},
        data={"path": "nowhere", "train/rows": 200},
        implementation="chunkwise",
        seconds=281.0,
        notes=["A remark."],
    )  # fmt: skip


TEACHER_CACHE, CACHE = CacheSize(0, 23_040), CacheSize(400_000, 3072)
LENGTHS = (128, 256, 512, 1024, 2048)


def made_metrics(layers: int = 4, steps: int = 100) -> list[dict[str, Any]]:
    """Metric lines in the format of the training loop."""
    noise = random.Random(0)
    lines: list[dict[str, Any]] = [{"kind": "info", "text": "begin"}]
    for step in range(steps + 1):
        curve = {f"layer_{i:02d}": (1 + i) * (0.05 + math.exp(-step / 20)) for i in range(layers)}
        if step:
            train = {f"loss/{name}": y * noise.uniform(0.8, 1.2) for name, y in curve.items()}
            lines.append({"kind": "train", "stage": "transfer", "step": step, "loss": 1.0, **train})
        if step % 20 == 0:
            held_out = {f"loss/{name}": y for name, y in curve.items()}
            held_out |= {f"relative/{name}": y / 3 for name, y in curve.items()}
            lines.append({"kind": "eval", "stage": "transfer", "step": step, "loss": 1.0, **held_out})
    for stage, start, end in (("lora", 2.2, 2.05), ("lora_only", 4.0, 2.4), ("window_sinks_lora", 2.4, 2.2)):
        for step in range(steps + 1):
            loss = end + (start - end) * math.exp(-step / 15)
            if step:
                lines.append({"kind": "train", "stage": stage, "step": step, "loss": loss + noise.gauss(0, 0.1)})
            if step % 20 == 0:
                lines.append({"kind": "eval", "stage": stage, "step": step, "loss": loss})
    return [*lines, {"kind": "result", "stage": "lora", "step": steps}]


def made_tasks(share: float, rows_id: str = "same", seed: int = 0) -> TaskResults:
    """200 rows whose difficulty is shared by all models; a share of ``share`` is right."""
    text, own = random.Random(1), random.Random(seed)
    rows = [float(text.random() + 0.05 * own.random() < share) for _ in range(200)]
    score = ModelScore({"acc": mean_estimate(rows)}, {"acc": rows})
    teacher = ModelScore({"acc": Estimate(0.9, 0.02)})
    return TaskResults(
        "made-up",
        tasks={"piqa": TaskRecord("piqa", "piqa", 200, rows_id, scores={"student": score, "teacher": teacher})},
        probes={
            "needle": ProbeRecord(
                "needle", [64, 128], [0.0, 1.0], 64,
                shares={"student": [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 0.0], [1.0, 1.0]]],
                        "far_off": [[[0.0], [0.0]]] * 2},
            )
        },
    )  # fmt: skip

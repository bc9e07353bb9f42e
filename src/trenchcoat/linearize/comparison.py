"""The rows of the report: each variant of the model, trained where it must be, scored on the same text.

Every row is kept in the run's folder under the settings behind it, so a second call scores only what is new.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trenchcoat.config import Recipe
from trenchcoat.data.batches import Batches
from trenchcoat.evaluation import results
from trenchcoat.evaluation.results import DecodePoint, Results, Sample, Scores, StageFacts
from trenchcoat.evaluation.scoring import EvalRows, decode_curve, gather_rows, score
from trenchcoat.generation.generate import generate_text
from trenchcoat.linearize.variants import ModelVariants
from trenchcoat.models.attach import set_far
from trenchcoat.runtime import distributed
from trenchcoat.runtime.runfolder import LORA, LORA_ONLY, TRANSFER, WINDOW_SINKS_LORA, flatten, stage_settings
from trenchcoat.runtime.runlog import environment
from trenchcoat.students import student_class

SAMPLES = 3
"""Prompts continued by both models."""
SAMPLE_TOKENS = 48
"""Length of those continuations."""
LONGEST_PROMPT = 160
"""Most tokens of a sample's prompt; three windows, when that is less."""


@dataclass(frozen=True)
class Row:
    """How the model behind one row of the table is put together."""

    name: str
    weights: str | None = None
    """The stage whose weights it has; None for untrained students."""
    teacher: bool = False
    """Score the teacher's own attention."""
    window_sinks: bool = False
    """The student is the window with sinks, without a far part."""
    far: bool = True
    """False switches the far part off."""

    @property
    def lora(self) -> bool:
        """Whether its stage has a LoRA."""
        return self.weights not in (None, TRANSFER)


def final_row(recipe: Recipe) -> Row:
    """The model that the recipe is for: the last stage that it trains."""
    if recipe.lora is not None:
        stage, name = (LORA, results.TRANSFER_LORA) if recipe.transfer else (LORA_ONLY, results.LORA_ONLY)
        return Row(name, stage)
    return Row(results.TRANSFER_ONLY, TRANSFER) if recipe.transfer else Row(results.UNTRAINED)


def rows_of(recipe: Recipe) -> list[Row]:
    """The rows that a recipe asks for, in the order they are made: the recipe's own first."""
    final = final_row(recipe)
    student = student_class(recipe.student.name)
    rows = [Row(results.TEACHER, teacher=True), Row(results.UNTRAINED)]
    if recipe.transfer is not None:
        rows.append(Row(results.TRANSFER_ONLY, TRANSFER))
    rows.append(final)
    if student.has_far and student.kind != "linear":  # without its far part, a linear student has nothing
        rows.append(Row(results.FAR_OFF, final.weights, far=False))
    rows.append(Row(results.WINDOW_SINKS, window_sinks=True))
    if recipe.lora is not None and recipe.eval.baselines:
        rows.append(Row(results.LORA_ONLY, LORA_ONLY))
        rows.append(Row(results.WINDOW_SINKS_LORA, WINDOW_SINKS_LORA, window_sinks=True))
    return list({row.name: row for row in rows}.values())


def stages_of(recipe: Recipe) -> list[str]:
    """The training stages behind the recipe's rows, in order."""
    return list(dict.fromkeys(row.weights for row in rows_of(recipe) if row.weights is not None))


def evaluation_rows(batches: Batches, rows: int) -> EvalRows:
    """``rows`` validation rows, evenly spread: neighbours are often of one document, and tell less together."""
    found = gather_rows(list(batches.validation()))
    available = len(found.ids)
    chosen = torch.arange(min(rows, available)) * available // min(rows, available)
    return EvalRows(found.ids[chosen], found.real[chosen], found.counted[chosen])


class Comparison:
    """Scores, decoding curves and samples of one run, made or read back."""

    def __init__(self, variants: ModelVariants) -> None:
        self.variants, self.recipe = variants, variants.recipe
        self._rows: EvalRows | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of an evaluation row."""
        return self.recipe.eval.seq_len or self.recipe.data.seq_len

    def text(self) -> EvalRows:
        """The evaluation rows, read once."""
        if self._rows is None:
            batches = self.variants.batches(self.recipe.eval.batch_size, self.seq_len)
            self._rows = evaluation_rows(batches, self.recipe.eval.rows)
        return self._rows

    def assemble(self, row: Row) -> Any:
        """The model of a row, ready to be scored."""
        if row.teacher:
            return self.variants.assemble_teacher()
        student = self.variants.window_sinks() if row.window_sinks else None
        model = self.variants.assemble(student=student, lora=row.lora, weights=row.weights)
        set_far(model, row.far)
        return model

    def _key(self, row: Row, **more: Any) -> dict[str, Any]:
        """Everything in the recipe that the figures of a row depend on."""
        everything = flatten(self.recipe)
        base = {k: v for k, v in everything.items() if k.split(".")[0] in ("model", "student", "data")}
        stage = stage_settings(self.recipe, row.weights) if row.weights is not None else {}
        text = {k: everything[k] for k in ("eval.rows", "eval.seq_len", "eval.sinks", "run.seed")}
        free = ("model.device", "data.cache_dir")
        return {k: v for k, v in {**base, **stage, **text, **more, "far": row.far}.items() if k not in free}

    def _kept(self, name: str, key: Mapping[str, Any]) -> Results | None:
        path = distributed.from_main(lambda: self.variants.folder.kept(name, key))
        return None if path is None else Results.load(path)

    def _keep(self, name: str, key: Mapping[str, Any], **found: Any) -> None:
        part = Results(self.recipe.student.window, self.seq_len, **found)

        def keep() -> None:
            part.save(self.variants.folder.evaluation_path(name))
            self.variants.folder.keep(name, key)

        distributed.from_main(keep)

    def scores(self, row: Row) -> Scores:
        """Scores of one row."""
        key = self._key(row)
        kept = self._kept(row.name, key)
        if kept is not None:
            return kept.rows[row.name]
        text = self.text()
        found = score(
            self.assemble(row), text, window=self.recipe.student.window, batch_size=self.recipe.eval.batch_size
        )
        self._keep(row.name, key, rows={row.name: found})
        return found

    def decode(self, row: Row, mode: str) -> list[DecodePoint]:
        """Decoding time and state size of one row, at the recipe's context lengths."""
        lengths = self.recipe.eval.decode_lengths
        if not lengths:
            return []
        name, key = f"decode_{mode}", self._key(row, lengths=list(lengths))
        kept = self._kept(name, key)
        if kept is not None:
            return kept.decode[mode]
        points = decode_curve(self.assemble(row), lengths)
        self._keep(name, key, decode={mode: points})
        return points

    def samples(self, rows: list[Row]) -> list[Sample]:
        """Continuations of the same prompts by the models of ``rows``."""
        key = self._key(rows[-1], rows=[row.name for row in rows], tokens=SAMPLE_TOKENS)
        kept = self._kept("samples", key)
        if kept is not None:
            return kept.samples
        prompts = self._prompts()
        written: dict[str, list[str]] = {}
        for row in rows:
            made = generate_text(self.assemble(row), self.variants.tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS)
            written[row.name] = [one.text for one in made]
        found = [Sample(p, {name: texts[i] for name, texts in written.items()}) for i, p in enumerate(prompts)]
        self._keep("samples", key, samples=found)
        return found

    def _prompts(self) -> list[str]:
        text = self.text()
        length = min(LONGEST_PROMPT, 3 * self.recipe.student.window, text.ids.shape[1] // 2)
        rows = text.ids[: 4 * SAMPLES, :length].tolist()
        prompts = [self.variants.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [prompt for prompt in prompts if prompt.strip()][:SAMPLES]

    def facts(self) -> dict[str, Any]:
        """Where the text came from and how much of it there is."""
        key = self._key(Row("facts"))
        kept = self._kept("facts", key)
        if kept is not None:
            return kept.data
        batches = self.variants.batches(self.recipe.eval.batch_size, self.seq_len)
        text = self.text()
        data = {
            "source": self.recipe.data.path,
            **batches.counts,
            "rows scored": len(text.ids),
            "tokens scored": int(text.counted.sum()),
        }
        self._keep("facts", key, data=data)
        return data

    def results(self, scores: dict[str, Scores], stages: list[StageFacts], began: float) -> Results:
        """Everything together, for the report."""
        recipe, final = self.recipe, final_row(self.recipe)
        teacher = Row(results.TEACHER, teacher=True)
        curves = {"teacher": self.decode(teacher, "teacher"), "student": self.decode(final, "student")}
        parts = sum(stage.seconds for stage in stages) + sum(one.seconds for one in scores.values())
        return Results(
            window=recipe.student.window,
            seq_len=self.seq_len,
            rows=scores,
            decode={mode: points for mode, points in curves.items() if points},
            samples=self.samples([teacher, final]),
            stages=stages,
            recipe=dataclasses.asdict(recipe),
            environment=environment(),
            data=self.facts(),
            implementation=self.variants.implementation,
            seconds=max(parts, time.monotonic() - began),
        )

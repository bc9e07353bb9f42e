"""The rows of the report: each variant of the model, trained if needed and scored on the same text; and a time
estimate.

Every row is cached in the run's folder, keyed by the settings it depends on, so a second call scores only new rows.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trenchcoat.config import LoraConfig, Recipe, StageConfig
from trenchcoat.data.batches import Batches
from trenchcoat.evaluation.results import DecodePoint, Results, Sample, Scores, StageFacts
from trenchcoat.evaluation.rows import TEACHER, Variant, asked_rows, final_row
from trenchcoat.evaluation.scoring import EvalRows, decode_curve, gather_rows, score
from trenchcoat.generation.generate import Sampling, generate_text
from trenchcoat.linearize.variants import ModelVariants
from trenchcoat.models.attach import set_far
from trenchcoat.runtime import distributed
from trenchcoat.runtime.runfolder import TRANSFER, flatten, stage_settings
from trenchcoat.runtime.runlog import environment
from trenchcoat.runtime.sharding import compute_device

SAMPLES = 3
"""Prompts continued by both models."""
SAMPLE_TOKENS = 48
"""Length of those continuations."""
LONGEST_PROMPT = 160
"""Maximum tokens of a sample's prompt (or three windows, if that is less)."""
TRANSFER_COST, LORA_COST, SCORING_COST = 1.6, 3.5, 1.2
"""Time per token of a training step (without the teacher's pass of a divergence) and of scoring, in teacher forward
passes; measured on the demo, on two cores."""


def stages_of(recipe: Recipe) -> list[str]:
    """The training stages behind the recipe's rows, in order."""
    stages = (variant.stage for variant in asked_rows(recipe).values())
    return list(dict.fromkeys(stage for stage in stages if stage is not None))


def evaluation_rows(batches: Batches, rows: int) -> EvalRows:
    """``rows`` validation rows, evenly spread: neighbouring rows often come from the same document."""
    found = gather_rows(list(batches.validation()))
    available = len(found.ids)
    chosen = torch.arange(min(rows, available)) * available // min(rows, available)
    return EvalRows(found.ids[chosen], found.real[chosen], found.counted[chosen])


class Comparison:
    """Scores, decoding curves and samples of one run, computed or read from the cache."""

    def __init__(self, variants: ModelVariants) -> None:
        self.variants, self.recipe = variants, variants.recipe
        self.rows = asked_rows(self.recipe)
        self._text: EvalRows | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of an evaluation row."""
        return self.recipe.eval.seq_len or self.recipe.data.seq_len

    def text(self) -> EvalRows:
        """The evaluation rows, read once."""
        if self._text is None:
            batches = self.variants.batches(self.recipe.eval.batch_size, self.seq_len)
            self._text = evaluation_rows(batches, self.recipe.eval.rows)
        return self._text

    def assemble(self, row: str) -> Any:
        """The model of a row, ready to be scored."""
        variant = self.rows[row]
        if variant.teacher:
            return self.variants.assemble_teacher()
        model = self.variants.assemble(student=variant.student, lora=variant.lora, weights=variant.stage)
        set_far(model, variant.far)
        return model

    def _key(self, variant: Variant, **more: Any) -> dict[str, Any]:
        """All recipe settings that the figures of a variant depend on."""
        everything = flatten(self.recipe)
        base = {k: v for k, v in everything.items() if k.split(".")[0] in ("model", "student", "data")}
        stage = stage_settings(self.recipe, variant.stage) if variant.stage is not None else {}
        text = {k: everything[k] for k in ("eval.rows", "eval.seq_len", "eval.sinks", "run.seed")}
        other = {} if variant.student is None else flatten(variant.student, "other_student")
        parts = {**base, **stage, **text, **other, **more, "far": variant.far}
        return {k: v for k, v in parts.items() if k not in ("model.device", "data.cache_dir")}

    def _once(self, name: str, key: Mapping[str, Any], part: str, make: Callable[[], Any]) -> Any:
        """``part`` of the results cached under ``name``; computed and cached if the settings ``key`` have changed."""
        folder = self.variants.folder
        path = distributed.from_main(lambda: folder.kept(name, key))
        if path is not None:
            return getattr(Results.load(path), part)
        found = make()

        def keep() -> None:
            """Write the file, then its key."""
            Results(self.recipe.student.window, self.seq_len, **{part: found}).save(folder.evaluation_path(name))
            folder.keep(name, key)

        distributed.from_main(keep)
        return found

    def scores(self, row: str) -> Scores:
        """Scores of one row."""

        def make() -> dict[str, Scores]:
            """Score it."""
            text = self.text()  # before the model is assembled: reading may remove students and LoRA from it
            recipe = self.recipe
            model = self.assemble(row)
            return {row: score(model, text, window=recipe.student.window, batch_size=recipe.eval.batch_size)}

        found: Scores = self._once(row, self._key(self.rows[row]), "rows", make)[row]
        return found

    def decode(self, row: str, mode: str) -> list[DecodePoint]:
        """Decoding time and state size of one row, at the recipe's context lengths."""
        lengths = self.recipe.eval.decode_lengths
        if not lengths:
            return []
        key = self._key(self.rows[row], lengths=list(lengths))
        curves = self._once(f"decode_{mode}", key, "decode", lambda: {mode: decode_curve(self.assemble(row), lengths)})
        return list(curves[mode])

    def samples(self, rows: list[str]) -> list[Sample]:
        """Continuations of the same prompts by the models of ``rows``."""
        key = self._key(self.rows[rows[-1]], rows=rows, tokens=SAMPLE_TOKENS)
        return list(self._once("samples", key, "samples", lambda: self._samples(rows)))

    def _samples(self, rows: list[str]) -> list[Sample]:
        prompts = self._prompts()
        written: dict[str, list[str]] = {}
        for row in rows:
            sampling = Sampling(max_new_tokens=SAMPLE_TOKENS)
            made = generate_text(self.assemble(row), self.variants.tokenizer, prompts, sampling)
            written[row] = [one.text for one in made]
        return [Sample(p, {name: texts[i] for name, texts in written.items()}) for i, p in enumerate(prompts)]

    def _prompts(self) -> list[str]:
        text = self.text()
        length = min(LONGEST_PROMPT, 3 * self.recipe.student.window, text.ids.shape[1] // 2)
        rows = text.ids[: 4 * SAMPLES, :length].tolist()
        prompts = [self.variants.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [prompt for prompt in prompts if prompt.strip()][:SAMPLES]

    def facts(self) -> dict[str, Any]:
        """Source and size of the text."""
        return dict(self._once("facts", self._key(Variant()), "data", self._facts))

    def _facts(self) -> dict[str, Any]:
        batches = self.variants.batches(self.recipe.eval.batch_size, self.seq_len)
        text = self.text()
        return {
            "source": self.recipe.data.path,
            **batches.counts,
            "rows scored": len(text.ids),
            "tokens scored": int(text.counted.sum()),
        }

    def results(self, scores: dict[str, Scores], stages: list[StageFacts], began: float) -> Results:
        """All results, for the report."""
        recipe, final = self.recipe, final_row(self.recipe)
        curves = {"teacher": self.decode(TEACHER, "teacher"), "student": self.decode(final, "student")}
        parts = sum(stage.seconds for stage in stages) + sum(one.seconds for one in scores.values())
        return Results(
            window=recipe.student.window,
            seq_len=self.seq_len,
            rows=scores,
            decode={mode: points for mode, points in curves.items() if points},
            samples=self.samples([TEACHER, final]),
            stages=stages,
            recipe=dataclasses.asdict(recipe),
            environment=environment(),
            data=self.facts(),
            implementation=self.variants.implementation,
            seconds=max(parts, time.monotonic() - began),
        )


def stage_tokens(cfg: StageConfig, batches: Batches, seq_len: int) -> tuple[int, int]:
    """(tokens trained, tokens evaluated) by a whole stage."""
    micro = cfg.max_steps * cfg.accumulation if cfg.max_steps is not None else math.ceil(cfg.epochs * len(batches))
    evaluations = 1 + math.ceil(micro / cfg.accumulation / cfg.eval_every)
    rows = batches.rows("validation")
    if cfg.eval_batches is not None:
        rows = min(rows, cfg.eval_batches * cfg.batch_size)
    return micro * cfg.batch_size * seq_len, evaluations * rows * seq_len


def seconds_per_token(variants: ModelVariants, batches: Batches, repeats: int = 2) -> float:
    """Time per token of a teacher forward pass; the fastest of ``repeats`` after a warm-up pass."""
    model = variants.assemble_teacher()
    device = compute_device(model)
    ids = batches.train_batch(0)["input_ids"].to(device)
    times = []
    with torch.no_grad():
        for _ in range(1 + repeats):
            began = time.perf_counter()
            logits = model(input_ids=ids, use_cache=False).logits
            float(logits[0, -1, 0])  # waits for the device
            times.append(time.perf_counter() - began)
    return distributed.largest(min(times[1:])) / ids.numel() / distributed.size()


def estimate_seconds(variants: ModelVariants, stages: list[str], rows: int) -> float:
    """Rough time for the unfinished ``stages`` and for scoring ``rows`` rows of the table, extrapolated from a timed
    forward pass of the teacher."""
    recipe = variants.recipe
    left = [stage for stage in stages if variants.folder.result(stage) is None]
    total, unit = 0.0, 0.0
    for stage in left:
        cfg = recipe.transfer if stage == TRANSFER else recipe.lora
        if cfg is None:
            continue
        seq_len = recipe.row_tokens(cfg)
        batches = variants.batches(cfg.batch_size, seq_len)
        unit = unit or seconds_per_token(variants, batches)
        trained, evaluated = stage_tokens(cfg, batches, seq_len)
        cost = LORA_COST + cfg.teacher_pass if isinstance(cfg, LoraConfig) else TRANSFER_COST
        total += unit * (trained * cost + evaluated * 1.5)
    return total + unit * SCORING_COST * rows * recipe.eval.rows * (recipe.eval.seq_len or recipe.data.seq_len)

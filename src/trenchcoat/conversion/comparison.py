"""The rows of the report: each variant of the model, trained if needed and scored on the same text; and a time
estimate.

Every row is cached in the run's folder, keyed by the settings and the weights it depends on, so a second call scores
only new rows.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch

from trenchcoat.config import LoraConfig, Recipe, StageConfig
from trenchcoat.config.keep import kept_total
from trenchcoat.config.paths import absolute_if_here
from trenchcoat.config.settings import PATHS
from trenchcoat.conversion.held_out import HeldOut, evaluation_length, read_held_out, score_held_out
from trenchcoat.conversion.variants import BASE_WEIGHTS, ModelVariants
from trenchcoat.data.batches import Batches
from trenchcoat.evaluation.results import DecodePoint, Results, Sample, Scores, StageFacts
from trenchcoat.evaluation.rows import TEACHER, Variant, asked_rows, final_row
from trenchcoat.evaluation.scoring import decode_curve
from trenchcoat.generation.generate import Sampling, generate_text
from trenchcoat.models.attach import set_far
from trenchcoat.models.loading import base_content
from trenchcoat.models.shapes import shapes_of
from trenchcoat.runtime import distributed
from trenchcoat.runtime.runfolder import BEFORE, flatten, stage_settings
from trenchcoat.runtime.runlog import environment
from trenchcoat.runtime.sharding import compute_device

SAMPLES = 3
"""Prompts continued by both models."""
SAMPLE_TOKENS = 48
"""Length of those continuations."""
LONGEST_PROMPT = 160
"""Maximum tokens of a sample's prompt (or three windows, if that is less)."""
EVALUATION_SETTINGS = (
    "eval.rows", "eval.seq_len", "eval.length_factors", "eval.copy_rows", "eval.sinks", "run.seed",
)  # fmt: skip
"""Settings that scores depend on, beside those of the model and its stage."""
TRANSFER_COST, LORA_COST, SCORING_COST = 1.6, 3.5, 1.2
"""Time per token of a training step (without the teacher's pass of a divergence) and of scoring, in teacher forward
passes; measured on the demo, on two cores."""


def stages_of(recipe: Recipe) -> list[str]:
    """The training stages behind the recipe's rows, in order."""
    return list(dict.fromkeys(stage for row in asked_rows(recipe).values() for stage in stages_behind(row, recipe)))


def stages_behind(variant: Variant, recipe: Recipe) -> list[str]:
    """The stages that train a variant, in order."""
    if variant.stage is None:
        return []
    before = BEFORE.get(variant.stage) if recipe.transfer is not None else None
    return [variant.stage] if before is None else [before, variant.stage]


class Comparison:
    """Scores, decoding curves and samples of one run, computed or read from the cache."""

    def __init__(self, variants: ModelVariants) -> None:
        self.variants, self.recipe = variants, variants.recipe
        self.rows = asked_rows(self.recipe)
        self.seq_len = evaluation_length(self.recipe)
        """Tokens of an evaluation row."""

    @cached_property
    def held_out(self) -> HeldOut:
        """What every model reads, read once."""
        return read_held_out(self.variants)

    def assemble(self, row: str) -> Any:
        """The model of a row, ready to be scored."""
        variant = self.rows[row]
        if variant.stage is not None:
            self.variants.require_base(variant.stage)
        if variant.teacher:
            return self.variants.assemble_teacher(lora=variant.lora, weights=variant.stage)
        model = self.variants.assemble(student=variant.student, lora=variant.lora, weights=variant.stage)
        set_far(model, variant.far)
        return model

    def _key(self, variant: Variant, **more: Any) -> dict[str, Any]:
        """All recipe settings that the figures of a variant depend on."""
        everything = flatten(self.recipe)
        everything |= {
            name: absolute_if_here(everything[name])
            for name, kind in PATHS.items()
            if kind == "source" and everything.get(name) is not None
        }
        base = {k: v for k, v in everything.items() if k.split(".")[0] in ("model", "student", "data")}
        stage = stage_settings(self.recipe, variant.stage) if variant.stage is not None else {}
        text = {k: everything[k] for k in EVALUATION_SETTINGS}
        other = {} if variant.student is None else flatten(variant.student, "other_student")
        made_from = {BASE_WEIGHTS: self._base, "stage weights": self._learned(variant.stage)}
        parts = {**base, **stage, **text, **other, **more, **made_from, "far": variant.far}
        return {k: v for k, v in parts.items() if k not in ("model.device", "data.cache_dir")}

    @cached_property
    def _base(self) -> str:
        """Checksum of the base model's files, which scores belong to."""
        return distributed.from_main(lambda: base_content(self.recipe.model))

    def _learned(self, stage: str | None) -> str | None:
        """Checksum of what a stage learned."""
        return None if stage is None else distributed.from_main(lambda: self.variants.folder.learned(stage))

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
            held = self.held_out  # before the model is assembled: reading may remove students and LoRA from it
            return {row: score_held_out(self.assemble(row), held, self.recipe)}

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
        text = self.held_out.text
        length = min(LONGEST_PROMPT, 3 * self.recipe.student.window, text.ids.shape[1] // 2)
        rows = text.ids[: 4 * SAMPLES, :length].tolist()
        prompts = [self.variants.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [prompt for prompt in prompts if prompt.strip()][:SAMPLES]

    def facts(self) -> dict[str, Any]:
        """Source and size of the text."""
        return dict(self._once("facts", self._key(Variant()), "data", self._facts))

    def _facts(self) -> dict[str, Any]:
        selected = self.recipe.data.select != "none"  # among training rows, which may have another length
        length = self.recipe.data.seq_len if selected else self.seq_len
        batches = self.variants.batches(self.recipe.eval.batch_size, length)
        text = self.held_out.text
        return {
            "source": self.recipe.data.path,
            **batches.counts,
            "rows scored": len(text.ids),
            "tokens scored": int(text.counted.sum()),
        }

    def groups(self) -> dict[str, Any]:
        """Key/value groups of the model, and how many of them are kept."""
        return dict(self._once("groups", self._key(Variant()), "model", self._groups))

    def _groups(self) -> dict[str, Any]:
        shapes = shapes_of(self.variants.model.config)
        kept = kept_total(self.recipe.student, shapes.layers, shapes.kv_heads)
        return {"groups": shapes.layers * shapes.kv_heads, "kept groups": kept}

    def notes(self) -> list[str]:
        """What could not be scored, and why."""
        return list(self._once("notes", self._key(Variant()), "notes", lambda: list(self.held_out.notes)))

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
            notes=self.notes(),
            model=self.groups(),
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
        cfg = recipe.transfer if stage in BEFORE.values() else recipe.lora
        if cfg is None:
            continue
        seq_len = recipe.row_tokens(cfg)
        batches = variants.batches(cfg.batch_size, seq_len)
        unit = unit or seconds_per_token(variants, batches)
        trained, evaluated = stage_tokens(cfg, batches, seq_len)
        cost = LORA_COST + cfg.teacher_pass if isinstance(cfg, LoraConfig) else TRANSFER_COST
        total += unit * (trained * cost + evaluated * 1.5)
    plan = recipe.eval
    scored = plan.rows * len(plan.length_factors) + plan.copy_rows * (1 + len(plan.length_factors))
    return total + unit * SCORING_COST * rows * scored * evaluation_length(recipe)

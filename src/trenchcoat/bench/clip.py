"""One gradient clip for all layers against one for each, on a model whose layers differ 1000-fold in scale.

The teacher is the embedded model with the values of its layers multiplied by 1024, 128, 8 and 1 and its output
projections divided by the same: powers of two, so it computes the same function to the last bit, while the attention
outputs that students learn, and so their losses and gradients, differ. (Losses of Llama 3.1 405B span 0.02 to 48.)

AdamW cancels the scale of a gradient as long as it is large compared with its epsilon of 1e-8. So a global clip hurts
the small layers only if it leaves them almost no gradient, which depends on how many parameters share the norm:
clipping the 264 million student parameters of a 405B model to a norm of 1 is equivalent, per parameter, to clipping the
embedded model's to ``CLIP``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from trenchcoat.bench.benchmark import Benchmark, Settings, grid, shown
from trenchcoat.config import ModelConfig
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion.held_out import evaluation_rows
from trenchcoat.conversion.variants import open_variants
from trenchcoat.evaluation.scoring import score
from trenchcoat.models.families import decoder_of
from trenchcoat.models.loading import load_model
from trenchcoat.runtime.runfolder import TRANSFER
from trenchcoat.runtime.runlog import read_metrics

SCALES = (1024.0, 128.0, 8.0, 1.0)
SCOPES = ("layer", "global")
CLIP = (4 * 4 * 2 * 64 * 64 / (126 * 128 * 2 * 128 * 64)) ** 0.5
"""A norm of 1, scaled to the number of parameters here: layers, heads, two maps, head and feature dimension."""


def _write_scaled(folder: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path="embedded", device="cpu", dtype="float32"))
    with torch.no_grad():
        for layer, scale in zip(decoder_of(model).layers, SCALES, strict=True):
            layer.self_attn.v_proj.weight.mul_(scale)
            layer.self_attn.o_proj.weight.div_(scale)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def _run(folder: Path, scope: str, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """({layer: relative error}, {``teacher`` and ``scope``: perplexity after the swap}) of one run."""
    recipe = load_recipe(
        "demo",
        [
            f"model.path={folder / 'model'}", f"run.dir={folder / scope}", "run.progress=off", "lora=null",
            f"transfer.clip_scope={scope}", "transfer.normalize=none", "transfer.mse_weight=1000",
            f"transfer.clip={CLIP}", f"transfer.max_steps={steps}", "transfer.lr=1e-3", "transfer.warmup_steps=0",
            "transfer.schedule=constant", f"transfer.eval_every={max(1, steps // 4)}", "transfer.eval_batches=4",
            "transfer.save_every=1000", "student.feature_map.name=hedgehog", "student.feature_map.feature_dim=64",
            "student.feature_map.init=identity", "student.keep=none", "student.sinks=0", "eval.rows=16",
            "data.seq_len=512", "eval.seq_len=null",
        ],
    )  # fmt: skip
    with open_variants(recipe, [TRANSFER]) as variants:
        variants.train(TRANSFER)
        text = evaluation_rows(variants.batches(2), recipe.eval.rows)
        found = {}
        for name, make in (
            ("teacher", variants.assemble_teacher),
            (scope, partial(variants.assemble, weights=TRANSFER)),
        ):
            found[name] = score(make(), text, window=recipe.student.window, batch_size=2).perplexity
    evaluations = [line for line in read_metrics(folder / scope) if line["kind"] == "eval"]
    best = min(evaluations, key=lambda line: line["loss"])
    errors = {name.removeprefix("relative/"): best[name] for name in best if name.startswith("relative/layer_")}
    return errors, found


@dataclass(frozen=True)
class ClipSizes:
    """What is measured."""

    steps: int = 120
    repeats: int = 1
    """No effect: the same seeds give the same numbers."""


class ClipBenchmark(Benchmark[ClipSizes]):
    """``bench clip``."""

    full = ClipSizes()
    quick = ClipSizes(steps=2)
    only_on = "cpu"

    def run(self, sizes: ClipSizes, settings: Settings) -> dict[str, Any]:
        """Train with each."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _write_scaled(folder / "model")
            runs = {scope: _run(folder, scope, sizes.steps) for scope in SCOPES}
        return {
            "scales": list(SCALES),
            "steps": sizes.steps,
            "clip": CLIP,
            "relative_error": {scope: errors for scope, (errors, _) in runs.items()},
            "perplexity": {name: value for _, found in runs.values() for name, value in found.items()},
        }

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each layer, and perplexities."""
        errors, found = record["relative_error"], record["perplexity"]
        rows = {layer: {scope: errors[scope][layer] for scope in SCOPES} for layer in errors["layer"]}
        return [
            f"Attention transfer, {record['steps']} steps, clip {CLIP:.3f}, layers' values x {record['scales']}: "
            "squared error / mean square of the output, with a clip for each layer and with one for all (global)",
            *grid("", {**rows, "perplexity": {scope: found[scope] for scope in SCOPES}}),
            f"perplexity of the teacher: {shown(found['teacher'])}",
        ]


def draw_errors(record: Mapping[str, Any], path: Path) -> None:
    """The errors layer by layer as a PNG file (`docs/clip.png` from `benchmarks/clip.json`)."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for scope, label, marker in (("layer", "one clip a layer", "o"), ("global", "one clip for all", "s")):
        values = list(record["relative_error"][scope].values())
        axes.plot(range(len(values)), values, marker=marker, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(record["scales"])), [f"{i}\nx {scale:g}" for i, scale in enumerate(record["scales"])])
    axes.set_xlabel("layer, and the scale of its attention outputs")
    axes.set_ylabel("relative squared error")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)

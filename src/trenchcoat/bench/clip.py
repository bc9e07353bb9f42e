"""One gradient clip for all layers against one for each, on a model whose layers differ 1000-fold in scale.

The teacher is the embedded model with the values of its layers multiplied by 1024, 128, 8 and 1 and its output
projections divided by the same: powers of two, so it computes the same function to the last bit, while the attention
outputs that students learn, and so their losses and gradients, differ. (Losses of Llama 3.1 405B span 0.02 to 48.)

AdamW divides the scale of a gradient out again, as long as it is large against its epsilon of 1e-8. So what one clip
for all takes from the small layers shows only where it leaves them next to nothing, which depends on how many
parameters share the norm: clipping the 264 million students' parameters of a 405B to a norm of 1 is, a parameter,
clipping the embedded model's to ``CLIP``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from trenchcoat.config import ModelConfig
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.evaluation.scoring import score
from trenchcoat.linearize.comparison import evaluation_rows
from trenchcoat.linearize.variants import open_variants
from trenchcoat.models.families import decoder_of
from trenchcoat.models.loading import load_model
from trenchcoat.runtime.runfolder import TRANSFER
from trenchcoat.runtime.runlog import environment, read_metrics

SCALES = (1024.0, 128.0, 8.0, 1.0)
SCOPES = ("layer", "global")
STEPS, QUICK_STEPS = 120, 2
CLIP = (4 * 4 * 2 * 64 * 64 / (126 * 128 * 2 * 128 * 64)) ** 0.5
"""A norm of 1, for as many parameters as there are here: layers, heads, two maps, head and feature dimension."""


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
            "student.feature_map.init=identity", "eval.rows=16", "data.seq_len=512",
        ],
    )  # fmt: skip
    with open_variants(recipe, [TRANSFER]) as variants:
        variants.train(TRANSFER)
        text = evaluation_rows(variants.batches(2), recipe.eval.rows)
        models = {"teacher": variants.assemble_teacher, scope: lambda: variants.assemble(weights=TRANSFER)}
        found = {
            name: score(make(), text, window=recipe.student.window, batch_size=2).perplexity
            for name, make in models.items()
        }
    evaluations = [line for line in read_metrics(folder / scope) if line["kind"] == "eval"]
    best = min(evaluations, key=lambda line: line["loss"])
    errors = {name.removeprefix("relative/"): best[name] for name in best if name.startswith("relative/layer_")}
    return errors, found


def measure(
    *, threads: int | None = None, quick: bool = False, repeats: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Train with both; JSON-ready. ``quick``: two steps, a check that it runs."""
    if device != "cpu":
        raise ValueError(f"device={device!r}: the embedded model is small; use --device cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    steps = QUICK_STEPS if quick else STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_scaled(folder / "model")
        runs = {scope: _run(folder, scope, steps) for scope in SCOPES}
    return {
        "benchmark": "clip",
        "scales": list(SCALES),
        "steps": steps,
        "clip": CLIP,
        "relative_error": {scope: errors for scope, (errors, _) in runs.items()},
        "perplexity": {name: value for _, found in runs.values() for name, value in found.items()},
        "environment": environment(implementation="chunkwise", threads=threads or torch.get_num_threads()),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = [f"Attention transfer, {result['steps']} steps, clip {CLIP:.3f}, layers' values x {result['scales']}"]
    lines.append(f"{'':10} {'one clip a layer':>18} {'one for all':>14}   (squared error / mean square of the output)")
    for layer, error in result["relative_error"]["layer"].items():
        lines.append(f"{layer:10} {error:>18.4f} {result['relative_error']['global'][layer]:>14.4f}")
    found = result["perplexity"]
    lines.append(f"perplexity {found['layer']:>18.3f} {found['global']:>14.3f}   (teacher {found['teacher']:.3f})")
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The errors layer by layer as a PNG file."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for scope, label, marker in (("layer", "one clip a layer", "o"), ("global", "one clip for all", "s")):
        values = list(result["relative_error"][scope].values())
        axes.plot(range(len(values)), values, marker=marker, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(result["scales"])), [f"{i}\nx {scale:g}" for i, scale in enumerate(result["scales"])])
    axes.set_xlabel("layer, and the scale of its attention outputs")
    axes.set_ylabel("relative squared error")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)

"""The recipe of a model that has none: settings from the model's sizes and the machine, on top of a built-in recipe.

`trenchcoat linearize MODEL` calls :func:`recipe_for`. On a GPU the settings are those of `llama3_1_8b`, on a CPU those
of `smollm2_135m`, with the rows that the model's positions allow; the text is Alpaca for instruction models (CC BY 4.0)
and books for base models (Project Gutenberg, PG-19), unless the user names another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trenchcoat.config import Recipe, UserError
from trenchcoat.config.paths import absolute_if_here, expanded
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.config.units import GIB
from trenchcoat.models.shapes import Shapes, find_config, shapes_of
from trenchcoat.runtime.machine import free_memory
from trenchcoat.students import STUDENTS

GPU_RECIPE, CPU_RECIPE = "llama3_1_8b", "smollm2_135m"
"""The built-in recipes that the settings come from."""
CPU_WIDTH = 576
"""Hidden size of the model that `CPU_RECIPE` is for."""
INSTRUCT_DATA, BASE_DATA = "yahma/alpaca-cleaned", "emozilla/pg19"
"""Hub ids of the default text."""
CHECKPOINTED = 1e9
"""Parameters from which stage 2 recomputes activations in the backward pass."""
ROOM = 1.25
"""Bytes that a conversion takes beside the weights, as a factor of them, at the least."""
_INSTRUCT = re.compile(r"instruct|chat|[-_]it\b", re.IGNORECASE)


@dataclass(frozen=True)
class ChosenRecipe:
    """A recipe, and why its settings are what they are."""

    recipe: Recipe
    reasons: tuple[str, ...]


def recipe_for(
    model: str, overrides: Sequence[str] = (), *, data: str | None = None, here: bool = True
) -> ChosenRecipe:
    """Settings for ``model`` (a folder, a `.gguf` file or a hub id); ``overrides`` (`key=value`) win.

    ``data``: a file, folder or hub id of text instead of the default. ``here``: this machine will hold the whole model;
    otherwise the settings are those for a GPU. Raises ``UserError`` for a model whose config cannot be read, an
    unsupported family, and (``here``) a model that this machine has no memory for.
    """
    config = find_config(model)
    shapes = shapes_of(config)
    gpu = not here or torch.cuda.is_available()
    if here:
        _require_memory(shapes, model, gpu)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    template = load_recipe(GPU_RECIPE if gpu else CPU_RECIPE)
    text, why = _text(model, data)
    chosen = [
        f"model.path={absolute_if_here(expanded(model))}",
        f"run.dir={run_folder(model)}",
        *text,
        *_lengths(template, positions),
        *([] if gpu else _rate(template, shapes.hidden)),
    ]
    if gpu:
        chosen.append(f"lora.gradient_checkpointing={str(shapes.parameters >= CHECKPOINTED).lower()}")
    recipe = load_recipe(GPU_RECIPE if gpu else CPU_RECIPE, overrides, chosen=chosen)
    place = "a CPU" if not gpu else f"a GPU ({torch.cuda.get_device_name()})" if here else "a GPU"
    typed = {item.partition("=")[0].strip() for item in overrides}
    shown = [item for item in chosen[1:] if item.partition("=")[0] not in typed]
    reasons = (
        f"{model}: {shapes.family}, {_billions(shapes.parameters)} parameters, {shapes.layers} layers with "
        f"{shapes.kv_heads} key/value groups each",
        f"settings for {place}, from the recipe {GPU_RECIPE if gpu else CPU_RECIPE}: {' '.join(shown)}",
        why,
        *_reach(recipe, positions),
    )
    return ChosenRecipe(recipe, reasons)


def _reach(recipe: Recipe, positions: int | None) -> list[str]:
    """That a student whose far part grows with the text fails beyond the rows that it was trained on."""
    trained = recipe.data.seq_len
    if not STUDENTS[recipe.student.name].grows or positions is None or positions <= trained:
        return []
    return [
        f"for texts of up to {trained:,} tokens, the rows it is trained on; for longer ones set data.seq_len, or "
        "student.name=terrace_gated, which holds beyond its rows (docs/STUDENTS.md)"
    ]


def run_folder(model: str) -> str:
    """The run's folder of a model: its hub id, or its folder's name and a mark of the whole path, so that no two models
    share one."""
    place = Path(model).expanduser()
    if not place.exists():
        return f"runs/{model.replace('/', '--')}"
    whole = place.resolve()
    name = re.sub(r"[^\w.\-]", "_", whole.stem if whole.is_file() else whole.name)
    return f"runs/{name}-{hashlib.sha256(str(whole).encode()).hexdigest()[:6]}"


def _lengths(template: Recipe, positions: int | None) -> list[str]:
    """Row lengths within the model's positions, where the recipe's are longer."""
    if positions is None:
        return []
    found = []
    assert template.lora is not None
    for name, asked in (("data", template.data.seq_len), ("lora", template.lora.seq_len),
                        ("select", template.select.seq_len), ("eval", template.eval.seq_len)):  # fmt: skip
        if asked is not None and asked > positions:
            found.append(f"{name}.seq_len={positions}")
    least = 4 * template.student.window
    if positions < least:
        found.append(f"student.window={max(1, positions // 4)}")
    return found


def _rate(template: Recipe, width: int) -> list[str]:
    """A lower learning rate of stage 2 for a wider model, in proportion; at 4,096 about that of `GPU_RECIPE`."""
    assert template.lora is not None
    return [f"lora.lr={template.lora.lr * CPU_WIDTH / width:.1e}"] if width > CPU_WIDTH else []


def _text(model: str, data: str | None) -> tuple[list[str], str]:
    """(settings of the text, the sentence that says which)."""
    if data is not None:
        local = Path(data).expanduser().exists()
        held = ["data.validation_fraction=0.05"] if local else []
        more = ["data.format=auto", "data.streaming=false", "data.max_rows=null", *held]
        return [f"data.path={data}", *more], f"text: {data}"
    if instructed(model):
        more = ["data.format=alpaca", "data.streaming=false", "data.max_rows=null", "data.validation_rows=500"]
        why = f"text: {INSTRUCT_DATA} (CC BY 4.0), as this is an instruction model"
        return [f"data.path={INSTRUCT_DATA}", *more], f"{why}; --data names another, such as long text of your own"
    why = f"text: {BASE_DATA} (books of Project Gutenberg, out of copyright), as this is a base model"
    return [], f"{why}; --data names another"


def instructed(model: str) -> bool:
    """Whether a model was trained to follow instructions: its tokenizer has a chat template, or its name says so."""
    place = Path(model).expanduser()
    if place.is_dir():
        if (place / "chat_template.jinja").is_file():
            return True
        settings = place / "tokenizer_config.json"
        try:
            return bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
        except (OSError, ValueError, AttributeError):
            return False
    return _INSTRUCT.search(model) is not None


def _require_memory(shapes: Shapes, model: str, gpu: bool) -> None:
    free: Any = torch.cuda.mem_get_info()[0] if gpu else free_memory()
    needed = ROOM * shapes.parameters * (2 if gpu else 4)
    if free is not None and needed > free:
        where = "the GPU" if gpu else "this machine"
        raise UserError(
            f"{model} has {_billions(shapes.parameters)} parameters and needs at least {needed / GIB:.0f} GiB of "
            f"memory, but {where} has {free / GIB:.0f} GiB free. Block by block it takes the memory of a few layers "
            "(`trenchcoat blocks run RECIPE`); `trenchcoat plan` says which machines it fits"
        )


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"

"""The stages as Python functions, on a model in memory or by its name: ``trenchcoat.linearize`` and its parts.

Everything is kept in a run's folder as by the command line, so a call that was stopped continues when it is repeated,
and ``trenchcoat.load(out)`` opens the result in another process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trenchcoat.config import Recipe, UserError
from trenchcoat.config.paths import absolute_if_here
from trenchcoat.config.recipe_io import check_overrides, load_recipe, names_model
from trenchcoat.conversion import stages
from trenchcoat.conversion.variants import GivenModel, open_variants
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.rows import own_stages
from trenchcoat.evaluation.selection import Selection
from trenchcoat.models import hub
from trenchcoat.models.attach import detach_students, students_of
from trenchcoat.models.basefolder import base_folder, read_config
from trenchcoat.models.identity import file_fingerprint, fingerprint
from trenchcoat.models.lora import remove_lora
from trenchcoat.models.saving import remember_tokenizer
from trenchcoat.models.shapes import meta_model
from trenchcoat.planning.choose import recipe_for, run_folder
from trenchcoat.runtime.files import atomic_directory, write_text
from trenchcoat.runtime.runfolder import first_missing, remove_start

Text = str | Path | Iterable[Any]
_TEXT, _BASE = "data.jsonl", "base"
"""In the run's folder: rows that were given in memory, and weights that no folder has."""


def linearize(
    model: Any,
    tokenizer: Any = None,
    data: Text | None = None,
    *,
    keep: str | int | list[Any] | None = None,
    out: str | Path | None = None,
    recipe: str | Path | None = None,
    **settings: Any,
) -> tuple[Any, Results]:
    """Convert a model: selection of the groups to keep, attention transfer, stage 2, adapter, report.

    Args:
        model: a causal language model in memory, which is changed in place, or a hub id, folder or `.gguf` file,
            or `embedded`.
        tokenizer: of a model in memory.
        data: text to train on: a file, folder or hub id; or texts, rows (mappings in one of the formats of
            `data.format`) or a `datasets.Dataset`, which are written into the run's folder. Default: as
            `trenchcoat linearize MODEL` chooses.
        keep: key/value groups that keep softmax attention (`student.keep`): "13%", 12, [18.2, 7.0], "none".
        out: the run's folder. Default: `runs/` and the model's name.
        recipe: a recipe (built-in name or YAML file) to start from instead of settings chosen for the model.
        **settings: sections of a recipe: `transfer={"max_steps": 100}, student={"window": 128}, lora=None`; or single
            settings by their path, as for the section whose name is that of an argument: `**{"data.seq_len": 4096}`.

    Returns:
        (the linearized model in mode `student` and on the model's device, the results of the report).

    Raises:
        UserError: settings, data or a model that cannot be used; before anything is trained.
    """
    with _prepared(model, tokenizer, data, keep, out, recipe, settings) as (made, given):
        results = stages.linearize(made, given=given).results
    assert isinstance(results, Results)
    return _converted(made, given), results


def select(
    model: Any,
    tokenizer: Any = None,
    data: Text | None = None,
    *,
    keep: str | int | None = None,
    reach: float | None = None,
    out: str | Path | None = None,
    recipe: str | Path | None = None,
    **settings: Any,
) -> Selection:
    """Measure which key/value groups are worth keeping; arguments as in :func:`linearize`.

    ``reach``: choose the fewest groups that close this share (0 to 1) of both gaps, instead of ``keep``.
    """
    with _prepared(model, tokenizer, data, keep, out, recipe, settings) as (made, given):
        found = stages.select(made, reach, given).results
    assert isinstance(found, Selection)
    return found


def transfer(
    model: Any,
    tokenizer: Any = None,
    data: Text | None = None,
    *,
    keep: str | int | list[Any] | None = None,
    out: str | Path | None = None,
    recipe: str | Path | None = None,
    **settings: Any,
) -> Any:
    """Stage 1 alone, after the selection if one is needed; arguments as in :func:`linearize`.

    Returns the model with the students that it trained, in mode `student`.
    """
    with _prepared(model, tokenizer, data, keep, out, recipe, settings) as (made, given):
        stages.transfer(made, given)
    return _converted(dataclasses.replace(made, lora=None), given)


def finetune(
    model: Any,
    tokenizer: Any = None,
    data: Text | None = None,
    *,
    keep: str | int | list[Any] | None = None,
    out: str | Path | None = None,
    recipe: str | Path | None = None,
    **settings: Any,
) -> Any:
    """Stage 2 on the transfer found in ``out`` (with `transfer=None`: without one); arguments as in :func:`linearize`.

    Returns the model with everything that was learned, in mode `student`.
    """
    with _prepared(model, tokenizer, data, keep, out, recipe, settings) as (made, given):
        stages.finetune(made, given)
    return _converted(made, given)


def evaluate(run: str | Path, **settings: Any) -> Results:
    """Score a finished run's folder again, with other settings of `eval`, say, and write its report.

    ``settings``: as in :func:`linearize`. Raises ``UserError`` for a folder without a finished run.
    """
    results = stages.evaluate_run(load_recipe(run, _overrides(settings))).results
    assert isinstance(results, Results)
    return results


# From arguments to a recipe


@contextmanager
def _prepared(
    model: Any,
    tokenizer: Any,
    data: Text | None,
    keep: str | int | list[Any] | None,
    out: str | Path | None,
    recipe: str | Path | None,
    settings: Mapping[str, Any],
) -> Iterator[tuple[Recipe, GivenModel | None]]:
    """The recipe of a call, and the model if it is in memory.

    If the block fails, a model in memory is again what it was, so that the call can be repeated; where nothing was
    learned before, a folder that was made for the run is removed.
    """
    overrides = _overrides(settings)
    if keep is not None:
        overrides.append(f"student.keep={_written(keep)}")
    check_overrides(overrides)
    with ExitStack() as stack:
        if out is not None:
            _removed_on_failure(stack, Path(out))
        if isinstance(model, str | Path):
            path, given = str(model), None
            if path != "embedded" and not Path(path).expanduser().exists() and not names_model(path):
                raise UserError(f"model={path!r}: no such folder or file, and not a hub id")
        else:
            given = _usable(model, tokenizer)
            stack.push(lambda kind, *_: _restore(model) if kind is not None else None)
            path = _path_of(model, tokenizer, out)
            overrides += [f"model.device={model.device}", f"model.dtype={str(model.dtype).removeprefix('torch.')}"]
        folder = str(out) if out is not None else run_folder(path)
        if out is None:
            _removed_on_failure(stack, Path(folder))
        text = None if data is None else _text_file(data, Path(folder))
        overrides.append(f"run.dir={folder}")
        if recipe is None:
            yield recipe_for(path, overrides, data=text).recipe, given
        else:
            overrides.append(f"model.path={path}")
            yield load_recipe(recipe, overrides if text is None else [*overrides, f"data.path={text}"]), given


def _removed_on_failure(stack: ExitStack, folder: Path) -> None:
    """Remove the run's folder when the block of ``stack`` fails, if it is new and nothing in it was learned."""
    place = folder.expanduser().absolute()
    created = first_missing(place)
    stack.push(lambda kind, *_: remove_start(place, created, (_TEXT, _BASE)) if kind is not None else None)


def _restore(model: Any) -> None:
    remove_lora(model)
    detach_students(model)


def _overrides(settings: Mapping[str, Any], path: str = "") -> list[str]:
    """Nested settings as `key=value`."""
    found: list[str] = []
    for name, value in settings.items():
        full = f"{path}.{name}" if path else name
        found += _overrides(value, full) if isinstance(value, Mapping) else [f"{full}={_written(value)}"]
    return found


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _usable(model: Any, tokenizer: Any) -> GivenModel:
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model must be a Transformers model, a path or a hub id, got {type(model).__name__}")
    if tokenizer is None:
        raise UserError("a model in memory needs its tokenizer: linearize(model, tokenizer, ...)")
    if students_of(model):
        raise UserError("the model is linearized already; give the original model")
    return model.eval().requires_grad_(False), tokenizer


def _path_of(model: Any, tokenizer: Any, out: str | Path | None) -> str:
    """Where the weights of a model in memory can be read again: its own folder or hub id if they are those; else
    they are saved into the run's folder."""
    name = str(getattr(model, "name_or_path", "") or "")
    if name:
        with suppress(UserError, KeyError, OSError, ValueError):
            folder = base_folder(name, None)
            plain = meta_model(read_config(folder))

            def unknown(parameter: str, count: int) -> Any:
                """Tensors that are not in the files are in none."""
                raise KeyError(parameter)

            if file_fingerprint(plain, folder, unknown) == fingerprint(model):
                return absolute_if_here(name)
    if out is None:
        raise UserError(
            "the model's weights are not those of a hub id or folder, so they are saved with the run: give out=..."
        )
    folder = Path(out).expanduser().resolve() / _BASE
    with atomic_directory(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return str(folder)


def _text_file(data: Text, folder: Path) -> str:
    """The path or hub id of the text; rows in memory are written to a file in the run's folder."""
    if isinstance(data, str | Path):
        return str(data)
    expected = "expected a path, a hub id, texts, rows or a Dataset"
    if not isinstance(data, Iterable) or isinstance(data, Mapping):
        raise UserError(f"data is a {type(data).__name__}; {expected}")
    lines = []
    for number, row in enumerate(data, 1):
        if not isinstance(row, str | Mapping):
            raise UserError(f"row {number} of data is a {type(row).__name__}; expected a text or a mapping of columns")
        lines.append(json.dumps({"text": row} if isinstance(row, str) else dict(row), ensure_ascii=False))
    if not lines:
        raise UserError(f"data has no rows; {expected}")
    path = folder.expanduser() / _TEXT
    write_text(path, "".join(f"{line}\n" for line in lines))
    return str(path)


def _converted(recipe: Recipe, given: GivenModel | None) -> Any:
    """The model of a finished run."""
    if given is None:
        return hub.load(recipe.run.dir, device=recipe.model.device)[0]
    stage = own_stages(recipe)[-1]
    with open_variants(recipe, [], given) as variants:
        model = variants.assemble(lora=recipe.lora is not None, weights=stage).eval().requires_grad_(False)
    remember_tokenizer(model, given[1])
    return model

"""Read a recipe: a YAML file and ``key=value`` overrides become one checked ``Recipe``.

Every mistake is a ``UserError`` of one line that names the field by its path (``transfer.lr``), the value found and
what was expected; an unknown key is answered with the nearest known one. The only module that imports omegaconf.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trenchcoat.config.settings import DataConfig, Recipe, StageConfig, StudentConfig, UserError
from trenchcoat.config.units import parse_tokens


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("trenchcoat.config") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe of ``path``: a YAML file, a run folder, or the name of a recipe that ships with trenchcoat.

    ``overrides`` are ``key=value`` with the key's path (``transfer.lr=5e-3``, ``transfer=null``); values are YAML.
    A recipe that names no ``run.dir`` runs in ``runs/<its own name>``. Raises ``UserError``.
    """
    name, text, folder = _read(str(path))
    document = _merge(name, text, overrides)
    if not isinstance(document.get("run", {}), Mapping):
        raise UserError(f"{name}: run must be a mapping of fields, got {document['run']!r}")
    run = dict(document.get("run") or {})
    chosen = [item for item in overrides if item.split("=", 1)[0].strip() == "run.dir"]
    if folder is not None and not chosen:
        run["dir"] = folder
    run.setdefault("dir", f"runs/{Path(name).stem}")
    return recipe_from_dict({**document, "run": run})


def parse_yaml(name: str, text: str) -> dict[str, Any]:
    """YAML text as nested plain values, read as recipes are (``1e-4`` is a number); ``name`` is for messages.

    Raises ``UserError`` for text that is not YAML or not a mapping.
    """
    return _merge(name, text, ())


def recipe_from_dict(document: Mapping[str, Any]) -> Recipe:
    """A checked recipe from nested plain values, such as a parsed ``recipe.yaml``; raises ``UserError``."""
    recipe = _build(Recipe, document, "")
    check_recipe(recipe)
    return recipe


def _read(path: str) -> tuple[str, str, str | None]:
    """(name for messages, YAML text, run folder or None)."""
    place = Path(path)
    if place.is_dir():
        inside = place / "recipe.yaml"
        if not inside.is_file():
            raise UserError(f"{path} is a folder without a recipe.yaml; give a recipe file or a run's folder")
        return str(inside), _text(inside), path
    if place.is_file():
        return path, _text(place), None
    known = builtin_recipes()
    stem = path.removesuffix(".yaml")
    if stem in known:
        resource = resources.files("trenchcoat.config") / "recipes" / f"{stem}.yaml"
        return f"{stem}.yaml", resource.read_text(encoding="utf-8"), None
    near = difflib.get_close_matches(Path(stem).name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "give the path of a YAML file or one of these names."
    raise UserError(
        f"there is no recipe {path!r}: no such file, and the recipes that ship are {', '.join(known)}; {hint}"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); a recipe is a YAML file in UTF-8") from error


def _merge(name: str, text: str, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        base = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(base, DictConfig):
        raise UserError(
            f"{name}: a recipe is a mapping of sections (model, student, data, ...), got a {type(base).__name__}"
        )
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {item!r} is not of the form key=value, for example transfer.lr=5e-3")
        try:
            base = typing.cast(DictConfig, OmegaConf.merge(base, OmegaConf.from_dotlist([f"{key.strip()}={value}"])))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"override {item!r}: {' '.join(str(error).split())}") from error
    try:
        return typing.cast("dict[str, Any]", OmegaConf.to_container(base, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from error


def _build(cls: type, document: Any, path: str) -> Any:
    """``cls`` (a frozen dataclass) from a mapping, field by field."""
    if not isinstance(document, Mapping):
        raise UserError(f"{path} must be a mapping of fields, got {document!r}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in document:
        if key not in known:
            raise UserError(_unknown_key(_join(path, str(key)), str(key), [_join(path, name) for name in known]))
    return cls(**{name: _value(hints[name], document[name], _join(path, name)) for name in known if name in document})


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unknown_key(full: str, key: str, siblings: list[str]) -> str:
    everywhere = [path for path, _ in field_paths(Recipe)]
    elsewhere = [path for path in everywhere if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown key {full}: did you mean {' or '.join(elsewhere)}?"
    names = {path.rpartition(".")[2]: path for path in [*everywhere, *siblings]}
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"unknown key {full}: did you mean {names[near[0]]}?"
    return f"unknown key {full}: expected one of {', '.join(siblings)}"


def field_paths(cls: type, path: str = "") -> list[tuple[str, Any]]:
    """(path, type) of every field under a dataclass, sections included: ``transfer``, ``transfer.lr``, ..."""
    found: list[tuple[str, Any]] = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append((_join(path, name), hint))
        section = _section(hint)
        if section is not None:
            found += field_paths(section, _join(path, name))
    return found


def _section(hint: Any) -> type | None:
    """The dataclass in ``X`` or ``X | None``; None for a plain field."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _value(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(arg for arg in typing.get_args(hint) if arg is not type(None)), value, path)
    section = _section(hint)
    if section is not None:
        return _build(section, value, path)
    if origin is typing.Literal:
        return _choice(typing.get_args(hint), value, path)
    if origin is tuple:
        items = [value] if isinstance(value, str | int | float) else value
        if not isinstance(items, Sequence):
            raise UserError(f"{path} must be a list, got {value!r}")
        return tuple(_value(typing.get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(items))
    return _scalar(hint, value, path)


def _choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if isinstance(value, bool):  # YAML 1.1 reads off, no, on and yes as truth values
        value = next((word for word in (("on", "yes") if value else ("off", "no")) if word in choices), value)
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{path} must be one of {', '.join(map(str, choices))}, got {value!r}{hint}")


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if hint is float:
            return float(value)
        if hint is int and float(value).is_integer():
            return int(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise UserError(f"{path} must be {names.get(hint, hint)}, got {value!r}")


Check = tuple[Callable[[Any], bool], str]

_AT_LEAST_0: Check = (lambda value: value >= 0, "at least 0")
_AT_LEAST_1: Check = (lambda value: value >= 1, "at least 1")
_POSITIVE: Check = (lambda value: value > 0 and math.isfinite(value), "above 0 and finite")
_NOT_NEGATIVE: Check = (lambda value: value >= 0 and math.isfinite(value), "at least 0 and finite")
_BELOW_1: Check = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_INSIDE_0_1: Check = (lambda value: 0 < value < 1, "above 0 and below 1")
_NOT_EMPTY: Check = (lambda value: bool(value.strip()), "text that is not empty")

_RANGES: dict[str, Check] = {
    **dict.fromkeys(("model.path", "model.device", "data.path", "data.split", "run.dir", "student.name"), _NOT_EMPTY),
    **dict.fromkeys(("window", "feature_map.feature_dim", "feature_map.adapter_dim"), _AT_LEAST_1),
    **dict.fromkeys(("max_rows", "rows", "batch_size", "accumulation", "max_steps", "validation_rows"), _AT_LEAST_1),
    **dict.fromkeys(("eval_every", "eval_batches", "save_every", "keep_checkpoints", "early_stopping"), _AT_LEAST_1),
    **dict.fromkeys(("rank", "threads", "node_size", "timeout_seconds"), _AT_LEAST_1),
    **dict.fromkeys(("blocks.size", "blocks.jobs", "blocks.shard_mib"), _AT_LEAST_1),
    "blocks.epochs": (lambda value: all(item > 0 and math.isfinite(item) for item in value), "numbers above 0"),
    "early_stopping_threshold": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    **dict.fromkeys(("min_tokens", "max_tokens", "select_rows"), _AT_LEAST_1),
    **dict.fromkeys(("sinks", "warmup_steps", "plateau_patience", "run.seed"), _AT_LEAST_0),
    **dict.fromkeys(("lr", "epochs", "clip", "alpha", "feature_map.eps"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "min_lr", "mse_weight", "xent_weight"), _NOT_NEGATIVE),
    **dict.fromkeys(("beta1", "beta2", "dropout"), _BELOW_1),
    **dict.fromkeys(("mix_init", "plateau_factor", "validation_fraction"), _INSIDE_0_1),
    "seq_len": (lambda value: value >= 2, "at least 2"),
    "keep_softmax": (lambda value: all(item >= 0 for item in value), "layer indices of at least 0"),
    "decode_lengths": (lambda value: all(item >= 1 for item in value), "lengths of at least 1"),
    "targets": (bool, "the names of one linear layer or more"),
}
"""Ranges by the end of the field's path; the longest matching end is used. A null value is not checked."""


def check_recipe(recipe: Recipe) -> None:
    """Raise ``UserError`` for the first value out of its range, or the first two fields that do not fit together."""
    for path, hint in field_paths(Recipe):
        value = _lookup(recipe, path)
        if value is None or _section(hint) is not None:
            continue
        check = _range_of(path)
        if check is not None and not check[0](value):
            raise UserError(f"{path} must be {check[1]}, got {value!r}")
    _check_window(recipe.student, recipe.data)
    check_data(recipe.data)
    parse_tokens(recipe.blocks.pass_tokens)
    for name, stage in (("transfer", recipe.transfer), ("lora", recipe.lora)):
        if stage is not None:
            _check_stage(name, stage)
            if recipe.data.streaming and stage.max_steps is None:
                raise UserError(
                    f"data.streaming=true needs {name}.max_steps: a stream has no length that {name}.epochs "
                    f"({stage.epochs:g}) could be counted in"
                )
    if recipe.transfer is not None and recipe.transfer.mse_weight == 0 and recipe.transfer.xent_weight == 0:
        raise UserError("transfer.mse_weight and transfer.xent_weight are both 0: there is no loss to learn from")


def _range_of(path: str) -> Check | None:
    parts = path.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((_RANGES[end] for end in ends if end in _RANGES), None)


def _lookup(recipe: Any, path: str) -> Any:
    value = recipe
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _check_window(student: StudentConfig, data: DataConfig) -> None:
    if student.name != "linear" and student.window > data.seq_len:
        raise UserError(
            f"student.window must be at most data.seq_len ({data.seq_len}), got {student.window}: "
            "no token would be outside the window"
        )
    if student.sinks >= data.seq_len:
        raise UserError(f"student.sinks must be below data.seq_len ({data.seq_len}), got {student.sinks}")


def check_data(data: DataConfig) -> None:
    """Raise ``UserError`` for the first two fields of ``data`` that do not fit together."""
    if data.min_tokens is not None and data.max_tokens is not None and data.min_tokens > data.max_tokens:
        raise UserError(f"data.min_tokens must be at most data.max_tokens ({data.max_tokens}), got {data.min_tokens}")
    if (data.select == "none") != (data.select_rows is None):
        raise UserError(
            f"data.select={data.select} and data.select_rows={data.select_rows} do not fit: set both, for example "
            "data.select=esl data.select_rows=5000, or neither"
        )
    if not data.streaming:
        return
    apart = {"select": "none", "max_rows": None, "validation_fraction": None}
    for name, without in apart.items():
        if getattr(data, name) != without:
            raise UserError(
                f"data.{name}={getattr(data, name)} needs to see all rows, and data.streaming=true never does: "
                f"leave one of the two out{' (data.validation_rows works)' if name == 'validation_fraction' else ''}"
            )


def _check_stage(name: str, stage: StageConfig) -> None:
    if stage.schedule != "constant" and stage.min_lr > stage.lr:
        raise UserError(f"{name}.min_lr must be at most {name}.lr ({stage.lr:g}), got {stage.min_lr:g}")


def field_docs(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass, inherited fields included, as one paragraph a field."""
    docs: dict[str, str] = {}
    for owner in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]).body
        for statement, after in itertools.pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(after.value.value).split())
    return docs


def settings_help(sections: Sequence[str] | None = None, width: int = 100) -> str:
    """Every setting of a recipe as help text: path, default or choices, and the docstring of the field.

    ``sections`` (``["transfer", "lora"]``) restricts it to those.
    """
    lines: list[str] = []
    _describe(Recipe, "", lines, width, sections)
    return "\n".join(lines).strip()


def _describe(cls: type, path: str, lines: list[str], width: int, sections: Sequence[str] | None = None) -> None:
    docs = field_docs(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if sections is not None and field.name not in sections:
            continue
        full = _join(path, field.name)
        section = _section(hints[field.name])
        if section is not None:
            lines += ["", f"{full}: {docs[field.name]}"]
            _describe(section, full, lines, width)
            continue
        lines.append(f"  {full}={_shown(field.default)}")
        for choices in _choices(hints[field.name]):
            lines.append(f"      one of {' | '.join(map(str, choices))}")
        lines += textwrap.wrap(docs[field.name], width, initial_indent="      ", subsequent_indent="      ")


def _choices(hint: Any) -> list[tuple[Any, ...]]:
    literal = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal]
    return [typing.get_args(part) for part in literal]


def _shown(value: Any) -> str:
    """A default as one would type it in an override."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Read a recipe: a YAML file and ``key=value`` overrides become one checked ``Recipe``.

A mistake raises a one-line ``UserError`` with the field's path (``transfer.lr``), the value found and what was
expected; for an unknown key it suggests the nearest known one. This is the only module that imports omegaconf.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trenchcoat.config.errors import UserError
from trenchcoat.config.paths import expanded
from trenchcoat.config.registries import NameIn, without_unused
from trenchcoat.config.settings import Constraint, ReadBy, Recipe

RECIPES = Path(__file__).parent / "recipes"
"""The folder of the recipes that ship with the package."""

_HUB_ID = re.compile(r"[\w\-][\w.\-]*/[\w.\-]+")

RENAMED = {"lora.objective": "lora.loss, and its next_token is ce"}
"""Settings of earlier versions and what they are now, for the error message."""


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, chosen: Sequence[str] = ()) -> Recipe:
    """The checked recipe of ``path``: a YAML file, a run folder, or the name of a recipe that ships with trenchcoat.

    ``overrides`` are ``key=value`` with the key's path (``transfer.lr=5e-3``, ``transfer=null``); values are YAML.
    ``chosen`` are further ones that count as the file's own. Without ``run.dir``, the run's folder is
    ``runs/<recipe name>``. Raises ``UserError``, also for settings of a student that it does not use; where an override
    replaces the recipe's student, such settings of the recipe are left out.
    """
    path = expanded(str(path))
    file = _find(path)
    before, document = read_yaml(file, chosen), read_yaml(file, [*chosen, *overrides])
    document = without_unused(document, before, _typed(overrides))
    if not isinstance(document.get("run", {}), Mapping):
        raise UserError(f"{file}: run must be a mapping of fields, got {document['run']!r}")
    run = dict(document.get("run") or {})
    if Path(path).is_dir() and not any(item.partition("=")[0].strip() == "run.dir" for item in overrides):
        run["dir"] = path
    run.setdefault("dir", f"runs/{file.stem}")
    try:
        return recipe_from_dict({**document, "run": run})
    except UserError as error:
        if str(error) == _fault(before):  # the file's own, and not one of an override
            raise UserError(f"{file}: {error}") from error
        raise


def _fault(document: Mapping[str, Any]) -> str | None:
    """What is wrong with a recipe's plain values; None if nothing is."""
    try:
        recipe_from_dict(document)
    except UserError as error:
        return str(error)
    return None


def plain_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """Every setting at its own default, and no stage: the recipe of a model from elsewhere, to score or to use."""
    document = _parsed("{transfer: null, lora: null}", "the defaults", overrides)
    return recipe_from_dict(without_unused(document, {}, _typed(overrides)))


def _typed(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides alone, as nested plain values."""
    return _parsed("{}", "the overrides", overrides)


def recipe_from_dict(document: Mapping[str, Any]) -> Recipe:
    """A checked recipe from nested plain values, such as a parsed ``recipe.yaml``; raises ``UserError``."""
    return typing.cast(Recipe, _build(Recipe, document, ""))


def names_model(name: str) -> bool:
    """Whether ``name`` can only be a model, not a recipe: a folder with a config.json, a `.gguf` file, or a hub id."""
    place = Path(name).expanduser()
    if place.is_dir():
        return (place / "config.json").is_file() and not (place / "recipe.yaml").is_file()
    if place.suffix in (".yaml", ".yml") or name.startswith("runs/"):
        return False
    return place.suffix == ".gguf" or (not place.exists() and _HUB_ID.fullmatch(name) is not None)


def require_there(name: str) -> None:
    """Raise ``UserError`` where ``name`` can only be a path, by how it is written, and nothing is there."""
    place = Path(expanded(name))
    if not place.exists() and (place.suffix == ".gguf" or place.is_absolute() or name.startswith(".")):
        raise UserError(f"there is no file or folder {name}; give a model's folder, a `.gguf` file, or a YAML file")


def _find(path: str) -> Path:
    place = Path(path)
    if place.is_dir():
        if not (place / "recipe.yaml").is_file():
            raise UserError(f"{path} is a folder without a recipe.yaml; give a recipe file or a run's folder")
        return place / "recipe.yaml"
    if place.is_file():
        return place
    known = builtin_recipes()
    stem = path.removesuffix(".yaml")
    if stem in known:
        return RECIPES / f"{stem}.yaml"
    near = difflib.get_close_matches(Path(stem).name, known, n=1, cutoff=0.5)
    start = f"there is no recipe or model folder {path!r}; "
    if near:
        raise UserError(f"{start}did you mean {near[0]!r}? `trenchcoat recipes` lists all")
    raise UserError(f"{start}give the path of a YAML file, or a built-in recipe: {', '.join(known)}")


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file as nested plain values, parsed like a recipe (``1e-4`` is a number), with ``overrides`` applied.

    Raises ``UserError`` for a file that cannot be read, is not UTF-8, not YAML or not a mapping, for bad overrides, and
    for ``${...}``: nothing is filled in, so that no secret of the environment gets into a run's files.
    """
    try:
        text = path.read_text(encoding="utf-8").strip() or "{}"
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected a YAML file in UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return _parsed(text, str(path), overrides)


def _parsed(text: str, where: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The YAML ``text`` of :func:`read_yaml`; ``where`` it stands, for messages."""
    from omegaconf import DictConfig, OmegaConf

    with _yaml_errors(f"{where} is not valid YAML"):
        tree = _tree(text, where)
        base = OmegaConf.create(text)
        if not isinstance(base, DictConfig):
            raise UserError(
                f"{where}: a recipe is a mapping of sections (model, student, data, ...), got a {type(base).__name__}"
            )
        kept = _kept_as_written(tree, ["student", "keep"])
        if kept is not None:
            OmegaConf.update(base, "student.keep", kept)
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {item!r} is not of the form key=value, for example transfer.lr=5e-3")
        with _yaml_errors(f"override {item!r}"):
            _refuse_filling_in(key, f"override {item!r}")
            tree = _tree(value, f"override {item!r}")
            kept = _kept_as_written(tree, []) if key.strip() == "student.keep" else None
            parsed = OmegaConf.from_dotlist([f"{key.strip()}={value}"])
            merged = OmegaConf.merge(base, parsed if kept is None else {"student": {"keep": kept}})
            base = typing.cast(DictConfig, merged)
    return typing.cast("dict[str, Any]", OmegaConf.to_container(base, resolve=False))


@contextmanager
def _yaml_errors(what: str) -> Iterator[None]:
    """Turn errors of the parser inside the block into a ``UserError`` that begins with ``what``."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{what}: it is nested too deeply, or contains itself") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error


def _tree(text: str, where: str) -> Any:
    """The node of a YAML text; ``UserError`` when one of its scalars asks for something to be filled in."""
    import yaml

    root = yaml.compose(text)
    left: list[Any] = [root]
    seen: set[int] = set()
    while left:
        node = left.pop()
        value: Any = getattr(node, "value", ())
        if isinstance(value, str):
            _refuse_filling_in(value, where)
        elif id(node) not in seen:
            seen.add(id(node))
            left += itertools.chain.from_iterable(value) if getattr(node, "id", "") == "mapping" else value
    return root


def _refuse_filling_in(text: str, where: str) -> None:
    if "${" in text:
        raise UserError(
            f"{where}: {text!r} asks for something to be filled in, which recipes do not do; write the value itself "
            "(in a shell, with double quotes, it fills in $NAME before trenchcoat reads it)"
        )


def _kept_as_written(node: Any, path: list[str]) -> list[str] | None:
    """The scalars of the list at ``path`` of a YAML node as they are written (18.10 is not 18.1); None for no list."""
    for name in path:
        pairs = getattr(node, "value", None) if getattr(node, "id", "") == "mapping" else None
        node = next((value for key, value in pairs or () if key.value == name), None)
    if getattr(node, "id", "") != "sequence" or any(item.id != "scalar" for item in node.value):
        return None
    return [str(item.value) for item in node.value]


# From plain values to checked dataclasses


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _parts(hint: Any) -> Iterator[Any]:
    """A type and, recursively, its arguments: for ``tuple[PositiveInt, ...] | None`` also ``int`` and its range."""
    yield hint
    for argument in typing.get_args(hint):
        yield from _parts(argument)


def _section(hint: Any) -> type | None:
    """The dataclass in ``X`` or ``X | None``; None for a plain field."""
    return next((part for part in _parts(hint) if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def field_paths(cls: type, path: str = "") -> list[tuple[str, Any]]:
    """(path, type) of every field under a dataclass, sections included: ``transfer``, ``transfer.lr``, ..."""
    found: list[tuple[str, Any]] = []
    for name, hint in _hints(cls).items():
        found.append((_join(path, name), hint))
        section = _section(hint)
        if section is not None:
            found += field_paths(section, _join(path, name))
    return found


def _build(cls: type, document: Any, path: str) -> Any:
    """``cls`` (a section of the recipe) from a mapping, field by field, checked."""
    hints = _known(cls, document, path)
    made = cls(**{name: _value(hints[name], document[name], _join(path, name)) for name in hints if name in document})
    made.check(path)
    return made


def _known(cls: type, document: Any, path: str) -> dict[str, Any]:
    """The types of the fields of ``cls``; ``UserError`` for a ``document`` that is no mapping of them."""
    if not isinstance(document, Mapping):
        raise UserError(f"{path} must be a mapping of fields, got {document!r}")
    hints = _hints(cls)
    for key in document:
        if key not in hints:
            full = _join(path, str(key))
            raise UserError(f"unknown key {full}: {key_hint(full, [name for name, _ in field_paths(Recipe)])}")
    return hints


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise ``UserError`` for a setting that does not exist and for a value that is never valid, in any recipe."""
    _check_values(Recipe, _typed(overrides), "")


def _check_values(cls: type, document: Any, path: str) -> None:
    hints = _known(cls, document, path)
    for name, value in document.items():
        section = _section(hints[name])
        if section is not None and isinstance(value, Mapping):
            _check_values(section, value, _join(path, name))
        else:
            _value(hints[name], value, _join(path, name))


def check_section(section: Any, path: str) -> None:
    """Raise ``UserError`` for a section made in Python, such as ``DataConfig(...)``, with a value out of range."""
    _build(type(section), dataclasses.asdict(section), path)


def key_hint(full: str, known: Sequence[str]) -> str:
    """The nearest of the ``known`` dotted paths to the unknown key ``full``, as the end of an error message."""
    if full in RENAMED:
        return f"it is now {RENAMED[full]}"
    head, _, key = full.rpartition(".")
    prefix = f"{head}." if head else ""
    siblings = list(dict.fromkeys(prefix + p.removeprefix(prefix).split(".")[0] for p in known if p.startswith(prefix)))

    def close(paths: Sequence[str]) -> list[str]:
        by_name = {path.rpartition(".")[2]: path for path in paths}
        return [by_name[name] for name in difflib.get_close_matches(key, by_name, n=1, cutoff=0.6)]

    same = [path for path in known if path.rpartition(".")[2] == key]
    found = same or close(siblings) or close(known)
    return f"did you mean {' or '.join(found)}?" if found else f"expected one of {', '.join(siblings)}"


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(part for part in arguments if part is not type(None)), value, path)
    if origin is typing.Annotated:
        reader = next((part for part in arguments if isinstance(part, ReadBy)), None)
        if reader is not None:
            return reader.function(value, path)
        found = _value(arguments[0], value, path)
        for constraint in arguments[1:]:
            if isinstance(constraint, NameIn):
                found = _choice(constraint.names, found, path)
            elif not constraint.holds(found):
                raise UserError(f"{path} must be {constraint.text}, got {found!r}")
        return found
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if origin is typing.Literal:
        return _choice(arguments, value, path)
    if origin is tuple:
        items = [value] if isinstance(value, str | int | float) else value
        if not isinstance(items, Sequence):
            raise UserError(f"{path} must be a list, got {value!r}")
        return tuple(_value(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(items))
    return _scalar(hint, value, path)


def _choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if isinstance(value, bool):  # YAML 1.1 reads off, no, on and yes as booleans
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


# Help texts


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, inherited fields included, as one paragraph per field."""
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
    """Every setting of a recipe as help text: path, default, range or choices, and the docstring of the field.

    ``sections`` (``["transfer", "lora"]``) restricts it to those.
    """
    lines: list[str] = []
    for field in dataclasses.fields(Recipe):
        if sections is None or field.name in sections:
            lines += _described(Recipe, field, "", width)
    return "\n".join(lines).strip()


COMMON = (
    "model.path", "data.path", "data.max_rows", "data.seq_len", "student.name", "student.window", "student.keep",
    "transfer.lr", "transfer.max_steps", "lora.lr", "lora.rank", "lora.max_steps", "eval.rows", "run.dir",
)  # fmt: skip
"""The settings that most people set first."""


def settings_summary(sections: Sequence[str] | None = None) -> str:
    """Help text, one line each, for those of the `COMMON` settings that are in ``sections`` (None: all); empty without
    any."""
    lines = []
    for path in COMMON:
        section, _, name = path.partition(".")
        if sections is not None and section not in sections:
            continue
        cls = typing.cast(type, _section(_hints(Recipe)[section]))
        default = next(each.default for each in dataclasses.fields(cls) if each.name == name)
        text = textwrap.shorten(field_docs(cls)[name].partition(". ")[0].rstrip("."), 70, placeholder=" ...")
        lines.append(f"  {path}={_shown(default)}".ljust(30) + f" {text}")
    return "settings that most people set first:\n" + "\n".join(lines) if lines else ""


def _described(cls: type, field: dataclasses.Field[Any], path: str, width: int) -> list[str]:
    """The lines of a field, or of a section and its fields."""
    hint, text, full = _hints(cls)[field.name], field_docs(cls)[field.name], _join(path, field.name)
    section = _section(hint)
    if section is not None:
        inner = [_described(section, each, full, width) for each in dataclasses.fields(section)]
        return ["", f"{full}: {text}", *itertools.chain(*inner)]
    ranges = [part.text for part in _parts(hint) if isinstance(part, Constraint) and str not in _parts(hint)]
    lines = [f"  {full}={_shown(field.default)}" + "".join(f"  ({each})" for each in ranges)]
    choices = [typing.get_args(part) for part in _parts(hint) if typing.get_origin(part) is typing.Literal]
    choices += [part.names for part in _parts(hint) if isinstance(part, NameIn)]
    lines += [f"      one of {' | '.join(map(str, each))}" for each in choices]
    return lines + textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")


def _shown(value: Any) -> str:
    """A default, written as in an override."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

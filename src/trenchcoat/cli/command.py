"""The ``Command`` class, and arguments shared by several commands."""

from __future__ import annotations

import argparse
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trenchcoat.cli.terminal import warn
from trenchcoat.config import Recipe, UserError
from trenchcoat.config.paths import expanded, require_writable, require_writable_folder
from trenchcoat.config.recipe_io import (
    builtin_recipes,
    check_overrides,
    field_paths,
    load_recipe,
    names_model,
    require_there,
)
from trenchcoat.data.files import check_file, data_files, is_file_path, split_sample

TARGET_HELP = "a run's folder, an adapter folder or a merged folder"
DEVICE_HELP = "auto, cpu, cuda, cuda:1 (auto)"


def path(text: str) -> Path:
    """A type for ``add_argument``: a path, where `~` is the home folder."""
    try:
        return Path(expanded(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> Path:
    """A type for ``add_argument``: the path of a file that will be written; whether it can be is checked here."""
    found = path(text)
    try:
        require_writable(found, "the file to write")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def output_folder(text: str) -> Path:
    """A type for ``add_argument``: the path of a folder that will be written to; whether it can be is checked here."""
    found = path(text)
    try:
        require_writable_folder(found, "the folder to write")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def nothing(parser: argparse.ArgumentParser) -> None:
    """No options."""


@dataclass(frozen=True)
class Command:
    """One command, or one action of a command. Heavy dependencies are imported only when ``run`` is called."""

    run: Callable[[argparse.Namespace], Any]
    """The action. Its docstring is the help: the first line is shown in the list of commands, the rest by ``--help``.
    Its return value is printed: a sequence of texts and Rich renderables, an object with one as ``shown``, or None.
    """
    options: Callable[[argparse.ArgumentParser], None] = nothing
    """Adds its arguments."""
    recipe: Callable[[argparse.Namespace], Recipe] | None = None
    """Reads the recipe, which is passed to ``run`` as ``args.recipe``; a mistake in it is wrong usage."""
    sections: Sequence[str] | None = ()
    """Sections of the recipe whose settings the help lists; None for all."""
    actions: Mapping[str, Command] = field(default_factory=dict)
    """The subcommands, one of which is required: ``trenchcoat blocks ACTION``."""
    examples: Sequence[str] = ()
    """Command lines, from the command's name on, that its help shows."""
    libraries: bool = True
    """Whether it uses Transformers and datasets, whose notices are then silenced."""
    raw: bool = False
    """Whether everything after the command's name is passed to ``run`` unparsed, as ``args.rest``."""

    @property
    def help(self) -> tuple[str, str]:
        """(the line in the list of commands, the text of ``--help``)."""
        first, _, more = inspect.cleandoc(self.run.__doc__ or "").partition("\n\n")
        return " ".join(first.split()).rstrip("."), more or first


SHORTCUTS = {
    "--data": ("FILE_OR_ID", "text to train on (data.path): a file, folder or hub id"),
    "--keep": ("AMOUNT", "groups that keep softmax attention (student.keep): 13%%, 12, none, or [18.2,7.0]"),
    "--out": ("DIR", "the run's folder (run.dir)"),
}
"""Options that stand for a setting."""


def recipe_command(
    run: Callable[[argparse.Namespace], Any],
    options: Callable[[argparse.ArgumentParser], None] = nothing,
    sections: Sequence[str] | None = None,
    *,
    here: bool = True,
    shortcuts: Sequence[str] = tuple(SHORTCUTS),
    examples: Sequence[str] = (),
) -> Command:
    """A command that takes a recipe or a model, and overrides, before its own ``options``.

    ``here``: it holds the whole model in this machine's memory.
    """

    def all_options(parser: argparse.ArgumentParser) -> None:
        known = (
            "a model (hub id, folder or .gguf file), for which settings are chosen; a YAML file, a run's folder, or a "
            f"built-in recipe: {', '.join(builtin_recipes())}"
        )
        recipe: Any = parser.add_argument("recipe", metavar="MODEL_OR_RECIPE", help=known)
        recipe.completer = _recipes_and_files
        add_overrides(parser)
        for name in shortcuts:
            metavar, text = SHORTCUTS[name]
            parser.add_argument(name, dest=f"shortcut_{name[2:]}", metavar=metavar, help=text)
        options(parser)

    return Command(run, all_options, lambda args: _recipe_of(args, here), sections, examples=examples)


def _recipe_of(args: argparse.Namespace, here: bool) -> Recipe:
    """The recipe that is named, or the one chosen for the model that is; ``args.named`` becomes what was typed."""
    data, keep, out = (getattr(args, f"shortcut_{name}", None) for name in ("data", "keep", "out"))
    options = (("--data", data), ("--keep", keep), ("--out", out))
    typed = [word for name, value in options if value is not None for word in (name, str(value))]
    empty = next((name for name, value in options if value is not None and not value.strip()), None)
    if empty is not None:
        raise UserError(
            f"{empty} is empty (a variable of the shell that is not set?); give it a value, or leave it out"
        )
    args.named = shlex.join([args.recipe, *typed, *args.overrides])
    overrides = list(args.overrides)
    overrides += [f"{path}={value}" for path, value in (("student.keep", keep), ("run.dir", out)) if value is not None]
    require_there(args.recipe)
    if here:
        _require_typed_text(overrides if data is None else [*overrides, f"data.path={data}"])
    if not names_model(args.recipe):
        return load_recipe(args.recipe, overrides if data is None else [*overrides, f"data.path={data}"])
    check_overrides(overrides)
    from trenchcoat.planning.choose import recipe_for

    chosen = recipe_for(args.recipe, overrides, data=data, here=here)
    for reason in chosen.reasons:
        warn(reason)
    return chosen.recipe


def _require_typed_text(overrides: Sequence[str]) -> None:
    """Raise ``UserError`` for a file of text that was typed and is not there."""
    for item in overrides:
        name, _, value = (part.strip() for part in item.partition("="))
        if name in ("data.path", "data.validation_path"):
            path = split_sample(expanded(value))[0]
            for file in data_files(path) if is_file_path(path) else ():
                check_file(file, name)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Settings as ``KEY=VALUE``, which may also come between the options."""
    text = "settings that override the recipe's, by path: transfer.lr=5e-3 student.name=linear transfer=null"
    overrides: Any = parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help=text)
    overrides.completer = lambda **_: [f"{path}=" for path, _ in field_paths(Recipe) if "." in path]


def _recipes_and_files(prefix: str, **_: Any) -> list[str]:
    """What the shell may complete ``prefix`` to."""
    from argcomplete.completers import FilesCompleter

    return [*builtin_recipes(), *FilesCompleter()(prefix)]


def values(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the arguments, by name."""
    return {name: getattr(args, name) for name in names}


def whole_number(least: int) -> Callable[[str], int]:
    """A type for ``add_argument``: a whole number of at least ``least``."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least {least}")
        return int(text)

    return read

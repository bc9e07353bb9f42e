"""What a mistyped command, option or setting was probably meant to be: the end of an error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from trenchcoat.config.recipe_io import builtin_recipes, field_paths, names_model
from trenchcoat.config.settings import Recipe

_MOST = 4
"""The largest number of settings that a hint names."""


def command_hint(word: str, commands: Iterable[str]) -> str:
    """What to type instead of the unknown command ``word``."""
    known = list(commands)
    if names_model(word) or word in builtin_recipes():
        return f"to convert that model: trenchcoat linearize {word}"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"the commands are {', '.join(known)}"


def option_hint(words: Sequence[str], options: Iterable[str], sections: Sequence[str] | None) -> str | None:
    """What to type instead of the unknown option ``words[0]`` (``--lr 5e-3``); None where nothing is similar.

    ``options`` are the command's own. ``sections`` are those of the recipe whose settings it takes (None: all of them,
    empty: it takes none).
    """
    flag, equals, value = words[0].partition("=")
    if not equals and len(words) > 1 and not words[1].startswith("-") and "=" not in words[1]:
        value = words[1]
    name = flag.lstrip("-").replace("-", "_")
    paths = [path for path, _ in field_paths(Recipe) if sections is None or path.split(".")[0] in sections]
    fields = [path for path in paths if "." in path]
    meant = [path for path in fields if path in (name, f"{name}.path")]
    meant = meant or [path for path in fields if path.rpartition(".")[2] == name]
    if meant and len(meant) <= _MOST:
        return f"it is a setting: {' or '.join(f'{path}={value}' for path in meant)}"
    known = {option.lstrip("-").replace("-", "_"): option for option in options}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {known[near[0]]}?"
    by_name = {path.rpartition(".")[2]: path for path in fields}
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
    return f"did you mean the setting {by_name[close[0]]}={value}?" if close else None

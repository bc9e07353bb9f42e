"""`student.keep`: key/value groups that keep the model's softmax attention.

A group is one key/value head with its query heads. In a recipe the setting is a list of layers and groups
(`[23, 18.2, 7.10]`: all of layer 23, group 2 of layer 18, group 10 of layer 7), a share of the cache (`13%`) or a
number of groups (`12`); for the last two, the selection (`trenchcoat select`) decides which.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trenchcoat.config.errors import UserError

if TYPE_CHECKING:
    from trenchcoat.config.settings import StudentConfig

_ENTRY = re.compile(r"(\d+)(?:\.(\d+))?")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_NUMBER = re.compile(r"(\d+) groups?")


def read_keep(value: Any, path: str = "student.keep") -> tuple[str, ...]:
    """The setting in its canonical form: () for none; ``("13%",)``; ``("12 groups",)``; or sorted entries, "23" for a
    layer and "18.2" for a group.

    ``UserError`` for anything else, naming ``path``.
    """
    if value is None or value == "none":
        return ()
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        value = f"{value} groups"
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    texts = [str(item).strip() for item in items if not isinstance(item, bool)]
    if isinstance(value, str) or len(texts) == 1:
        request = _read_request(texts[0] if texts else "", path)
        if request is not None:
            return request
    alone = isinstance(value, str | float) or len(texts) != len(items)
    bad = next((text for text in texts if _ENTRY.fullmatch(text) is None), repr(value) if alone else None)
    if bad is not None:
        raise UserError(
            f"{path} must be a list of layers and groups such as [23, 18.2], a share of the cache such as 13%, or a "
            f"number of groups such as 12, got {bad}"
        )
    return tuple(sorted(dict.fromkeys(texts), key=_parsed))


def _read_request(text: str, path: str) -> tuple[str, ...] | None:
    share, number = _SHARE.fullmatch(text), _NUMBER.fullmatch(text)
    if share is not None:
        if not 0 < float(share.group(1)) < 100:
            raise UserError(f"{path} must be a share above 0 and below 100 %, got {text}")
        return (f"{float(share.group(1)):g}%",)
    if number is not None:
        return (f"{int(number.group(1))} groups",) if int(number.group(1)) else ()
    return None


def _parsed(entry: str) -> tuple[int, int]:
    """(layer, group); -1 for the whole layer."""
    layer, _, group = entry.partition(".")
    return int(layer), int(group) if group else -1


def needs_selection(student: StudentConfig) -> bool:
    """Whether `student.keep` says how much to keep, but not which groups."""
    return any(_ENTRY.fullmatch(entry) is None for entry in student.keep)


def number_of_groups(share: float, total: int) -> int:
    """Groups nearest to a share of ``total``: at least one, and one below all."""
    return min(max(1, round(share * total)), max(1, total - 1))


def requested_groups(student: StudentConfig, total: int) -> int:
    """Number of groups that `student.keep` asks a selection for, of ``total``; 0 if it asks for none.

    Raises ``UserError`` for a number that leaves nothing to linearize.
    """
    if not needs_selection(student):
        return 0
    share, number = _SHARE.fullmatch(student.keep[0]), _NUMBER.fullmatch(student.keep[0])
    if share is not None:
        return number_of_groups(float(share.group(1)) / 100, total)
    asked = int(number.group(1)) if number is not None else 0
    if asked >= total:
        raise UserError(f"student.keep={asked} must be below the number of key/value groups of the model, {total}")
    return asked


def kept_groups(student: StudentConfig, layer: int, groups: int) -> tuple[int, ...]:
    """The groups 0..groups-1 of a layer that keep softmax attention, whole layers included, in order.

    Raises ``UserError`` for a group that the layer does not have, and while `student.keep` still needs a selection.
    """
    if needs_selection(student):
        raise UserError(
            f"student.keep={student.keep[0]} does not say which groups to keep: run `trenchcoat select` (or linearize, "
            "which selects first), or name them, for example student.keep=[18.2,7.0]"
        )
    return _groups_of(student, layer, groups)


def _named(student: StudentConfig) -> list[tuple[int, int]]:
    """(layer, group) of every entry, as :func:`_parsed` gives them; none while `student.keep` needs a selection."""
    return [] if needs_selection(student) else [_parsed(entry) for entry in student.keep]


def _groups_of(student: StudentConfig, layer: int, groups: int) -> tuple[int, ...]:
    """:func:`kept_groups` of what is named so far."""
    named = [group for at, group in _named(student) if at == layer]
    if layer in student.keep_softmax or -1 in named:
        return tuple(range(groups))
    if named and max(named) >= groups:
        raise UserError(
            f"student.keep names group {layer}.{max(named)}, but layer {layer} has the key/value groups "
            f"{layer}.0 to {layer}.{groups - 1}"
        )
    return tuple(sorted(named))


def named_layers(student: StudentConfig) -> set[int]:
    """Every layer of which `student.keep` or `student.keep_softmax` names something."""
    return {*student.keep_softmax, *(layer for layer, _ in _named(student))}


def whole_layers(student: StudentConfig, groups: int) -> set[int]:
    """Layers of which all ``groups`` groups are kept, named as a whole or one by one, and so have no student."""
    return {layer for layer in named_layers(student) if len(_groups_of(student, layer, groups)) == groups}


def kept_total(student: StudentConfig, layers: int, groups: int) -> int:
    """Number of groups kept in a model of ``layers`` layers with ``groups`` groups each; those asked for, while they
    are not selected."""
    named = sum(len(_groups_of(student, layer, groups)) for layer in named_layers(student))
    return min(layers * groups, named + requested_groups(student, layers * groups))


def restricted(student: StudentConfig, layers: Iterable[int]) -> StudentConfig:
    """The student with only those kept groups that lie in ``layers``."""
    inside = set(layers)
    entries = student.keep if needs_selection(student) else [e for e in student.keep if _parsed(e)[0] in inside]
    whole = tuple(layer for layer in student.keep_softmax if layer in inside)
    return dataclasses.replace(student, keep=tuple(entries), keep_softmax=whole)

"""Names in a recipe that registries of later packages define, and what these say about other settings.

Nothing here imports PyTorch, and neither may the modules of these registries: a mistake is reported at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trenchcoat.config.errors import UserError


@dataclass(frozen=True)
class NameIn:
    """The value of a field is a name in a registry, as in ``Annotated[str, NameIn(...)]``.

    The registry's module is imported when names are checked or shown.
    """

    module: str
    registry: str
    also: tuple[str, ...] = ()
    """Further values."""

    @property
    def entries(self) -> Any:
        """The registry."""
        return getattr(importlib.import_module(self.module), self.registry)

    @property
    def names(self) -> tuple[str, ...]:
        """The values that are valid now."""
        return (*self.also, *self.entries)


STUDENT_NAMES = NameIn("trenchcoat.students.registry", "STUDENTS")
"""Values of `student.name`; an entry says which settings its student does not use."""


def resolved(entry: Any) -> Any:
    """What an entry of a registry stands for: the object at ``package.module.Name``, or the entry itself."""
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


def unused_settings(student: str) -> tuple[str, ...]:
    """The settings of ``student`` (below ``student.``) that it does not use; none for an unknown name."""
    entries = STUDENT_NAMES.entries
    return entries[student].unused if student in entries else ()


def takes_whole_layers(student: str) -> bool:
    """Whether ``student`` takes the place of whole layers; False for an unknown name."""
    entries = STUDENT_NAMES.entries
    return student in entries and bool(entries[student].whole_layers)


def without_unused(document: Mapping[str, Any], before: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` (a recipe ``before`` with the overrides ``typed``, all as nested plain values) without the settings
    that its student does not use, if they were set for another student, which an override replaced.

    Raises ``UserError`` for those that were set for this student.
    """
    merged, old, own = (each.get("student") or {} for each in (document, before, typed))
    if not all(isinstance(each, Mapping) for each in (merged, old, own)) or "name" not in merged:
        return dict(document)
    unused = unused_settings(str(merged["name"]))
    replaced = old.get("name") != merged["name"]
    given = [name for name in unused if name in (own if replaced else merged)]
    if given:
        named = ", ".join(f"student.{name}{_value_of(merged[name])}" for name in given)
        raise UserError(f"student.name={merged['name']} does not use {named}: leave it out, or choose another student")
    return {**document, "student": {name: value for name, value in merged.items() if name not in unused}}


def _value_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return ""
    return f"={str(value).lower() if isinstance(value, bool) else value}"

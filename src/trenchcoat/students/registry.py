"""Student attentions by name. A new one is one file in this package and one line in STUDENTS.

Recipes are checked against this table before PyTorch is imported, so it names classes instead of importing them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trenchcoat.config import StudentConfig, UserError
from trenchcoat.config.registries import resolved

if TYPE_CHECKING:
    import torch

    from trenchcoat.students.base import StudentAttention


@dataclass(frozen=True)
class StudentEntry:
    """A student that recipes can name."""

    cls: str | type[StudentAttention]
    """Its class, or the path of its class."""
    unused: tuple[str, ...] = ()
    """Fields of `StudentConfig` without a meaning for it: a recipe that sets them for it is refused."""
    whole_layers: bool = False
    """Whether it takes the place of whole layers, none of whose groups can then be kept alone."""
    grows: bool = False
    """Whether its far part's share grows with the text, so that it fails beyond the rows that it was trained on."""


_NO_MAPS = ("feature_map", "tied", "key_maps", "affine")

STUDENTS: dict[str, StudentEntry] = {
    "terrace": StudentEntry("trenchcoat.students.window.TerraceAttention", grows=True),
    "sliding": StudentEntry("trenchcoat.students.window.SlidingAttention", grows=True),
    "linear": StudentEntry(
        "trenchcoat.students.linear.LinearAttention", ("window", "affine", "mix_init", "sinks"), grows=True
    ),
    "window_sinks": StudentEntry(
        "trenchcoat.students.window.WindowSinksAttention", ("feature_map", "tied", "key_maps", "affine", "mix_init")
    ),
    "terrace_gated": StudentEntry("trenchcoat.students.terrace_gated.TerraceGatedAttention", ("affine",)),
    "gdn": StudentEntry("trenchcoat.students.gdn.GatedDeltaAttention", _NO_MAPS),
    "kda": StudentEntry("trenchcoat.students.kda.KimiDeltaAttention", _NO_MAPS),
    "lightning": StudentEntry("trenchcoat.students.lightning.LightningAttention", _NO_MAPS),
    "gated_delta_layer": StudentEntry(
        "trenchcoat.students.gated_delta_layer.GatedDeltaLayer",
        (*_NO_MAPS, "window", "mix_init", "sinks"),
        whole_layers=True,
    ),
}
"""Name in a recipe (`student.name`) -> its class and the settings that it does not use."""


def register_student(name: str, cls: type[StudentAttention], *, unused: Sequence[str] = ()) -> type[StudentAttention]:
    """Make `cls` available as `student.name: <name>`; recipes that set one of the `unused` settings are refused.

    ValueError if the name is taken by another class, or one of these is no setting.
    """
    foreign = set(unused) - {each.name for each in fields(StudentConfig)}
    if foreign:
        raise ValueError(f"student {name!r}: {', '.join(sorted(foreign))} is no field of StudentConfig")
    if name in STUDENTS and student_class(name) is not cls:
        raise ValueError(f"student {name!r} is already {student_class(name).__name__}; choose another name")
    STUDENTS[name] = StudentEntry(cls, tuple(unused), cls.replaces_layer)
    return cls


def student_class(name: str) -> type[StudentAttention]:
    """The class registered as `name`; UserError with the nearest known name otherwise."""
    if name in STUDENTS:
        return resolved(STUDENTS[name].cls)
    near = difflib.get_close_matches(name, STUDENTS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"student.name is {name!r}; known students: {', '.join(sorted(STUDENTS))}{hint}")


def operator_of(cfg: StudentConfig, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """The implementation that `cfg.impl` selects for layers of this head size, dtype and device."""
    import torch

    with torch.device("meta"):
        student = build_student(cfg, num_heads=1, num_kv_heads=1, head_dim=head_dim, hidden_size=1)
    return student.implementation(dtype, device)


def build_student(
    cfg: StudentConfig,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    hidden_size: int | None = None,
) -> StudentAttention:
    """The student `cfg.name` for one layer. `hidden_size` is the width of the layer's input, which gated students
    read."""
    sizes: dict[str, Any] = {"head_dim": head_dim, "value_dim": value_dim, "hidden_size": hidden_size}
    return student_class(cfg.name)(cfg, num_heads=num_heads, num_kv_heads=num_kv_heads, **sizes)

"""Student attentions by name. A new one is one file in this package and one line in STUDENTS."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from trenchcoat.config import StudentConfig, UserError
from trenchcoat.students.base import StudentAttention
from trenchcoat.students.gdn import GatedDeltaAttention
from trenchcoat.students.lightning import LightningAttention
from trenchcoat.students.linear import LinearAttention
from trenchcoat.students.terrace_gated import TerraceGatedAttention
from trenchcoat.students.window import SlidingAttention, TerraceAttention, WindowSinksAttention

STUDENTS: dict[str, type[StudentAttention]] = {
    "terrace": TerraceAttention,
    "sliding": SlidingAttention,
    "linear": LinearAttention,
    "window_sinks": WindowSinksAttention,
    "terrace_gated": TerraceGatedAttention,
    "gdn": GatedDeltaAttention,
    "lightning": LightningAttention,
}
"""Name in a recipe (`student.name`) -> class."""


def register_student(name: str, cls: type[StudentAttention]) -> type[StudentAttention]:
    """Make `cls` available as `student.name: <name>`; ValueError if the name is taken by another class."""
    if STUDENTS.get(name, cls) is not cls:
        raise ValueError(f"student {name!r} is already {STUDENTS[name].__name__}; choose another name")
    STUDENTS[name] = cls
    return cls


def student_class(name: str) -> type[StudentAttention]:
    """The class registered as `name`; UserError with the nearest known name otherwise."""
    if name in STUDENTS:
        return STUDENTS[name]
    near = difflib.get_close_matches(name, STUDENTS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"student.name is {name!r}; known students: {', '.join(sorted(STUDENTS))}{hint}")


def check_used(cfg: StudentConfig, xent_weight: float = 0.0) -> None:
    """UserError for a student that does not exist, that does not use a setting that differs from its default, or that
    has no attention rows to compare (`transfer.xent_weight`)."""
    if xent_weight and not student_class(cfg.name).attention_rows:
        raise UserError(f"student.name={cfg.name} has no attention rows to compare; use transfer.xent_weight=0")
    default = StudentConfig()
    set_ = [name for name in student_class(cfg.name).unused if getattr(cfg, name) != getattr(default, name)]
    if set_:
        given = ", ".join(f"student.{name}={getattr(cfg, name)}" for name in set_)
        plain = " ".join(f"student.{name}={str(getattr(default, name)).lower()}" for name in set_)
        raise UserError(f"student.name={cfg.name} does not use {given}: add {plain}, or choose another student")


def operator_of(cfg: StudentConfig, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """The implementation that `cfg.impl` selects for layers of this head size, dtype and device."""
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

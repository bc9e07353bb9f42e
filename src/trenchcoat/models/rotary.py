"""Rotary embeddings whose frequencies depend on the length of the text (longrope of Phi-3 and Phi-4, dynamic NTK).

A state keeps keys and features that were rotated when they were read. If the frequencies change later, the same text
read whole gives other results than text read in pieces, or generated across that length.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LengthDependence:
    """How rotary frequencies depend on the length."""

    kind: str
    """Transformers' name of it."""
    limit: int
    """Tokens up to which they stay as they are."""

    def changes(self, before: int, after: int) -> bool:
        """Whether ``before`` tokens that were read alone have other frequencies as the first of ``after`` tokens."""
        return 0 < before < after and after > self.limit and (before <= self.limit or self.kind != "longrope")

    def __str__(self) -> str:
        more = "other ones" if self.kind == "longrope" else "ones that depend on the length"
        return (
            f"the model's rotary embedding is {self.kind!r}: texts of more than {self.limit} tokens use {more}, so "
            "what is read in pieces or generated across that length differs from the same text read whole"
        )


def length_dependence(config: Any) -> LengthDependence | None:
    """How the rotary frequencies of a model with this config depend on the length; None where they do not.

    Of several (one for each kind of layer), the one that changes first.
    """
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = []
    for one in (rotary, *(part for part in rotary.values() if isinstance(part, Mapping))):
        kind = str(one.get("rope_type", "default"))
        if kind == "longrope":
            own = one.get("original_max_position_embeddings")
            limit = own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        elif "dynamic" in kind:
            limit = config.max_position_embeddings
        else:
            continue
        found.append(LengthDependence(kind, int(limit)))
    return min(found, key=lambda one: one.limit, default=None)


def warn_of_pieces(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the decoder: in student mode, warn once when new tokens change the frequencies of those that
    a cache holds. `trenchcoat_rotary` is the :class:`LengthDependence` of `decoder`, or None after the warning."""
    dependence: LengthDependence | None = decoder.trenchcoat_rotary
    cache = kwargs.get("past_key_values")
    if dependence is None or cache is None or getattr(decoder, "trenchcoat_mode", "teacher") != "student":
        return
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    before = int(cache.get_seq_length())
    if dependence.changes(before, before + next(t.shape[1] for t in given if t is not None)):
        decoder.trenchcoat_rotary = None
        warnings.warn(f"{dependence}. Keep a text within {dependence.limit} tokens, or read it whole", stacklevel=2)

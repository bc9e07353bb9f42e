"""The original's settings and keys in terms of ours, and which of our settings the original supports.

Sources: the LoLCATs repository (https://github.com/HazyResearch/lolcats) and the paper (arXiv 2410.10254).

Shape legend: H query heads, D head dim, P columns of a map.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trenchcoat.config import FeatureMapConfig, LoraConfig, StudentConfig, UserError
from trenchcoat.config.recipe_io import recipe_from_dict
from trenchcoat.models.lolcats.files import Key, StateFile

ATTENTIONS = {
    "lolcats_llama": "linear",
    "lolcats_llama_window_tk": "terrace",
    "lolcats_long_llama_window_tk": "terrace",
    "lolcats_llama_window_tk_gen": "terrace",
    "lolcats_llama_window_sw": "sliding",
    "lolcats_long_llama_window_sw": "sliding",
}
"""Attention types of the original; those for long inputs compute the same function in chunks."""

FEATURE_MAPS = {"softmax_dim": "hedgehog", "exp_dim": "exp", "relu": "t2r", "pos_elu": "elu"}
HALVED = ("softmax_dim", "exp_dim")
"""Feature maps that `fullspace: false` halves."""

FAMILIES = ("llama", "mistral")
"""Families that the original has classes for."""

WINDOWED = ("terrace", "sliding")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Settings of a checkpoint given by the user, in the original's terms or ours; None: taken from the file."""

    attention: str | None = None
    window: int | None = None
    feature_map: str | None = None
    skip: bool | None = None
    affine: bool | None = None
    keep_softmax: tuple[int, ...] | None = None
    lora_alpha: float | None = None


def one_of(word: Any, known: Mapping[str, str], what: str) -> str:
    """`known[word]`; UserError with the nearest word otherwise."""
    if word in known:
        return known[word]
    raise UserError(f"{what} is {word!r}; {expected(word, known)}")


def expected(word: Any, known: Iterable[str]) -> str:
    """The known words and the nearest one, for a message."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"known: {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def student_of(found: StateFile, asked: Asked) -> StudentConfig:
    """The student of a checkpoint: from its own settings, else from its keys, with the user's settings on top.

    Raises UserError for unsupported maps, and for an attention that its keys contradict.
    """
    mixed = any(name == "window_factors" for _, name in found.maps)
    start = found.settings.get("student")
    student = _recognised(found, mixed) if start is None else _checked({"student": start}).student
    if asked.attention is not None:
        known = {**ATTENTIONS, **{ours: ours for ours in dict.fromkeys(ATTENTIONS.values())}}
        student = replace(student, name=one_of(asked.attention, known, "--attention"))
    if asked.feature_map is not None:
        ours = {f"{name}{half}": f"{name}{half}" for name in ("hedgehog", "exp") for half in ("", "_half")}
        known = {**FEATURE_MAPS, **ours, "t2r": "t2r", "elu": "elu"}
        name: Any = one_of(asked.feature_map, known, "--feature-map")
        bias = any(inner.endswith(".mlp.bias") for _, inner in found.maps)
        maps = replace(student.feature_map, name=name, bias=None if bias == (name == "t2r") else bias)
        student = replace(student, feature_map=maps)
    if asked.skip is not None:
        student = replace(student, feature_map=replace(student.feature_map, skip=asked.skip))
    given = {name: getattr(asked, name) for name in ("window", "affine", "keep_softmax")}
    student = replace(student, **{name: value for name, value in given.items() if value is not None})
    if (student.name in WINDOWED) != mixed:
        has = "has window_factors" if mixed else "has no window_factors"
        raise UserError(f"{found.path} {has}, so its attention cannot be {student.name!r}; expected {_fitting(mixed)}")
    return _checked({"student": plain(student)}).student


def _fitting(mixed: bool) -> str:
    return " or ".join(name for name in dict.fromkeys(ATTENTIONS.values()) if (name in WINDOWED) == mixed)


def _recognised(found: StateFile, mixed: bool) -> StudentConfig:
    """From the keys alone: window factors mean a window (the default one), a bias means rectified maps."""
    names = {name for _, name in found.maps}
    strange = sorted(n for n in names if n.startswith("feature_map_") and n.rpartition(".")[2] not in ("layer", "bias"))
    if strange:
        raise UserError(
            f"{found.path} has {strange[0]}, of a bottleneck adapter (untied_head_adapter), which has biases that our "
            "maps do not have; only untied_head_einsum can be imported"
        )
    layer = next((t for (_, name), t in sorted(found.maps.items()) if name == "feature_map_q.mlp.layer"), None)
    if layer is None or layer.ndim != 3:
        raise UserError(
            f"{found.path} has no feature_map_q.mlp.layer [heads, head_dim, feature_dim]; is it the feature maps' file?"
        )
    bias = "feature_map_q.mlp.bias" in names
    maps = FeatureMapConfig(name="t2r" if bias else "hedgehog", feature_dim=max(1, layer.shape[2]))
    tied = not any(name.startswith("feature_map_k.") for name in names)
    return StudentConfig(name="terrace" if mixed else "linear", feature_map=maps, tied=tied)


def lora_of(found: StateFile, asked: Asked) -> LoraConfig | None:
    """The LoRA of a checkpoint; its alpha is not in the keys (default: twice the rank, as in all of the original's)."""
    if not found.lora:
        return None
    start = found.settings.get("lora")
    if start is None:
        shapes = [t for (_, name), t in sorted(found.lora.items()) if name.endswith("lora_A") and t.ndim == 2]
        if not shapes:
            raise UserError(f"{found.path} has no lora_A matrix [rank, inputs]")
        rank = max(1, shapes[0].shape[0])
        targets = sorted({name.partition(".")[0] for _, name in found.lora})
        start = {"rank": rank, "alpha": 2.0 * rank, "targets": targets}
    if not isinstance(start, Mapping):
        raise UserError(f"{found.path}: its settings of the LoRA should be a dictionary, got {start!r}")
    if asked.lora_alpha is not None:
        start = {**start, "alpha": asked.lora_alpha}
    return _checked({"lora": dict(start)}).lora


def _checked(sections: dict[str, Any]) -> Any:
    """A recipe with these sections, every value of the right kind and in its range; UserError otherwise."""
    return recipe_from_dict({**sections, "data": {"seq_len": 1 << 30}})


def plain(student: StudentConfig) -> dict[str, Any]:
    """The student's settings as plain values."""
    return {**asdict(student), "keep": list(student.keep), "keep_softmax": list(student.keep_softmax)}


def check_exportable(student: StudentConfig, family: str) -> None:
    """Raise UserError for a student whose attention the original does not have."""
    defaults = StudentConfig()
    reason = None
    if family not in FAMILIES:
        reason = f"it has classes for {' and '.join(FAMILIES)} models only, not for {family}"
    elif student.name not in ATTENTIONS.values():
        reason = f"it has no attention like student.name={student.name}"
    elif student.keep:
        reason = f"it keeps softmax attention in whole layers only (student.keep_softmax), not in {student.keep[0]}"
    elif student.kept_log_scale is not None:
        reason = f"its softmax layers have no scale by position (student.kept_log_scale={student.kept_log_scale:g})"
    elif student.sinks != defaults.sinks:
        reason = f"its windows have no sinks (student.sinks={student.sinks})"
    elif student.feature_map.adapter_dim is not None:
        reason = "its bottleneck adapter is another function than student.feature_map.adapter_dim"
    if reason is not None:
        raise UserError(f"this adapter cannot be written for the original code: {reason}")


def original_words(student: StudentConfig) -> dict[str, Any]:
    """The keys of the original's model configuration under `attention` that this student needs there."""
    attention = {"linear": "lolcats_llama", "terrace": "lolcats_llama_window_tk", "sliding": "lolcats_llama_window_sw"}
    whole = student.feature_map.name.removesuffix("_half")
    words: dict[str, Any] = {
        "attention_type": attention[student.name],
        "feature_map": {ours: theirs for theirs, ours in FEATURE_MAPS.items()}[whole],
        "feature_map_kwargs.fullspace": not student.feature_map.name.endswith("_half"),
        "learned_kernel": "untied_head_einsum",
        "learned_kernel_kwargs.feature_dim": student.feature_map.feature_dim,
        "learned_kernel_kwargs.skip_connection": student.feature_map.skip,
        "tie_qk_kernels": student.tied,
    }
    if student.name in WINDOWED:
        words |= {"window_size": student.window, "affine_attention_factors": student.affine}
    if student.keep_softmax:
        words["softmax_attentions"] = list(student.keep_softmax)
    return words


def layers_of(keys: Iterable[Key]) -> list[int]:
    """Layer indices, in order."""
    return sorted({layer for layer, _ in keys})

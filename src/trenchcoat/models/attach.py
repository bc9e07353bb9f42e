"""Attach students to a model, detach them, and set the mode that it runs in.

    attach_students(model, cfg.student)      the model still computes exactly what it did (mode `teacher`)
    set_mode(model, "transfer")              students learn alongside it
    set_mode(model, "student")               the students' outputs take the place of softmax attention

No modelling file is touched: a student is a submodule `self_attn.student` of its layer, and
:mod:`trenchcoat.models.interface` is the function that the model's own `self_attn` calls.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trenchcoat.config import StudentConfig, UserError
from trenchcoat.config.keep import kept_groups, named_layers
from trenchcoat.config.recipe_io import check_section
from trenchcoat.models.families import AttentionSite, attention_sites, decoder_of
from trenchcoat.models.interface import (
    ATTENTION_NAME,
    CALL_NAME,
    LOG_SCALE,
    Output,
    count_real_tokens,
    hand_over_cache,
    replace_forward,
    restore_forward,
    student_of,
)
from trenchcoat.models.rotary import length_dependence, warn_of_pieces
from trenchcoat.models.transformers_internals import attention_name, choose_attention
from trenchcoat.runtime.sharding import compute_device, is_sharded, whole
from trenchcoat.students import Mode, StudentAttention, build_student, operator_of
from trenchcoat.students.heads import KeptHeads

UNSAVED = "(linearized in memory: save_pretrained, and load that folder)"
"""Name of a model with students that are in no folder of its own."""


def attach_students(model: nn.Module, cfg: StudentConfig) -> dict[int, StudentAttention]:
    """Attach a student to the attention of every layer; returns them by layer index.

    Layers that keep softmax attention as a whole get none; in a layer with kept groups, the student has the other heads
    (`cfg.keep`, `cfg.keep_softmax`).

    The model is in mode `teacher` afterwards: it computes what it did before. Parameters of students are float32, on
    the device of their layer. Raises `UnsupportedFamilyError` for unsupported families, and UserError for settings that
    do not fit the model, which is then unchanged.
    """
    importlib.import_module("trenchcoat.models.saving")  # from now on `save_pretrained` knows students
    sites = attention_sites(model)
    if students_of(model):
        raise UserError("this model has students already; use replace_students, or detach_students first")
    kept = _kept_sites(sites, cfg)
    linear = [site for site in sites if len(kept[site.index]) < site.num_kv_heads]
    students = {site.index: _build(site, cfg, kept[site.index]).to(_device_of(model, site)) for site in linear}
    for site in sites:
        site.module.teacher_attention = _implementation(site)
        if site.index in students:
            site.module.student = students[site.index]
            if students[site.index].replaces_layer:
                replace_forward(site.module)
            else:
                site.module.register_forward_pre_hook(hand_over_cache, with_kwargs=True)
    model.register_forward_pre_hook(_refuse_labels, with_kwargs=True)
    _name(model, UNSAVED)
    decoder: Any = decoder_of(model)
    decoder.register_forward_pre_hook(count_real_tokens, with_kwargs=True)
    decoder.trenchcoat_rotary = length_dependence(decoder.config)
    if decoder.trenchcoat_rotary is not None:
        decoder.register_forward_pre_hook(warn_of_pieces, with_kwargs=True)
    set_mode(model, "teacher")
    return students


def detach_students(model: nn.Module) -> None:
    """Remove the students, which restores the model as it was before `attach_students` (LoRA stays)."""
    set_mode(model, "teacher")
    for site in attention_sites(model):
        if student_of(site.module) is not None:
            del site.module.student
        for name in ("teacher_attention", LOG_SCALE):
            if hasattr(site.module, name):
                delattr(site.module, name)
        _remove_hook(site.module, hand_over_cache)
        restore_forward(site.module)
    _remove_hook(model, _refuse_labels)
    _name(model, getattr(getattr(model, "config", None), "name_or_path", ""))
    for hook in (count_real_tokens, warn_of_pieces):
        _remove_hook(decoder_of(model), hook)


def _name(model: Any, name: str) -> None:
    """Set where a model in memory is said to be from, unless it is from a folder that has the students.

    PEFT writes this into its adapters as their base model: one over students must not open over the plain model.
    """
    if hasattr(model, "name_or_path") and getattr(model.config, "trenchcoat", None) is None:
        model.name_or_path = name


def _refuse_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: in transfer mode the loss of the labels would be the teacher's, of which no student learns."""
    if kwargs.get("labels") is not None and mode_of(model) == "transfer":
        raise UserError(
            "the model is in transfer mode, where each layer's student learns within the forward pass and the labels "
            "teach nothing: run trenchcoat.transfer(...), or set_mode(model, 'student') to train on labels"
        )


def _remove_hook(module: nn.Module, hook: object) -> None:
    for key in [key for key, found in module._forward_pre_hooks.items() if found is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def replace_students(model: nn.Module, cfg: StudentConfig) -> dict[int, StudentAttention]:
    """Replace the students with new ones of another configuration, in the same mode."""
    mode = mode_of(model)
    detach_students(model)
    students = attach_students(model, cfg)
    set_mode(model, mode)
    return students


def students_of(model: nn.Module) -> dict[int, StudentAttention]:
    """The students of a model by layer index, in order; empty when there are none."""
    found = {m.layer_idx: m for m in model.modules() if isinstance(m, StudentAttention)}
    return dict(sorted(found.items()))


def student_config(model: nn.Module) -> StudentConfig:
    """The configuration of the attached students; UserError when there are none."""
    for student in students_of(model).values():
        return student.cfg
    raise UserError("this model has no students; call attach_students(model, cfg) first")


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Choose what the layers return: `teacher` and `transfer` the model's own attention, `student` the student's."""
    if mode not in ("teacher", "transfer", "student"):
        raise UserError(f"mode is {mode!r}; expected 'teacher', 'transfer' or 'student'")
    students = students_of(model)
    if not students and mode != "teacher":
        raise UserError(f"mode {mode!r} needs students; call attach_students(model, cfg) first")
    for config, own in _configs(model):
        choose_attention(config, own if mode == "teacher" else ATTENTION_NAME)
    if students:
        _choose_outputs(model, mode)


@contextmanager
def own_outputs(model: nn.Module) -> Iterator[None]:
    """Inside the block the layers return their own attention, as in mode `teacher`.

    The layers still call this package's attention function, so no config changes: cheaper than two `set_mode`.
    """
    if not students_of(model):
        yield
        return
    mode = mode_of(model)
    _choose_outputs(model, "teacher")
    try:
        yield
    finally:
        _choose_outputs(model, mode)


def _choose_outputs(model: nn.Module, mode: Mode) -> None:
    students = students_of(model)
    for student in students.values():
        student.mode = mode
    decoder_of(model).trenchcoat_mode = mode
    base = next(iter(students.values())).cfg.kept_log_scale
    if base is not None:
        _scale_kept(model, students, base if mode == "student" else None)


def _scale_kept(model: nn.Module, students: dict[int, StudentAttention], base: float | None) -> None:
    """Have the scores of all heads that keep softmax attention multiplied by log_base(t + base); None: as they are."""
    for site in attention_sites(model):
        student = students.get(site.index)
        setattr(site.module, LOG_SCALE, base if student is None or student.kept is not None else None)


@contextmanager
def attention_through(model: nn.Module, function: Callable[..., Output]) -> Iterator[list[AttentionSite]]:
    """Inside the block every layer calls `function` as its attention; yields the layers.

    `function` gets what a registered attention function gets (the mask is a `LazyMask`) and may call
    `interface.own_attention`. The model must have no students (so its outputs are those of the original model); raises
    `UnsupportedFamilyError` for unsupported families.
    """
    if students_of(model):
        raise ValueError("remove the students first: detach_students(model)")
    configs, sites = _configs(model), attention_sites(model)
    for site in sites:
        site.module.teacher_attention = _implementation(site)
        site.module.attention_call = function
    for config, _ in configs:
        choose_attention(config, CALL_NAME)
    try:
        yield sites
    finally:
        for config, own in configs:
            choose_attention(config, own)
        for site in sites:
            del site.module.teacher_attention, site.module.attention_call


def mode_of(model: nn.Module) -> Mode:
    """The mode of the attached students; `teacher` when there are none."""
    for student in students_of(model).values():
        return student.mode
    return "teacher"


def set_far(model: nn.Module, enabled: bool) -> None:
    """Switch the far (linear) part of every student on or off; off shows what the window does alone."""
    for student in students_of(model).values():
        student.far_enabled = enabled


def set_kept_log_scale(model: nn.Module, base: float | None) -> None:
    """Set `student.kept_log_scale` of a model with students; UserError for a base that is not above 1."""
    cfg = dataclasses.replace(student_config(model), kept_log_scale=base)
    check_section(cfg, "student")
    students = students_of(model)
    for student in students.values():
        student.cfg = cfg
    _scale_kept(model, students, base if mode_of(model) == "student" else None)


def set_state_dtype(model: nn.Module, dtype: str) -> None:
    """Set the dtype of new generation caches: `float32` (keys and values: the model's own) or `bfloat16`.

    A cache in use keeps its dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"state dtype is {dtype!r}; expected float32 or bfloat16")
    for student in students_of(model).values():
        student.state_dtype = torch.float32 if dtype == "float32" else torch.bfloat16


def student_implementation(model: nn.Module, cfg: StudentConfig, *, dtype: torch.dtype, device: torch.device) -> str:
    """The implementation that `student.impl` selects in a model whose layers compute in `dtype` on `device`."""
    return operator_of(cfg, head_dim=attention_sites(model)[0].head_dim, dtype=dtype, device=device)


def teacher_implementation(model: nn.Module) -> str:
    """Name of the attention that the model's softmax layers run (for the log and the run's record)."""
    return ", ".join(sorted({_implementation(site) for site in attention_sites(model)}))


def _kept_sites(sites: list[AttentionSite], cfg: StudentConfig) -> dict[int, tuple[int, ...]]:
    """The kept groups of every layer."""
    cfg.check("student")
    indices = {site.index for site in sites}
    kept = {site.index: kept_groups(cfg, site.index, site.num_kv_heads) for site in sites}
    unknown = sorted(named_layers(cfg) - indices)
    if unknown:
        name = "keep_softmax" if unknown[0] in cfg.keep_softmax else "keep"
        raise UserError(f"student.{name} names layer {unknown[0]}, but the model's layers are 0..{max(indices)}")
    if all(len(kept[site.index]) == site.num_kv_heads for site in sites):
        name = "keep" if cfg.keep else "keep_softmax"
        raise UserError(f"student.{name} names all {len(sites)} layers; leave out the ones to linearize")
    return kept


def start_student(student: StudentAttention, module: Any) -> None:
    """Initial values of a student of the layer `module` (its `self_attn`), copies of its projections included."""
    student.reset_parameters()
    if student.replaces_layer:
        _copy_projections(student, module)


def _copy_projections(student: StudentAttention, module: Any) -> None:
    """UserError for a layer whose projections the student cannot copy; they may be on the meta device, to be copied
    later."""
    named = {name: p for name, p in module.named_parameters() if name.split(".")[0] in _COPIED}
    where, name = f"layer {student.layer_idx} ({type(module).__name__})", student.cfg.name
    lost = [f"{part}.weight" for part in _COPIED[:4] if f"{part}.weight" not in named]
    if lost:
        raise UserError(
            f"student.name={name} starts from q_proj, k_proj, v_proj and o_proj, but {where} has no {lost[0]}"
        )
    if any(not p.is_floating_point() for p in named.values()):
        raise UserError(f"student.name={name} copies the projections, which are in 4 bits: use model.quantize=none")
    tensors = {name: whole(p.detach()) for name, p in named.items() if not p.is_meta}
    if len(tensors) < len(named) or any(p.is_meta for p in student.parameters()):
        return
    bias = tensors.get("o_proj.bias")
    if bias is not None and bool(bias.any()):
        raise UserError(
            f"student.name={name} has no bias in its output projection, but o_proj.bias of {where} is not 0"
        )
    student.copy_projections({name: tensor.cpu() for name, tensor in tensors.items()})


_COPIED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def _build(site: AttentionSite, cfg: StudentConfig, kept: tuple[int, ...]) -> StudentAttention:
    """A student whose random initial values depend on torch's seed and its layer, not on which others are built."""
    heads = {"num_heads": site.num_heads, "num_kv_heads": site.num_kv_heads}
    free = site.num_kv_heads - len(kept)
    sizes = {"num_heads": site.num_heads // site.num_kv_heads * free, "num_kv_heads": free, "head_dim": site.head_dim}
    sizes["hidden_size"] = site.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash((torch.initial_seed(), site.index)) % (1 << 62))
        try:
            student = build_student(cfg, **sizes)
        except ValueError as error:
            raise UserError(f"the student does not fit layer {site.index}: {error}") from error
    student.layer_idx = site.index
    student.kept = KeptHeads(kept, **heads) if kept else None
    if student.replaces_layer:
        student.norm_eps = float(getattr(site.module.config, "rms_norm_eps", student.norm_eps))
        _copy_projections(student, site.module)
    student.train(site.module.training)
    return student


def _device_of(model: nn.Module, site: AttentionSite) -> torch.device:
    """The device of a layer."""
    weight = next(site.module.parameters(), None)
    return compute_device(model) if weight is None or is_sharded(model) else weight.device


def _implementation(site: AttentionSite) -> str:
    """The attention implementation that the config of a layer names (never ours)."""
    known = site.module.__dict__.get("teacher_attention")
    named = known or attention_name(site.module.config)
    if named == ATTENTION_NAME:
        raise UserError(
            f"the model was loaded with attn_implementation={ATTENTION_NAME!r}, which needs students to run; "
            "load it with its own (sdpa, eager, ...) and attach students"
        )
    return str(named or "eager")


def _configs(model: nn.Module) -> list[tuple[Any, str]]:
    """Every config object that chooses an attention implementation, with the model's own choice for it."""
    found: dict[int, tuple[Any, str]] = {}
    own = ""
    for site in attention_sites(model):
        own = _implementation(site)
        found.setdefault(id(site.module.config), (site.module.config, own))
    for config in (getattr(model, "config", None), getattr(decoder_of(model), "config", None)):
        if config is not None:
            found.setdefault(id(config), (config, own))
    return list(found.values())


def freeze_for_transfer(model: nn.Module) -> list[nn.Parameter]:
    """Only the students' parameters require gradients; returns them."""
    model.requires_grad_(False)
    return require_grad(p for student in students_of(model).values() for p in student.parameters())


def require_grad(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Make parameters trainable; returns them."""
    chosen = list(parameters)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen

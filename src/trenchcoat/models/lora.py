"""LoRA (https://arxiv.org/abs/2106.09685): add, merge and remove it. This is the only file that uses PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trenchcoat.config import LoraConfig, UserError
from trenchcoat.config.recipe_io import check_section
from trenchcoat.models.attach import require_grad, students_of
from trenchcoat.models.families import attention_sites, choose_lora_targets, linear_layers
from trenchcoat.models.transformers_internals import checkpoint_activations
from trenchcoat.runtime.sharding import compute_device, is_sharded, is_sharded_tensor

_ADAPTER = "default"
"""PEFT's name for the model's single adapter."""

_SHAPE = ("rank", "alpha", "dropout", "targets")
"""Fields of LoraConfig that shape what is saved (the others are about training)."""


def add_lora(model: Any, cfg: LoraConfig) -> list[str]:
    """Add LoRA to the linear layers `cfg.targets` of every layer's attention and MLP; returns their paths.

    In families with a fused `qkv_proj` or `gate_up_proj`, LoRA goes there. LoRA's parameters are float32. Only LoRA is
    trainable afterwards (and the students with `cfg.train_feature_maps`). Raises UserError for targets that the model
    does not have.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    if has_lora(model):
        raise UserError("this model has a LoRA already; merge_lora or remove_lora first")
    paths = lora_targets(model, cfg.targets)
    settings = PeftLoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=paths, bias="none"
    )
    inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    model.train(model.training)  # new modules start in training mode, with dropout
    model.trenchcoat_lora = lora_shape(cfg)
    device = compute_device(model) if is_sharded(model) else None
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(device, torch.float32)
    freeze_for_lora(model, cfg)
    if cfg.gradient_checkpointing:
        checkpoint_activations(model)
    return paths


def freeze_for_lora(model: nn.Module, cfg: LoraConfig) -> list[nn.Parameter]:
    """Only LoRA's parameters require gradients, and the students' with `cfg.train_feature_maps`; returns them."""
    lora = list(lora_parameters(model).values())
    if not lora:
        raise UserError("there is no LoRA in this model; call add_lora(model, cfg) first")
    model.requires_grad_(False)
    maps = [p for student in students_of(model).values() for p in student.parameters()]
    return require_grad(lora + (maps if cfg.train_feature_maps else []))


def has_lora(model: nn.Module) -> bool:
    """True when a LoRA is in the model and not merged."""
    return bool(lora_parameters(model))


def lora_shape(cfg: LoraConfig) -> dict[str, Any]:
    """The settings that a LoRA is saved with, as plain values."""
    return {name: getattr(cfg, name) for name in _SHAPE} | {"targets": list(cfg.targets)}


def add_saved_lora(model: Any, shape: Mapping[str, Any]) -> None:
    """Add a LoRA of the settings that :func:`lora_shape` gave; UserError for those that this version does not know."""
    try:
        cfg = LoraConfig(**{**shape, "targets": tuple(shape["targets"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"these LoRA settings were written by another version of trenchcoat: {error}") from error
    check_section(cfg, "lora")
    add_lora(model, cfg)


def lora_settings(model: nn.Module) -> dict[str, Any] | None:
    """As :func:`lora_shape` gives them, of the LoRA in the model; None without one.

    Raises UserError for a LoRA that :func:`add_lora` did not add.
    """
    if not has_lora(model):
        return None
    known: dict[str, Any] | None = getattr(model, "trenchcoat_lora", None)
    if known is None:
        raise UserError(
            "the model has a LoRA that trenchcoat.add_lora did not add, so its settings are not known: merge it first "
            "(PEFT: merge_and_unload), or add LoRA with trenchcoat.add_lora(model, cfg)"
        )
    return known


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside the block LoRA's updates are not added; `requires_grad` is as before afterwards."""
    layers = [layer for _, layer in _lora_layers(model)] if has_lora(model) else []
    learned = {id(p) for p in lora_parameters(model).values() if p.requires_grad}
    for layer in layers:
        layer.enable_adapters(False)  # this changes requires_grad, and so does the way back
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in lora_parameters(model).values():
            parameter.requires_grad_(id(parameter) in learned)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA's parameters by the names they are saved under, e.g. `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return {n.replace(f".{_ADAPTER}.", "."): p for n, p in model.named_parameters() if "lora_" in n}


def merge_lora(model: nn.Module) -> None:
    """Add LoRA's updates to the weights and remove LoRA. No-op without LoRA."""
    _take_out_lora(model, merge=True)


def remove_lora(model: nn.Module) -> None:
    """Remove LoRA without merging it. No-op without LoRA."""
    _take_out_lora(model, merge=False)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have after `merge_lora`; the model is not changed.

    Tensors are the model's own, except for merged weights, which are new.
    """
    state = {name: t for name, t in model.state_dict(keep_vars=False).items() if "lora_" not in name}
    state = {name.replace(".base_layer.", "."): t for name, t in state.items()}
    for path, layer in _lora_layers(model):
        weight = _whole_weight(path, layer)
        update = layer.get_delta_weight(_ADAPTER)
        state[f"{path}.weight"] = (weight.float() + update.float()).to(weight.dtype).detach()
    return state


def _whole_weight(path: str, layer: Any) -> Tensor:
    """The base weight under a LoRA; UserError for one that cannot be updated: quantized, or sharded."""
    weight: Tensor = layer.get_base_layer().weight
    if not weight.is_floating_point() or is_sharded_tensor(weight):
        raise UserError(
            f"LoRA cannot be merged into {path}, whose weight is quantized or sharded: save the adapter, "
            "and merge it over the ordinary base with `trenchcoat export --merge`"
        )
    return weight


def lora_targets(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Paths of the linear layers that `lora.targets` names; UserError for one that the model does not have.

    A layer whose student takes the place of its projections has none in them: they are computed for the teacher alone.
    """
    paths, students = [], students_of(model)
    for site in attention_sites(model):
        known = linear_layers(model, site)
        chosen = [known[name][0] for name in choose_lora_targets(targets, known, f"layer {site.index}")]
        if site.index in students and students[site.index].replaces_layer:
            chosen = [path for path in chosen if not path.startswith(f"{site.name}.")]
        paths += chosen
    if not paths:
        raise UserError(
            f"lora.targets={','.join(targets)} are projections of layers that the students take the place of: use "
            "lora.train=mixer or all, or name layers of the MLP (gate_proj, up_proj, down_proj)"
        )
    return paths


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _take_out_lora(model: nn.Module, *, merge: bool) -> None:
    if not has_lora(model):
        return
    for path, layer in _lora_layers(model):
        base = layer.get_base_layer()
        if merge:
            _whole_weight(path, layer)
            update = layer.get_delta_weight(_ADAPTER)
            base.weight.data = (base.weight.data.float() + update.float()).to(base.weight.dtype)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, base)
    for name in ("peft_config", "trenchcoat_lora"):
        if hasattr(model, name):
            delattr(model, name)

"""What stage 2 trains: LoRA (and the mixers), the mixers alone, or every weight.

The *mixers* are the students' own parameters: feature maps and mixes. Every weight is trained in float32. The weights
as they were are kept in their own precision: the teacher of a divergence computes with them, and ``end_stage_2`` puts
them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trenchcoat.config import LoraConfig, UserError
from trenchcoat.models.attach import own_outputs, require_grad, students_of
from trenchcoat.models.identity import base_tensors, fingerprint
from trenchcoat.models.lora import add_lora, freeze_for_lora, remove_lora, without_lora
from trenchcoat.models.transformers_internals import checkpoint_activations
from trenchcoat.runtime.sharding import is_sharded


def begin_stage_2(model: Any, cfg: LoraConfig) -> None:
    """Add what `cfg.train` needs, with new values: LoRA, or float32 weights.

    Raises UserError for targets that the model does not have, and for weights that cannot be trained: sharded or
    quantized.
    """
    if cfg.train == "lora":
        add_lora(model, cfg)
        return
    if cfg.train == "all":
        _open_weights(model)
    if cfg.gradient_checkpointing:
        checkpoint_activations(model)


def freeze_for_stage_2(model: nn.Module, cfg: LoraConfig) -> list[nn.Parameter]:
    """Only what `cfg.train` and `cfg.train_feature_maps` name requires gradients; returns it."""
    if cfg.train == "lora":
        return freeze_for_lora(model, cfg)
    model.requires_grad_(False)
    chosen = [p for student in students_of(model).values() for p in student.parameters()]
    if not cfg.train_feature_maps:
        chosen = []
    return require_grad([*chosen, *(base_tensors(model).values() if cfg.train == "all" else ())])


def end_stage_2(model: nn.Module) -> None:
    """Remove LoRA, and put back the weights that the model was loaded with. No-op where there is nothing to undo."""
    remove_lora(model)
    kept = _kept(model)
    if kept is None:
        return
    for name, parameter in base_tensors(model).items():
        parameter.data, parameter.grad = kept[name], None
    model.requires_grad_(False)
    opened: Any = model
    del opened.trenchcoat_base, opened.trenchcoat_fingerprint


def trains_all(model: nn.Module) -> bool:
    """Whether every weight of `model` is what was learned."""
    return bool(getattr(model, "trenchcoat_whole", False)) or _kept(model) is not None


def holds_teacher(model: nn.Module) -> bool:
    """Whether a loaded model still has its teacher's weights: an adapter has, a merged model and one whose every weight
    was trained have not."""
    return hasattr(model, "trenchcoat_adapter") and not trains_all(model)


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` is its own teacher: its own attention and weights, no LoRA, evaluation mode.

    Everything but the evaluation mode is as before afterwards.
    """
    model.eval()
    with without_lora(model), own_outputs(model):
        kept = _kept(model)
        if kept is None:
            yield
            return
        tensors = base_tensors(model)
        learned = {name: parameter.data for name, parameter in tensors.items()}
        for name, parameter in tensors.items():
            parameter.data = kept[name]
        try:
            yield
        finally:
            for name, parameter in tensors.items():
                parameter.data = learned[name]


def _kept(model: nn.Module) -> dict[str, Tensor] | None:
    kept: dict[str, Tensor] | None = getattr(model, "trenchcoat_base", None)
    return kept


def _open_weights(model: Any) -> None:
    """Keep the base weights, and give the model float32 copies to train."""
    if is_sharded(model):
        raise UserError("lora.train=all needs every weight on each process: set parallel.shard=none")
    if getattr(model, "is_quantized", False):
        raise UserError("lora.train=all cannot train 4-bit weights: set model.quantize=none, or lora.train=lora")
    if _kept(model) is not None:
        raise UserError("every weight of this model is being trained already; call end_stage_2(model) first")
    model.trenchcoat_fingerprint = fingerprint(model)
    tensors = base_tensors(model)
    model.trenchcoat_base = {name: parameter.data for name, parameter in tensors.items()}
    for parameter in tensors.values():
        parameter.data = parameter.data.to(torch.float32, copy=True)

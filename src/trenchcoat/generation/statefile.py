"""Saved states: files of constant size, however long the text.

A file fits one model: it records a hash of the first values of all weights, adapters included, and of the students'
settings. It holds no text except tokens that the model has not read yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from trenchcoat.config import UserError
from trenchcoat.models.attach import student_config, students_of
from trenchcoat.models.cache import StateLayer, state_layer
from trenchcoat.ops import RowState
from trenchcoat.runtime.files import CorruptFileError, load_tensors, save_tensors
from trenchcoat.runtime.sharding import first_elements

_FORMAT = "trenchcoat state 1"
"""Written into every file."""

ELEMENTS = 256
"""Number of leading values of each parameter that are hashed."""


def function_identity(model: nn.Module) -> str:
    """A hash of what the model computes: the parameters' first values (rounded to bfloat16) and the students' settings.

    A merged model and its adapter have different hashes, since their weights are rounded differently.
    """
    settings = asdict(student_config(model))
    settings.pop("impl")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = first_elements(parameter, ELEMENTS).to(torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def save_state(path: Path | str, model: nn.Module, cache: Cache, pending: Sequence[int] = ()) -> None:
    """Write `cache` (of a linearized model in mode `student`) to a safetensors file, atomically.

    `pending` are tokens that the cache has not seen yet, such as the last one generated. Raises
    UserError if the cache is empty or has layers that keep softmax attention (whose caches grow), and SaveError if
    the disk is full.
    """
    layers = students_of(model)
    tensors: dict[str, Tensor] = {}
    tokens = 0
    for index in range(max(len(cache.layers), len(layers))):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if index not in layers:
            raise UserError(
                f"layer {index} keeps softmax attention, whose cache grows with the text; such a state cannot be saved"
            )
        if not isinstance(layer, StateLayer) or layer.state is None:
            raise UserError("this cache holds no state: read some text with the model in mode 'student' first")
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in layer.state.tensors().items()}
        tokens = layer.tokens
    record = {
        "format": _FORMAT,
        "identity": function_identity(model),
        "tokens": str(tokens),
        "pending": json.dumps([int(token) for token in pending]),
    }
    save_tensors(Path(path), tensors, record)


def load_state(path: Path | str, model: nn.Module) -> tuple[Cache, list[int]]:
    """(cache, pending tokens) of a file that :func:`save_state` wrote, on the devices of the model's layers.

    Continue with `model.generate(ids, attention_mask=<ones for all tokens>, past_key_values=cache)`, where `ids` are
    the pending tokens and the new ones. Raises UserError for another model's file, CorruptFileError for a damaged
    file.
    """
    where = Path(path)
    tensors, record = load_tensors(where), _record(where)
    if record.get("format") != _FORMAT:
        raise UserError(f"{where} is not a saved state ({_FORMAT!r}); create one with --save-state")
    if record.get("identity") != function_identity(model):
        raise UserError(
            f"{where} was written by another model (other weights, adapter or student settings); load it with "
            "that model"
        )
    try:
        tokens, pending = int(record["tokens"]), [int(token) for token in json.loads(record["pending"])]
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{where} is damaged: its record of tokens cannot be read ({error})") from error
    cache = DynamicCache(config=model.config)
    students, used = students_of(model), 0
    for index, student in students.items():
        prefix = f"layers.{index}."
        found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        used += len(found)
        state = _checked(where, index, found, student, tokens)
        state_layer(cache, index).advance(state, tokens)
    if used != len(tensors):
        raise CorruptFileError(f"{where} is damaged: it holds tensors of layers that the model does not have")
    return cache, pending


def _record(path: Path) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} is not a readable safetensors file ({error})") from error


def _checked(path: Path, index: int, found: dict[str, Any], student: Any, tokens: int) -> RowState:
    """The state of one layer; raises CorruptFileError naming what is wrong."""
    seen = found.get("seen_B")
    if seen is None or seen.dtype != torch.int64 or seen.ndim != 1 or not len(seen):
        raise CorruptFileError(f"{path} is damaged: layers.{index}.seen_B is missing or not whole numbers")
    state: RowState = student.empty_state(len(seen), dtype=torch.float32, device="meta")
    wanted = state.tensors()
    for name, like in wanted.items():
        tensor = found.get(name)
        if tensor is None or tensor.shape != like.shape or tensor.is_floating_point() != like.is_floating_point():
            what = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise CorruptFileError(
                f"{path} is damaged: layers.{index}.{name} is {what}, expected {tuple(like.shape)} {like.dtype}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CorruptFileError(f"{path} is damaged: layers.{index}.{name} holds values that are not finite")
    if len(found) != len(wanted) or not bool(((seen >= 0) & (seen <= tokens)).all()):
        raise CorruptFileError(f"{path} is damaged: layer {index} does not agree with the recorded {tokens} tokens")
    weight = next(iter(student.parameters()), None)
    device = torch.device("cpu") if weight is None else weight.device
    return state.replaced({name: tensor.to(device, copy=True) for name, tensor in found.items()})

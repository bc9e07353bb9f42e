"""Saved states: files of constant size, however long the text, and the keys and values of what keeps softmax attention.

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
from torch import Tensor, nn
from transformers import Cache

from trenchcoat.config import UserError
from trenchcoat.models.attach import student_config, students_of
from trenchcoat.models.cache import StateLayer, new_cache, state_layer
from trenchcoat.models.families import attention_sites
from trenchcoat.models.transformers_internals import cache_layer, keys_and_values, restore_keys_and_values
from trenchcoat.ops import RowState
from trenchcoat.runtime.files import CONTENT, CorruptFileError, read_tensors, save_tensors
from trenchcoat.runtime.sharding import first_elements

_FORMAT = "trenchcoat state 3"
"""Written into every file."""

_KEPT = "kept."
"""Begins the names of a linearized layer's keys and values of kept groups."""

ELEMENTS = 256
"""Number of leading values of each parameter that are hashed."""


def function_identity(model: nn.Module) -> str:
    """A hash of what the model computes: the parameters' first values (rounded to bfloat16) and the students' settings.

    A merged model and its adapter have different hashes, since their weights are rounded differently.
    """
    settings = asdict(student_config(model))
    settings.pop("impl")
    if settings["kept_log_scale"] is None:  # files of before this setting stay valid
        del settings["kept_log_scale"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = first_elements(parameter, ELEMENTS).to(torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def save_state(path: Path | str, model: nn.Module, cache: Cache, pending: Sequence[int] = ()) -> None:
    """Write `cache` (of a linearized model in mode `student`) to a safetensors file, atomically.

    `pending` are tokens that the cache has not seen yet, such as the last one generated. Keys and values of kept groups
    and layers are written too, so with those the file grows with the text. Raises UserError if the cache is empty, and
    SaveError if the disk is full.
    """
    layers = students_of(model)
    tensors: dict[str, Tensor] = {}
    tokens = 0
    for index in range(max(len(cache.layers), len(layers))):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if index not in layers:
            found = dict(zip(("keys", "values"), keys_and_values(layer), strict=False))
        elif isinstance(layer, StateLayer) and layer.state is not None:
            found, tokens = dict(layer.state.tensors()), layer.tokens
            if layer.kept is not None:
                found |= {f"{_KEPT}{name}": tensor for name, tensor in layer.kept.tensors().items()}
        else:
            raise UserError("this cache holds no state: read some text with the model in mode 'student' first")
        tensors |= {f"layers.{index}.{name}": tensor.contiguous() for name, tensor in found.items()}
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
    tensors, record = read_tensors(where)
    if record.get("format") != _FORMAT:
        raise UserError(f"{where} is not a saved state ({_FORMAT!r}); create one with --save-state")
    if CONTENT not in record:
        raise CorruptFileError(f"{where} is damaged: it has no checksum; save the state again")
    if record.get("identity") != function_identity(model):
        raise UserError(
            f"{where} was written by another model (other weights, adapter or student settings); load it with "
            "that model"
        )
    try:
        tokens, pending = int(record["tokens"]), [int(token) for token in json.loads(record["pending"])]
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{where} is damaged: its record of tokens cannot be read ({error})") from error
    _check_counts(where, tokens, pending, int(model.config.get_text_config().vocab_size))  # type: ignore[operator, union-attr]
    cache = new_cache(model)
    students, used = students_of(model), 0
    for site in attention_sites(model):
        index, prefix = site.index, f"layers.{site.index}."
        found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        used += len(found)
        device = next(site.module.parameters()).device
        if index not in students:
            held = _checked_keys(where, index, found, (site.num_kv_heads, tokens), device)
            restore_keys_and_values(cache_layer(cache, index), held["keys"], held["values"], tokens)
            continue
        student = students[index]
        kept = {name.removeprefix(_KEPT): found.pop(name) for name in list(found) if name.startswith(_KEPT)}
        state = _checked(where, index, found, student, tokens)
        layer = state_layer(cache, index)
        layer.advance(state, tokens)
        if student.kept is not None:
            held = _checked_keys(where, index, kept, (len(student.kept.groups), tokens), device)
            layer.kept_keys(None).restore(held, tokens)
    if used != len(tensors):
        raise CorruptFileError(f"{where} is damaged: it holds tensors of layers that the model does not have")
    return cache, pending


def _check_counts(path: Path, tokens: int, pending: Sequence[int], vocabulary: int) -> None:
    """Raise CorruptFileError for a negative number of tokens, or a pending token that the model does not have."""
    if tokens < 0:
        raise CorruptFileError(f"{path} is damaged: it says that {tokens} tokens were read")
    strange = [token for token in pending if not 0 <= token < vocabulary]
    if strange:
        raise CorruptFileError(
            f"{path} is damaged: the pending token {strange[0]} is none of the model's {vocabulary} tokens"
        )


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
        if name in state.positive_fields and bool((tensor < 0).any()):
            raise CorruptFileError(f"{path} is damaged: layers.{index}.{name} is negative, a sum of features never is")
    if len(found) != len(wanted) or not bool(((seen >= 0) & (seen <= tokens)).all()):
        raise CorruptFileError(f"{path} is damaged: layer {index} does not agree with the recorded {tokens} tokens")
    weight = next(iter(student.parameters()), None)
    device = torch.device("cpu") if weight is None else weight.device
    return state.replaced({name: tensor.to(device, copy=True) for name, tensor in found.items()})


def _checked_keys(
    path: Path, index: int, found: dict[str, Tensor], sizes: tuple[int, int], device: torch.device
) -> dict[str, Tensor]:
    """Keys and values of one layer, of `sizes` = (heads, tokens at most); raises CorruptFileError for others."""
    heads, tokens = sizes
    keys, values, real = found.get("keys"), found.get("values"), found.get("real")
    fits = keys is not None and values is not None and keys.ndim == values.ndim == 4
    if fits and keys is not None and values is not None:
        fits = keys.shape[1] == heads and keys.shape[2] <= tokens and keys.shape[:3] == values.shape[:3]
        fits = fits and bool(keys.isfinite().all()) and bool(values.isfinite().all())
        fits = fits and (real is None or (real.dtype == torch.bool and real.shape == (keys.shape[0], tokens)))
    if not fits or set(found) - {"keys", "values", "real"}:
        raise CorruptFileError(
            f"{path} is damaged: the keys and values of layer {index} are missing, not finite, or not of {heads} heads "
            f"and at most {tokens} tokens"
        )
    return {name: tensor.to(device, copy=True) for name, tensor in found.items()}

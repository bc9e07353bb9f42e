"""The identity of a base model: a hash that tells whether an adapter or a checkpoint was made for these weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trenchcoat.runtime.sharding import first_elements
from trenchcoat.runtime.weightfiles import tensor_files

SAMPLES, ELEMENTS = 8, 4096
"""Number of matrices sampled, and of leading values of each."""

_CONFIG_ESSENTIALS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own parameters under their original names: no students, no LoRA, no PEFT prefixes."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".student." in name or ".modules_to_save." in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        found[plain] = parameter
    return found


def fingerprint(model: nn.Module) -> str:
    """Identity of the base weights, the same before and after students and (unmerged) LoRA are attached.

    A hash of the config's sizes and of the first ``ELEMENTS`` values of ``SAMPLES`` matrices spread over the model,
    rounded to bfloat16, so that loading in float32 or bfloat16 gives the same answer. (Loading float32 weights as
    float16 rounds twice and may differ.) A quantized model has the fingerprint of its files
    (:func:`remember_fingerprint`). Raises ``ValueError`` for weights on the meta device.
    """
    known = getattr(model, "trenchcoat_fingerprint", None)
    if known is not None:
        return str(known)
    tensors = base_tensors(model)

    def first(name: str) -> Tensor:
        """The first values of a parameter."""
        if tensors[name].is_meta:
            raise ValueError(f"fingerprint: {name} is on the meta device; load the weights first")
        return first_elements(tensors[name], ELEMENTS)

    return _digest(model.config, {name: tuple(p.shape) for name, p in tensors.items()}, first)


def file_fingerprint(plain: nn.Module, folder: Path, other: Callable[[str, int], Tensor]) -> str:
    """The fingerprint of the model in a folder, read from its safetensors files alone.

    ``plain`` is that model on the meta device; ``other`` returns the first elements [count] of a parameter that is not
    in the files. Raises ``UserError`` for a folder without safetensors files.
    """
    where = tensor_files(folder)

    def first(name: str) -> Tensor:
        """The first values of a parameter."""
        if name not in where:
            return other(name, ELEMENTS)
        with safe_open(str(where[name]), framework="pt") as opened:
            stored = opened.get_slice(name)
            columns = 1
            for size in stored.get_shape()[1:]:
                columns *= size
            part: Tensor = stored[: -(-ELEMENTS // columns)]
            return first_elements(part, ELEMENTS)

    return _digest(plain.config, {name: tuple(p.shape) for name, p in base_tensors(plain).items()}, first)


def remember_fingerprint(model: nn.Module, plain: nn.Module, folder: Path) -> None:
    """Set the fingerprint of ``model``, whose weights differ from its files, to that of the files in ``folder``.

    ``plain`` is the same model as the files describe it, on the meta device. Raises ``UserError`` for a folder without
    safetensors files, ``KeyError`` for a parameter whose name they do not have.
    """

    def unknown(name: str, count: int) -> Tensor:
        """No fallback."""
        raise KeyError(name)

    marked: Any = model
    marked.trenchcoat_fingerprint = file_fingerprint(plain, folder, unknown)


def _digest(config: Any, shapes: Mapping[str, tuple[int, ...]], first: Callable[[str], Tensor]) -> str:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    essentials: dict[str, Any] = {"model_type": str(config.model_type).removeprefix("linearized_")}
    essentials |= {name: getattr(config, name, None) for name in _CONFIG_ESSENTIALS}
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    matrices = sorted(name for name, shape in shapes.items() if len(shape) >= 2)
    if not matrices:
        raise ValueError("fingerprint: the model has no weight matrices")
    for index in sorted({round(i * (len(matrices) - 1) / (SAMPLES - 1)) for i in range(SAMPLES)}):
        name = matrices[index]
        digest.update(f"{name}{shapes[name]}".encode())
        digest.update(first(name).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]

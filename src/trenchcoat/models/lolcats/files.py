"""The original's `.pt` files: read without executing anything in them, with normalized keys, and written.

A file is a dictionary of tensors, bare or under `model_state_dict`, with keys such as
`model.layers.0.self_attn.feature_map_q.mlp.layer` or `base_model.model.model.layers.0.self_attn.q_proj.lora_A.
default.weight`. Files written here also hold our settings, under `trenchcoat`; the original ignores them. The
published ones are on the hub (:data:`PUBLISHED`), each repository with one file.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from trenchcoat.config import UserError
from trenchcoat.runtime.files import atomic_directory

Key = tuple[int, str]
"""(layer, name under `self_attn`), e.g. (0, "feature_map_q.mlp.layer") or (0, "q_proj.lora_A")."""

PUBLISHED = {
    "hazyresearch/lolcats-llama-3.1-8b-distill": "feature maps of Llama 3.1 8B (--maps)",
    "hazyresearch/lolcats-llama-3.1-8b-ft-lora": "LoRA of Llama 3.1 8B (--lora)",
    "hazyresearch/lolcats-llama-3.1-70b": "both of Llama 3.1 70B, in one file (--maps)",
    "hazyresearch/lolcats-llama-3.1-405b": "both of Llama 3.1 405B, in one file (--maps)",
}
"""The repositories of checkpoints that the authors published, and what is in them."""

HUB_FILE = "model.pt"
"""The file of a repository."""

STATE, SETTINGS = "model_state_dict", "trenchcoat"

_KEY = re.compile(r"(?:(?:base_model|model|module)\.)*layers\.(\d{1,5})\.self_attn\.(.+)")
_MAP = re.compile(r"feature_map_[qk]\.mlp\.\w+|window_factors")
_LORA = re.compile(r"(\w+\.lora_[AB])\.(?:\w+\.)?weight")
_BUFFER = re.compile(r"(?:[\w.]+\.)?rotary_emb\.\w+")
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
_DAMAGED = (
    pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    ArithmeticError, AssertionError, ImportError,
)  # fmt: skip
"""What torch's reader raises for files that are not torch's, truncated or tampered with."""


@dataclass
class StateFile:
    """The tensors of one file (or of several, the later ones winning), and the settings stored with them."""

    path: Path
    maps: dict[Key, Tensor] = field(default_factory=dict)
    lora: dict[Key, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    """Keys of buffers that a model computes itself."""

    def update(self, later: StateFile) -> None:
        """Add everything in `later`, which wins."""
        self.maps |= later.maps
        self.lora |= later.lora
        self.settings |= later.settings
        self.ignored += later.ignored


def fetched(source: Path | str) -> Path:
    """The file that `source` names: a path, or the hub id of a repository that holds a `model.pt`.

    Raises UserError for a repository that cannot be read, naming the published ones.
    """
    text = str(source)
    if Path(text).exists() or text.endswith(".pt") or re.fullmatch(r"\w[\w.\-]*/\w[\w.\-]*", text) is None:
        return Path(text)
    try:
        return Path(hf_hub_download(text, HUB_FILE))
    except (OSError, ValueError, HfHubHTTPError) as error:
        known = "; ".join(f"{name}: {what}" for name, what in PUBLISHED.items())
        raise UserError(
            f"{text} is no file here, and {HUB_FILE} of the repository of that name on the hub cannot be read: "
            f"{' '.join(str(error).split())[:200]}. Published are {known}"
        ) from error


def read_state(path: Path) -> StateFile:
    """Read a `.pt` file through torch's restricted unpickler; UserError for anything but tensors under known keys."""
    content = _load(path)
    state = content.get(STATE, content)
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: {STATE} should be a dictionary of tensors, it is {_describe(state)}")
    found = StateFile(path)
    settings = content.get(SETTINGS, {}) if state is not content else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: {SETTINGS} should be a dictionary of settings, it is {_describe(settings)}")
    found.settings = settings
    for name, tensor in state.items():
        if isinstance(name, str) and _BUFFER.fullmatch(name):
            found.ignored.append(name)
            continue
        key, lora = _key(path, name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise UserError(f"{path}: {name} should be a tensor of numbers, it is {_describe(tensor)}")
        part = found.lora if lora else found.maps
        if key in part:
            raise UserError(f"{path} has layer {key[0]}'s {key[1]} twice, under two prefixes ({name}); remove one")
        part[key] = tensor
    return found


def _load(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .pt file of the original code")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch did not write: their content is checked instead
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        refused = _REFUSED.search(str(error))
        if refused is not None:
            raise UserError(
                f"{path} was not read: it is a pickle that calls {refused[1]}, which could execute code. Only plain "
                "tensors are accepted; save only the state dictionary"
            ) from error
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged, or no .pt file of tensors: {said}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} should hold a dictionary of tensors, it holds {_describe(content)}")
    return content


def _key(path: Path, name: Any) -> tuple[Key, bool]:
    """(key, whether it is of a LoRA)."""
    found = _KEY.fullmatch(name) if isinstance(name, str) else None
    if found is not None:
        layer, inner = int(found[1]), found[2]
        lora = _LORA.fullmatch(inner)
        if lora is not None:
            return (layer, lora[1]), True
        if _MAP.fullmatch(inner):
            return (layer, inner), False
    raise UserError(
        f"{path}: key {str(name)[:120]!r} is neither a feature map, a window factor nor a LoRA of an attention layer; "
        "expected keys like model.layers.0.self_attn.feature_map_q.mlp.layer"
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor of {value.dtype}".replace("torch.", "")
    return f"{type(value).__name__} {str(value)[:60]!r}"


def write_states(out: Path, files: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
    """Write `out` with one `.pt` file per name: (tensors by their full key, settings); atomically."""
    with atomic_directory(out) as partial:
        for name, (tensors, settings) in files.items():
            plain = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
            torch.save({STATE: plain, SETTINGS: dict(settings)}, partial / name)

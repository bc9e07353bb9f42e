"""Configuration files in the schema of the original research code, found by name or path and checked key by key.

One key is ours: ``base`` names one file or several of the same kind, in the file's own folder or in the configuration
folders, which the file's own keys override (later files override earlier ones, mappings are merged).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import key_hint, read_yaml

ConfigKind = Literal["model", "experiment"]

_KEYS: dict[ConfigKind, str] = {
    "model": """
: name
model: pretrained_model_name_or_path pretrained_model_name_or_path_backup! cache_dir! return_dict load_in_8bit
model: load_in_4bit device_map low_cpu_mem_usage torch_dtype attn_implementation rope_theta
model.rope_scaling: type rope_type factor low_freq_factor high_freq_factor original_max_position_embeddings
attention: attention_type state_chunk_len window_size decode_window_size! affine_attention_factors init_window_factor
attention: train_window_factor train_attention_weights feature_map layer_idx learned_kernel tie_qk_kernels train_qk
attention: softmax_attentions
attention.feature_map_kwargs: eps mlp fullspace
attention.learned_kernel_kwargs: feature_dim skip_connection bias zero_init normal_init hidden_dim
""",
    "experiment": """
dataset: name preprocess_config
dataset.dataset_config: name path chunk_size concat_data cache_dir! validation_rows train_data eval_data
dataset.dataset_config: num_train_samples max_train_samples! max_eval_num max_length min_length chat_template! seed
dataset.dataset_config: load_from_cache_file esl_model_config! filter_by_esl dataloaders_dir! use_c4
dataset.pretrained_model_config: pretrained_model_name_or_path cache_dir pretrained_model_name_or_path_backup
dataloader: batch_size num_workers drop_last pin_memory
optimizer: optim lr weight_decay max_optimizer_steps
lr_scheduler: lr_scheduler_type mode factor patience min_lr num_warmup_steps num_training_steps!
trainer: name reverse_kl mse_factor xent_factor bf16 train_split val_split num_train_epochs gradient_accumulation_steps
trainer: seed batch_size load_best_model_at_end greater_is_better metric_for_best_model logging_steps
trainer: evaluation_strategy eval_strategy max_steps eval_steps max_eval_batches num_save_ckpt_steps
finetune: method trainable_weights
finetune.kwargs: r lora_alpha lora_dropout target_modules
fsdp: save_model run_validation use_fp16 save_optimizer gradient_clipping gradient_clipping_threshold
""",
}
"""Every key of the two schemas, after its section. A ``!`` marks a key that might be expected to have an effect and has
none: if a file sets it, the warning names it. The other keys without a counterpart (``return_dict``, ``device_map``,
``pin_memory``, ...) describe how the original loaded or logged, and are ignored.
"""


def _paths(kind: ConfigKind) -> list[str]:
    sections = (line.split(": ") for line in _KEYS[kind].strip().splitlines())
    return [f"{section}.{key}".lstrip(".") for section, keys in sections for key in keys.split()]


_KNOWN = {kind: [path.rstrip("!") for path in _paths(kind)] for kind in _KEYS}
_NO_EFFECT = [path.rstrip("!") for kind in _KEYS for path in _paths(kind) if path.endswith("!")]


@dataclass(frozen=True)
class OldConfig:
    """One file with its bases merged in."""

    file: str
    values: Mapping[str, Any]

    def at(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path; ``default`` if absent or null."""
        value: Any = self.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return default if value is None else value

    def named(self, path: str) -> bool:
        """Whether the file has the path at all, even as null."""
        head, _, last = path.rpartition(".")
        parent = self.at(head) if head else self.values
        return isinstance(parent, Mapping) and last in parent

    def without_effect(self) -> list[str]:
        """The keys marked in the schema that the file sets."""
        return [path for path in _NO_EFFECT if self.at(path) is not None]


def read_config(kind: ConfigKind, name: str, folders: Sequence[Path]) -> OldConfig:
    """The configuration ``name``: a file's path, or a file under ``<folder>/<kind>`` of the first folder that has it.

    Raises ``UserError`` for one that is not found, is not YAML, or holds a key that the schema does not know.
    """
    places = [folder / kind for folder in folders]
    return OldConfig(name, _resolve(kind, _find(kind, name, places), places, ()))


def _find(kind: ConfigKind, name: str, places: Sequence[Path]) -> Path:
    plain = Path(name)
    if plain.is_file():
        return plain
    for place in places:
        for candidate in (place / name, place / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    names = sorted({str(p.relative_to(place).with_suffix("")) for place in places for p in place.rglob("*.yaml")})
    near = difflib.get_close_matches(name.removesuffix(".yaml"), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "give a file's path or one of these names"
    looked = " and ".join(str(place) for place in places)
    raise UserError(f"there is no {kind} configuration {name!r}, as a file or in {looked}; {hint}")


def _resolve(kind: ConfigKind, file: Path, places: Sequence[Path], above: tuple[Path, ...]) -> dict[str, Any]:
    if file.resolve() in above:
        raise UserError(f"{file} is its own base, through {' -> '.join(path.name for path in above)}")
    document = read_yaml(file)
    bases = document.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{file}: base must be the name of a configuration or a list of them, got {bases!r}")
    _check(str(file), document, _KNOWN[kind], "")
    merged: dict[str, Any] = {}
    for base in bases:
        found = _find(kind, base, [file.parent, *places])
        merged = _merge_over(merged, _resolve(kind, found, places, (*above, file.resolve())))
    return _merge_over(merged, document)


def _check(file: str, document: Mapping[str, Any], known: list[str], path: str) -> None:
    for key, value in document.items():
        full = f"{path}.{key}" if path else str(key)
        if full in known:
            continue
        if not any(one.startswith(f"{full}.") for one in known):
            raise UserError(f"{file}: unknown key {full}: {key_hint(full, known)}")
        if isinstance(value, Mapping):
            _check(file, value, known, full)
        elif value is not None:
            raise UserError(f"{file}: {full} must be a mapping of keys, got {value!r}")


def _merge_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` merged into ``below``: mappings key by key, everything else replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge_over(old, value) if both else value  # type: ignore[arg-type]
    return merged

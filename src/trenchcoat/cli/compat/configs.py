"""Configuration files in the schema of the original research code, found by name or path and checked key by key.

One key is ours: ``base`` names one file or several of the same kind, beside the file itself or in the configuration
folders, over which the file's own keys are laid (later over earlier, mappings merged).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import parse_yaml

Kind = Literal["model", "experiment"]

_MODEL = """
name
model.pretrained_model_name_or_path model.pretrained_model_name_or_path_backup model.cache_dir model.return_dict
model.load_in_8bit model.load_in_4bit model.device_map model.low_cpu_mem_usage model.torch_dtype
model.attn_implementation model.rope_theta
model.rope_scaling.type model.rope_scaling.rope_type model.rope_scaling.factor model.rope_scaling.low_freq_factor
model.rope_scaling.high_freq_factor model.rope_scaling.original_max_position_embeddings
attention.attention_type attention.state_chunk_len attention.window_size attention.decode_window_size
attention.affine_attention_factors attention.init_window_factor attention.train_window_factor
attention.train_attention_weights attention.feature_map attention.feature_map_kwargs.eps
attention.feature_map_kwargs.mlp attention.feature_map_kwargs.fullspace attention.layer_idx attention.learned_kernel
attention.learned_kernel_kwargs.feature_dim attention.learned_kernel_kwargs.skip_connection
attention.learned_kernel_kwargs.bias attention.learned_kernel_kwargs.zero_init
attention.learned_kernel_kwargs.normal_init attention.learned_kernel_kwargs.hidden_dim
attention.tie_qk_kernels attention.train_qk attention.softmax_attentions
"""
_EXPERIMENT = """
dataset.name dataset.preprocess_config
dataset.dataset_config.name dataset.dataset_config.path dataset.dataset_config.chunk_size
dataset.dataset_config.concat_data dataset.dataset_config.cache_dir dataset.dataset_config.validation_rows
dataset.dataset_config.train_data dataset.dataset_config.eval_data dataset.dataset_config.num_train_samples
dataset.dataset_config.max_train_samples dataset.dataset_config.max_eval_num dataset.dataset_config.max_length
dataset.dataset_config.min_length dataset.dataset_config.chat_template dataset.dataset_config.seed
dataset.dataset_config.load_from_cache_file dataset.dataset_config.esl_model_config
dataset.dataset_config.filter_by_esl dataset.dataset_config.dataloaders_dir dataset.dataset_config.use_c4
dataset.pretrained_model_config.pretrained_model_name_or_path dataset.pretrained_model_config.cache_dir
dataset.pretrained_model_config.pretrained_model_name_or_path_backup
dataloader.batch_size dataloader.num_workers dataloader.drop_last dataloader.pin_memory
optimizer.optim optimizer.lr optimizer.weight_decay optimizer.max_optimizer_steps
lr_scheduler.lr_scheduler_type lr_scheduler.mode lr_scheduler.factor lr_scheduler.patience lr_scheduler.min_lr
lr_scheduler.num_warmup_steps lr_scheduler.num_training_steps
trainer.name trainer.reverse_kl trainer.mse_factor trainer.xent_factor trainer.bf16 trainer.train_split
trainer.val_split trainer.num_train_epochs trainer.gradient_accumulation_steps trainer.seed trainer.batch_size
trainer.load_best_model_at_end trainer.greater_is_better trainer.metric_for_best_model trainer.logging_steps
trainer.evaluation_strategy trainer.eval_strategy trainer.max_steps trainer.eval_steps trainer.max_eval_batches
trainer.num_save_ckpt_steps
finetune.method finetune.kwargs.r finetune.kwargs.lora_alpha finetune.kwargs.lora_dropout
finetune.kwargs.target_modules finetune.trainable_weights
fsdp.save_model fsdp.run_validation fsdp.use_fp16 fsdp.save_optimizer fsdp.gradient_clipping
fsdp.gradient_clipping_threshold
"""
_KNOWN: dict[Kind, list[str]] = {"model": _MODEL.split(), "experiment": _EXPERIMENT.split()}

NO_EFFECT = (
    "model.cache_dir", "model.pretrained_model_name_or_path_backup", "attention.decode_window_size",
    "dataset.dataset_config.cache_dir", "dataset.dataset_config.max_train_samples",
    "dataset.dataset_config.chat_template", "dataset.dataset_config.esl_model_config",
    "dataset.dataset_config.dataloaders_dir", "lr_scheduler.num_training_steps",
)  # fmt: skip
"""Keys that might be expected to act and do not; a file that sets one has it named in the warning.

The other keys without a counterpart (``return_dict``, ``device_map``, ``pin_memory``, ...) describe how the original
loaded or logged, and are read over.
"""


@dataclass(frozen=True)
class OldConfig:
    """One file with its bases merged in."""

    file: str
    values: Mapping[str, Any]

    def at(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path; ``default`` where the file says nothing or null."""
        value: Any = self.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return default if value is None else value

    def named(self, path: str) -> bool:
        """Whether the file names the path at all, be it as null."""
        head, _, last = path.rpartition(".")
        parent = self.at(head) if head else self.values
        return isinstance(parent, Mapping) and last in parent

    def without_effect(self) -> list[str]:
        """The keys of :data:`NO_EFFECT` that the file sets."""
        return [path for path in NO_EFFECT if self.at(path) is not None]


def read_config(kind: Kind, name: str, folders: Sequence[Path]) -> OldConfig:
    """The configuration ``name``: a file's path, or a file under ``<folder>/<kind>`` of the first folder that has it.

    Raises ``UserError`` for one that is not found, is not YAML, or holds a key that the schema does not know.
    """
    places = [folder / kind for folder in folders]
    return OldConfig(name, _resolve(kind, _find(kind, name, places), places, ()))


def _find(kind: Kind, name: str, places: Sequence[Path]) -> Path:
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


def _resolve(kind: Kind, file: Path, places: Sequence[Path], above: tuple[Path, ...]) -> dict[str, Any]:
    if file.resolve() in above:
        raise UserError(f"{file} is its own base, by way of {' -> '.join(path.name for path in above)}")
    try:
        document = parse_yaml(str(file), file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start})") from error
    bases = document.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{file}: base must be the name of a configuration or a list of them, got {bases!r}")
    _check(str(file), document, _KNOWN[kind], "")
    merged: dict[str, Any] = {}
    for base in bases:
        found = _find(kind, base, [file.parent, *places])
        merged = _laid_over(merged, _resolve(kind, found, places, (*above, file.resolve())))
    return _laid_over(merged, document)


def _check(file: str, document: Mapping[str, Any], known: list[str], path: str) -> None:
    for key, value in document.items():
        full = f"{path}.{key}" if path else str(key)
        if full in known:
            continue
        if not any(one.startswith(f"{full}.") for one in known):
            raise UserError(f"{file}: unknown key {full}: {_suggestion(str(key), full, known)}")
        if isinstance(value, Mapping):
            _check(file, value, known, full)
        elif value is not None:
            raise UserError(f"{file}: {full} must be a mapping of keys, got {value!r}")


def _suggestion(key: str, full: str, known: list[str]) -> str:
    elsewhere = [path for path in known if path.rpartition(".")[2] == key]
    near = elsewhere or difflib.get_close_matches(full, known, n=1, cutoff=0.7)
    if not near:
        by_leaf = {path.rpartition(".")[2]: path for path in known}
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(key, list(by_leaf), n=1, cutoff=0.6)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    head = full.rpartition(".")[0]
    siblings = sorted({path.removeprefix(f"{head}.").split(".")[0] for path in known if path.startswith(head)})
    return f"expected one of {', '.join(siblings)}"


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` merged into ``below``: mappings key by key, everything else replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _laid_over(old, value) if both else value  # type: ignore[arg-type]
    return merged

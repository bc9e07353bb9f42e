"""Translate the original's settings to the recipe's: one function per section, plain mappings in and out.

Sources for what the settings mean: the LoLCATs repository (https://github.com/HazyResearch/lolcats) and the paper
(arXiv 2410.10254). Values are checked where the recipe is built (``recipe_io``); here only values without a counterpart
are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trenchcoat.cli.compat.configs import OldConfig
from trenchcoat.config import StageConfig, UserError
from trenchcoat.data.files import FILE_KINDS
from trenchcoat.models.lolcats.settings import ATTENTIONS, FEATURE_MAPS, HALVED, expected, one_of
from trenchcoat.students import STUDENTS

Section = dict[str, Any]

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw")
_SCHEDULES = {
    **dict.fromkeys(("reduce_lr_on_plateau", "plateau"), "plateau"),
    **dict.fromkeys(("cosine_warmup", "cosine"), "cosine"),
    **dict.fromkeys(("linear_warmup", "linear"), "linear"),
    **dict.fromkeys(("none", "constant"), "constant"),
}
_TRANSFER_TRAINERS = ("distill_attention_xent_mse", "distill_attention_mse")
_ALPACA = ("alpaca_clean", "alpaca")
_REDPAJAMA = {"redpajama_sample": "across", "redpajama_sample_contig": "contiguous"}


def _set(values: Mapping[str, Any]) -> Section:
    """Only the values that are set: everything else keeps the recipe's default."""
    return {name: value for name, value in values.items() if value is not None}


def model_section(config: OldConfig, flags: Mapping[str, Any]) -> Section:
    """``model.*``. Raises ``UserError`` when no model is named, and for 8-bit weights."""
    path = flags.get("pretrained_model_name_or_path") or config.at("model.pretrained_model_name_or_path")
    if path is None:
        raise UserError(
            f"{config.file} names no model: set model.pretrained_model_name_or_path in it, or give the flag"
        )
    if config.at("model.load_in_8bit", False):
        raise UserError(
            f"{config.file}: model.load_in_8bit is not available; load_in_4bit: true keeps the base in 4 bits"
        )
    dtype = str(config.at("model.torch_dtype", "auto")).removeprefix("torch.")
    return _set({
        "path": path,
        "dtype": "bfloat16" if flags.get("pure_bf16") else dtype,
        "device": "cpu" if flags.get("no_cuda") else None,
        "attention": config.at("model.attn_implementation"),
        "quantize": "nf4" if config.at("model.load_in_4bit", False) else None,
    })  # fmt: skip


def student_section(config: OldConfig, flags: Mapping[str, Any]) -> Section:
    """``student.*``. Raises ``UserError`` for an attention, feature map or kernel that has no counterpart."""
    word = flags.get("attention_type") or config.at("attention.attention_type")
    if word in (None, "softmax"):
        raise UserError(
            f"{config.file} is a model with its own softmax attention (attention_type: {word}): there is nothing to "
            "transfer to. Give a configuration with a linear attention, one named distill_..., or --attention_type"
        )
    name = one_of(word, {**ATTENTIONS, **{own: own for own in STUDENTS}}, "attention.attention_type")
    windowed = name != "linear"
    if not windowed and "window_size" in flags:
        raise UserError(f"--window_size: {word} has no window; leave it out, or choose another --model_config")
    # the original's own default is sigmoid(0)
    factor = float(config.at("attention.init_window_factor", 0.0))
    return _set({
        "name": name,
        "window": flags.get("window_size", config.at("attention.window_size")) if windowed else None,
        "mix_init": round(1.0 / (1.0 + math.exp(-factor)), 9) if windowed else None,
        "affine": config.at("attention.affine_attention_factors") if windowed else None,
        "tied": flags.get("tie_qk_kernels", config.at("attention.tie_qk_kernels")),
        "keep_softmax": config.at("attention.softmax_attentions"),
        "feature_map": _feature_map(config, flags),
    })  # fmt: skip


def _feature_map(config: OldConfig, flags: Mapping[str, Any]) -> Section:
    kwargs = "attention.learned_kernel_kwargs"
    word = config.at("attention.feature_map", "softmax_dim")
    name = one_of(word, FEATURE_MAPS, "attention.feature_map")
    if not config.at("attention.feature_map_kwargs.fullspace", True) and word in HALVED:
        name = f"{name}_half"
    kernel = flags.get("learned_kernel") or config.at("attention.learned_kernel")
    known = {"untied_head_einsum": "map", "untied_head_adapter": "adapter"}
    adapter = one_of(kernel, known, "attention.learned_kernel") == "adapter"
    width = config.at(f"{kwargs}.hidden_dim")
    if adapter and width is None:
        raise UserError(f"{config.file}: untied_head_adapter needs {kwargs}.hidden_dim, the width of its bottleneck")
    zero = flags.get("lk_zero_init", config.at(f"{kwargs}.zero_init", False))
    normal = flags.get("lk_normal_init", config.at(f"{kwargs}.normal_init", False) and "lk_zero_init" not in flags)
    bias = config.at(f"{kwargs}.bias", False)
    return _set({
        "name": name,
        "feature_dim": config.at(f"{kwargs}.feature_dim"),
        "bias": None if adapter or bias == (name == "t2r") else bias,
        "skip": flags.get("lk_skip_connection", config.at(f"{kwargs}.skip_connection")) if not adapter else None,
        "adapter_dim": width if adapter else None,
        "init": "normal" if normal else "identity" if zero or adapter else "kaiming",
        "eps": config.at("attention.feature_map_kwargs.eps"),
    })  # fmt: skip


def data_section(config: OldConfig, flags: Mapping[str, Any]) -> Section:
    """``data.*`` of one experiment. Raises ``UserError`` for a data set that has no counterpart."""
    name = config.at("dataset.name", "alpaca_clean")
    if name not in (*_ALPACA, *_REDPAJAMA):
        raise UserError(f"{config.file}: dataset.name is {name!r}; {expected(name, (*_ALPACA, *_REDPAJAMA))}")
    section = _alpaca(config) if name in _ALPACA else _redpajama(config, _REDPAJAMA[name])
    section["seq_len"] = flags.get("dataset_chunk_size", config.at("dataset.dataset_config.chunk_size"))
    split = config.at("trainer.train_split")
    for name in ("path", "validation_path"):
        if "data_dir" in flags and section.get(name) is not None:
            section[name] = _below(flags["data_dir"], section[name])
    return _set({**section, "split": split})


def _alpaca(config: OldConfig) -> Section:
    of = "dataset.dataset_config"
    return {
        "path": config.at(f"{of}.path", "yahma/alpaca-cleaned"),
        "format": "alpaca",
        "packing": "across" if config.at(f"{of}.concat_data", True) else "contiguous",
        "validation_rows": config.at(f"{of}.validation_rows"),
        "on_bad_row": "skip",
    }


def _redpajama(config: OldConfig, packing: str) -> Section:
    of = "dataset.dataset_config"
    train, held_out = (_only(config, f"{of}.{key}") for key in ("train_data", "eval_data"))
    if train is None:
        raise UserError(f"{config.file}: {of}.train_data names no file")
    same = held_out is None or _without_count(held_out) == _without_count(train)
    by_esl = config.at(f"{of}.filter_by_esl", False)
    return {
        "path": train,
        "validation_path": None if same else held_out,
        "validation_rows": config.at(f"{of}.validation_rows", config.at(f"{of}.max_eval_num")) if same else None,
        "packing": packing,
        "min_tokens": config.at(f"{of}.min_length"),
        "max_tokens": config.at(f"{of}.max_length"),
        "select": "esl" if by_esl else None,
        "select_rows": config.at(f"{of}.num_train_samples") if by_esl else None,
        "on_bad_row": "skip",
    }


def _only(config: OldConfig, path: str) -> str | None:
    files = config.at(path)
    files = files if isinstance(files, list) else [] if files is None else [files]
    if len(files) > 1:
        raise UserError(f"{config.file}: {path} names {len(files)} files; one is read. Put them into one file")
    return str(files[0]) if files else None


def _without_count(path: str) -> str:
    """``train.json[50000]`` -> ``train.json``."""
    return re.sub(r"\[\d*\]$", "", path)


def _below(data_dir: str, path: str) -> str:
    """Where ``path`` is, given --data_dir: a file or folder of that name in it, else the file or folder itself."""
    place = Path(data_dir).expanduser()
    if not place.exists():
        raise UserError(f"--data_dir {data_dir}: no such file or folder")
    if place.is_dir() and (place / _without_count(path)).exists():
        return str(place / path)
    if place.is_dir() and Path(_without_count(path)).suffix in FILE_KINDS:
        raise UserError(f"--data_dir {data_dir} holds no {_without_count(path)}, which the configuration reads")
    return str(place)


def stage_section(config: OldConfig, flags: Mapping[str, Any]) -> Section:
    """What ``transfer.*`` and ``lora.*`` share, without the learning rate. Raises ``UserError``."""
    accumulation = flags.get("gradient_accumulation_steps", config.at("trainer.gradient_accumulation_steps"))
    section = {
        "epochs": flags.get("num_train_epochs", config.at("trainer.num_train_epochs")),
        "max_steps": _steps(config, flags, accumulation),
        "batch_size": flags.get("batch_size", config.at("dataloader.batch_size")),
        "accumulation": accumulation,
        "eval_every": flags.get("eval_steps", config.at("trainer.eval_steps")),
        "eval_batches": flags.get("max_eval_batches", config.at("trainer.max_eval_batches")),
        "save_every": config.at("trainer.num_save_ckpt_steps"),
        "restore_best": config.at("trainer.load_best_model_at_end"),
        "weight_decay": flags.get("weight_decay", config.at("optimizer.weight_decay")),
    }
    optimizer = flags.get("optim") or config.at("optimizer.optim", "adamw_torch")
    if optimizer not in _OPTIMIZERS:
        raise UserError(f"optimizer {optimizer!r} is not available; {expected(optimizer, _OPTIMIZERS)}")
    return {**_set(section), **_clip(config), **_schedule(config, flags)}


def _steps(config: OldConfig, flags: Mapping[str, Any], accumulation: int | None) -> int | None:
    """The smallest limit given; 0 and below mean none, as in the original."""
    limits = [flags.get("max_steps", config.at("trainer.max_steps")), config.at("optimizer.max_optimizer_steps")]
    if flags.get("num_train_steps", -1) > 0:
        limits.append(math.ceil(flags["num_train_steps"] / max(1, accumulation or StageConfig.accumulation)))
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def _clip(config: OldConfig) -> Section:
    if config.at("fsdp.gradient_clipping") is False:
        return {"clip": None}
    return _set({"clip": config.at("fsdp.gradient_clipping_threshold")})


def _schedule(config: OldConfig, flags: Mapping[str, Any]) -> Section:
    word = flags.get("scheduler") or config.at("lr_scheduler.lr_scheduler_type", "none")
    schedule = one_of(word, _SCHEDULES, "lr_scheduler.lr_scheduler_type")
    if config.at("lr_scheduler.mode", "min") != "min":
        raise UserError(f"{config.file}: lr_scheduler.mode must be min: the rate falls when the loss does not")
    section = {"schedule": schedule, "warmup_steps": config.at("lr_scheduler.num_warmup_steps")}
    if schedule == "plateau":
        section |= {
            "plateau_factor": config.at("lr_scheduler.factor"),
            "plateau_patience": config.at("lr_scheduler.patience"),
            "min_lr": config.at("lr_scheduler.min_lr"),
        }
    elif schedule in ("cosine", "linear"):
        section["min_lr"] = 0.0
    return _set(section)


def transfer_section(config: OldConfig, flags: Mapping[str, Any]) -> Section | None:
    """``transfer.*``; None where ``trainer.name`` is null: the baseline without transfer. Raises ``UserError``."""
    name = config.at("trainer.name")
    if name is None:
        if not config.named("trainer.name"):
            raise UserError(f"{config.file} has no trainer.name; {expected('', _TRANSFER_TRAINERS)}, or null for none")
        return None
    if name not in _TRANSFER_TRAINERS:
        raise UserError(f"{config.file}: trainer.name is {name!r}; {expected(name, _TRANSFER_TRAINERS)}")
    if config.at("trainer.reverse_kl", False):
        raise UserError(
            f"{config.file}: trainer.reverse_kl is not available; the cross-entropy is the teacher's to the student's"
        )
    own = {
        "lr": flags.get("lr", config.at("optimizer.lr")),
        "mse_weight": config.at("trainer.mse_factor"),
        "xent_weight": config.at("trainer.xent_factor"),
    }  # fmt: skip
    return {**stage_section(config, flags), **_set(own)}


def lora_section(config: OldConfig, flags: Mapping[str, Any]) -> Section:
    """``lora.*``. Raises ``UserError`` for a method other than LoRA."""
    method = config.at("finetune.method")
    if method != "lora":
        raise UserError(f"{config.file}: finetune.method is {method!r}; only lora is available")
    if "max_finetune_steps" in flags:
        flags = {**flags, "max_steps": flags["max_finetune_steps"]}
    checkpointing = flags.get("fsdp_activation_checkpointing", False) or not flags.get("no_peft_grad_ckpt", False)
    own = {
        "loss": "ce",
        "lr": flags.get("finetune_lr", config.at("optimizer.lr")),
        "rank": config.at("finetune.kwargs.r"),
        "alpha": config.at("finetune.kwargs.lora_alpha"),
        "dropout": config.at("finetune.kwargs.lora_dropout"),
        "targets": config.at("finetune.kwargs.target_modules"),
        "train_feature_maps": trains_maps(config, flags),
        "gradient_checkpointing": checkpointing,
    }
    return {**stage_section(config, flags), **_set(own)}


def trains_maps(config: OldConfig, flags: Mapping[str, Any]) -> bool:
    """Whether stage 2 also trains feature maps and mixes."""
    trained = config.at("finetune.trainable_weights", [])
    return bool(flags.get("finetune_attn_mlps")) or any("feature_map" in str(weight) for weight in trained)

"""Translate a script's command line to a checked recipe, the folder of its run, and remarks for the user."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trenchcoat.cli.compat.configs import OldConfig, read_config
from trenchcoat.cli.compat.flags import FLAGS, given_flags
from trenchcoat.cli.compat.translate import (
    data_section,
    lora_section,
    model_section,
    student_section,
    trains_maps,
    transfer_section,
)
from trenchcoat.config import Recipe, UsageError, UserError
from trenchcoat.config.recipe_io import recipe_from_dict

ScriptStage = Literal["transfer", "finetune"]
Script = Literal["transfer", "finetune", "both"]
"""`distill_llama.py` and `distill_llama_finetune.py` of `llama_recipes`, and `distill_llama.py` of the root."""

_NAMES_THE_RUN = (
    "pretrained_model_name_or_path", "attention_type", "learned_kernel", "lk_skip_connection", "lk_zero_init",
    "lk_normal_init", "tie_qk_kernels", "window_size", "pure_bf16", "lr", "weight_decay", "scheduler",
    "gradient_accumulation_steps", "num_train_epochs", "max_steps", "num_train_steps", "eval_steps", "max_eval_batches",
    "dataset_chunk_size", "batch_size", "data_dir",
)  # fmt: skip
"""Flags that decide what the first script learns: another value is another run."""

_STAGE_2_ALONE = ("finetune_lr", "finetune_attn_mlps", "max_finetune_steps")
"""Flags that only the second script uses: another value is another stage 2 on the same transfer."""


@dataclass(frozen=True)
class ScriptPlan:
    """What a command line requests."""

    recipe: Recipe
    """Of the stage that the script runs; ``run.dir`` is that stage's folder."""
    transfer_dir: Path
    """The folder of the first script's run (or of --load_distill_checkpoint)."""
    model_config: OldConfig
    remarks: tuple[str, ...]
    """Parts of a single warning."""


def make_script_plan(stage: ScriptStage, args: argparse.Namespace, folders: Sequence[Path]) -> ScriptPlan:
    """Read the configurations that ``args`` name, in ``folders``, and translate them. Raises ``UserError``."""
    given = given_flags(args)
    _refuse(stage, given)
    model = read_config("model", given["model_config"], folders)
    names = {kind: given.get(f"{kind}_config") for kind in ("distill", "finetune", "eval")}
    files = {kind: read_config("experiment", name, folders) for kind, name in names.items() if name is not None}
    first = _document(model, files, given, files["distill"])
    first_dir = _run_folder(given)
    if stage == "transfer":
        document, run_dir, transfer_dir = first, first_dir, first_dir
    else:
        document = _document(model, files, given, files["finetune"])
        own = _stage_2_suffix(given, other_data=document["data"] != first["data"])
        run_dir = first_dir.with_name(first_dir.name + own)
        transfer_dir = _named_checkpoint(given) or first_dir
    recipe = recipe_from_dict(document)
    recipe = replace(recipe, run=replace(recipe.run, dir=str(run_dir)))
    return ScriptPlan(recipe, transfer_dir, model, tuple(_remarks(given, model, files)))


def _refuse(stage: ScriptStage, given: Mapping[str, Any]) -> None:
    needed = ["model_config", "distill_config", *(["finetune_config"] if stage == "finetune" else [])]
    missing = [f"--{name}" for name in needed if name not in given]
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be given: the name of a configuration, or a file's path")
    if "lk_zero_init" in given and "lk_normal_init" in given:
        raise UsageError("--lk_zero_init and --lk_normal_init exclude each other: give one of them")
    if stage == "transfer" and _named_checkpoint(given) is not None:
        raise UserError(
            "--load_distill_checkpoint: an interrupted attention transfer continues by itself when the same command is "
            "given again, and a finished one of another run is used by distill_llama_finetune.py; leave it out here"
        )
    if "load_finetune_checkpoint" in given:
        raise UserError(
            "--load_finetune_checkpoint: an interrupted stage 2 continues by itself when the same command is given "
            "again; a finished one is scored with `trenchcoat eval FOLDER` and used with `trenchcoat generate FOLDER`"
        )


def _named_checkpoint(given: Mapping[str, Any]) -> Path | None:
    """The folder of --load_distill_checkpoint; the original's word `default` means the run's own."""
    path = given.get("load_distill_checkpoint")
    return None if path in (None, "default") else Path(path)


def _document(
    model: OldConfig, files: Mapping[str, OldConfig], given: Mapping[str, Any], data: OldConfig
) -> dict[str, Any]:
    finetune, scoring = files.get("finetune"), files.get("eval")
    tracked = "wandb_entity" in given and "no_wandb" not in given
    document: dict[str, Any] = {
        "model": model_section(model, given),
        "student": student_section(model, given),
        "data": data_section(data, given),
        "transfer": transfer_section(files["distill"], given),
        "lora": None if finetune is None else lora_section(finetune, given),
        "parallel": {
            "shard": "full" if given.get("enable_fsdp") else "none",
            "cpu_offload": bool(given.get("fsdp_cpu_offload")),
        },
        "eval": {"baselines": False},
        "run": {"seed": given.get("seed", 0), "trackers": ["wandb"] if tracked else []},
    }
    if "project_name" in given:
        document["run"]["project"] = given["project_name"]
    if scoring is not None:
        asked = {"batch_size": "dataloader.batch_size", "seq_len": "dataset.dataset_config.chunk_size"}
        document["eval"] |= {name: value for name, path in asked.items() if (value := scoring.at(path)) is not None}
    return document


def _run_folder(given: Mapping[str, Any]) -> Path:
    """The folder of the run, named by what is learned from, then by every flag that changes what is learned."""
    parts = [f"d={_word(given['distill_config'])}", f"f={_word(given.get('finetune_config', 'none'))}"]
    parts += [f"{_initials(name)}={_word(given[name])}" for name in _NAMES_THE_RUN if name in given]
    parts += [f"s={given.get('seed', 0)}", f"r={given.get('replicate', 0)}"]
    return Path(given.get("checkpoint_dir", "./checkpoints"), _word(given["model_config"]), "-".join(parts))


def _stage_2_suffix(given: Mapping[str, Any], *, other_data: bool) -> str:
    parts = [f"{_initials(name)}={_word(given[name])}" for name in _STAGE_2_ALONE if name in given]
    parts += ["data=ft"] if other_data else []
    source = _named_checkpoint(given)
    parts += [f"ldc={hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]}"] if source is not None else []
    return "".join(f"-{part}" for part in parts)


def _initials(flag: str) -> str:
    return "".join(word[0] for word in flag.split("_"))


def _word(value: object) -> str:
    """A value as part of a folder's name: the last part of a path, without ``.yaml``, no odd characters."""
    text = "1" if value is True else Path(str(value)).name.removesuffix(".yaml")
    return re.sub(r"[^\w.+=-]", "_", text)


def _remarks(given: Mapping[str, Any], model: OldConfig, files: Mapping[str, OldConfig]) -> list[str]:
    ignored = [f"--{flag.name}" for flag in FLAGS if flag.ignored and flag.name in given]
    words = {f"{config.file}: {key}" for config in (model, *files.values()) for key in config.without_effect()}
    for key in ("attention.train_qk", "attention.train_attention_weights"):
        if model.at(key, False):
            words.add(f"{model.file}: {key}")
    if not model.at("attention.train_window_factor", True):
        words.add(f"{model.file}: attention.train_window_factor (the mix of near and far is always learned)")
    without = [*ignored, *sorted(words)]
    remarks = [f"accepted, but without effect here: {', '.join(without)}"] if without else []
    if given.get("lk_normal_init", model.at("attention.learned_kernel_kwargs.normal_init", False)):
        remarks.append("normal_init draws with standard deviation 0.02 (the original: 1)")
    if not files["distill"].at("trainer.name") and "finetune" in files and not trains_maps(files["finetune"], given):
        remarks.append(
            "without transfer and without trainable_weights in the --finetune_config, feature maps stay as they begin"
        )
    return remarks

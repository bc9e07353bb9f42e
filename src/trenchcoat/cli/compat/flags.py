"""The flags of the original scripts: name, type of value, and the setting it maps to.

The list is frozen by a test; ``docs/COMPAT.md`` shows it as a table, word for word.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from trenchcoat.config import UsageError

_TABLE = """
str    model_config               a file under `configs/model`, by name or path: `model.*`, `student.*`
str    distill_config             a file under `configs/experiment`, by name or path: `transfer.*`, `data.*`
str    finetune_config            a file under `configs/experiment`, by name or path: `lora.*`, stage 2's `data.*`
str    eval_config                a file under `configs/experiment`, by name or path: `eval.batch_size`, `eval.seq_len`
str    pretrained_model_name_or_path `model.path`
str    load_distill_checkpoint    script 2: the run's or adapter's folder whose transfer is used
str    load_finetune_checkpoint   refused with what to use instead (`trenchcoat eval`, `generate`)
switch resume_distill             no effect here: the same command always continues where it was
switch resume_finetune            no effect here: the same command always continues where it was
str    attention_type             `student.name`
str    learned_kernel             `student.feature_map.adapter_dim`: of `untied_head_adapter`, or none
switch lk_skip_connection         `student.feature_map.skip=true`
switch lk_zero_init               `student.feature_map.init=identity` (without it, the file's, else kaiming)
switch lk_normal_init              `student.feature_map.init=normal`, with standard deviation 0.02
switch tie_qk_kernels             `student.tied=true`
switch train_qk                   no effect here: transfer trains feature maps and mixes; LoRA trains q_proj and k_proj
int    state_chunk_len            no effect here: the operator chooses its chunks
int    window_size                `student.window`
int    layers_per_model           accepted when it means all layers, else refused with what to use instead
int    layers_limit_min           accepted when it means all layers, else refused with what to use instead
int    layers_limit_max           accepted when it means all layers, else refused with what to use instead
float  lr                         `transfer.lr`
float  finetune_lr                `lora.lr` (and a separate folder for stage 2)
float  weight_decay               `transfer.weight_decay`, `lora.weight_decay`
str    optim                      AdamW only: `adamw_torch`, `adamw_torch_fused`, `adamw`; others are refused
str    scheduler                  `transfer.schedule`, `lora.schedule`
int    gradient_accumulation_steps `transfer.accumulation`, `lora.accumulation`, over all processes
float  num_train_epochs           `transfer.epochs`, `lora.epochs`
int    max_steps                  `transfer.max_steps`, `lora.max_steps`
int    max_finetune_steps         `lora.max_steps` (and a separate folder for stage 2)
int    num_train_steps            the same in micro-batches, divided by the accumulation and rounded up
int    eval_steps                 `transfer.eval_every`, `lora.eval_every`
int    max_eval_batches           `transfer.eval_batches`, `lora.eval_batches`
switch no_init_eval               no effect here: the loss before training is always measured
switch no_peft_grad_ckpt          `lora.gradient_checkpointing=false` (without it: true)
switch fsdp_activation_checkpointing `lora.gradient_checkpointing=true`
switch finetune_attn_mlps         `lora.train_feature_maps=true` (and a separate folder for stage 2)
int    dataset_chunk_size         `data.seq_len`
int    batch_size                 `transfer.batch_size`, `lora.batch_size`
int    num_workers                no effect here: rows are packed once and read by index
str    data_dir                   `data.path`: a file, a folder, or where the configuration's relative path begins
switch enable_fsdp                `parallel.shard=full` (without it: `none`)
switch low_cpu_fsdp               no effect here: no process ever holds more than its share while loading
switch pure_bf16                  `model.dtype=bfloat16`; trained parameters stay float32
switch fsdp_cpu_offload           `parallel.cpu_offload=true`
str    huggingface_token          the token for this process's downloads; it is written nowhere
str    checkpoint_dir             the parent folder of `run.dir` (`./checkpoints`)
str    results_dir                no effect here: results are in the run's folder
int    replicate                  part of the name of `run.dir`
int    seed                       `run.seed`
switch verbose                    no effect here: the log says what is done
switch debug                      the traceback of an error, and the libraries' notices
switch no_cuda                    `model.device=cpu`
str    wandb_entity               `run.trackers=[wandb]` under this entity (without it nothing is sent anywhere)
str    project_name               `run.project`
switch no_wandb                   no Weights & Biases, whatever --wandb_entity says
int    num_generations            no effect here: `trenchcoat generate RUN --prompt ...` writes text
int    top_k                      no effect here: `trenchcoat generate RUN --top-k ...`
float  top_p                      no effect here: `trenchcoat generate RUN --top-p ...`
int    max_new_tokens             no effect here: `trenchcoat generate RUN --max-new-tokens ...`
switch no_attention_mask          no effect here: rows are packed, so there is nothing to mask
switch benchmark                  no effect here: `trenchcoat bench` measures
switch print_model                no effect here: the run's `environment.json` and `recipe.yaml` describe it
"""
_NO_EFFECT = "no effect here: "
_TYPES = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class Flag:
    """One flag, without its two dashes."""

    kind: str
    """The type of its value; a ``switch`` takes none."""
    name: str
    effect: str
    """What it sets. A flag that sets nothing is accepted so that old command lines keep working, and named in a
    warning."""

    @property
    def ignored(self) -> bool:
        """Whether it changes nothing here."""
        return self.effect.startswith(_NO_EFFECT)


FLAGS = tuple(Flag(*line.split(maxsplit=2)) for line in _TABLE.strip().splitlines())
"""Every flag that the scripts take."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the flags")


def parse(script: str, description: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; a flag that is not given is None.

    Raises ``UsageError`` for an unknown flag (with the nearest one) or a value of the wrong kind.
    """
    parser = _Parser(script, description=description, allow_abbrev=False)
    for flag in FLAGS:
        value: dict[str, Any] = {"action": "store_true", "default": None}
        if flag.kind in _TYPES:
            value = {"type": _TYPES[flag.kind], "metavar": flag.kind.upper()}
        parser.add_argument(f"--{flag.name}", help=flag.effect.replace("%", "%%"), **value)
    args, rest = parser.parse_known_args(arguments)
    if rest:
        name = rest[0].split("=")[0].lstrip("-")
        near = difflib.get_close_matches(name, [flag.name for flag in FLAGS], n=1, cutoff=0.6)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
        raise UsageError(f"unknown argument {rest[0]!r}: {hint}")
    return args


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, and their values."""
    return {flag.name: value for flag in FLAGS if (value := getattr(args, flag.name)) is not None}

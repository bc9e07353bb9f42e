"""The flags of the two original scripts: name, kind of value, and what each of them sets here.

The list is frozen by a test; ``docs/COMPAT.md`` shows it as a table, word for word.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from trenchcoat.config import UsageError

NO_EFFECT = "no effect here: "
"""Start of the effect of a flag that is accepted, and named in the warning, for the sake of old command lines."""


@dataclass(frozen=True)
class Flag:
    """One flag, without its two dashes; a ``switch`` takes no value."""

    name: str
    kind: Literal["switch", "int", "float", "str"]
    effect: str

    @property
    def ignored(self) -> bool:
        """Whether it changes nothing here."""
        return self.effect.startswith(NO_EFFECT)


FLAGS: tuple[Flag, ...] = (
    Flag("model_config", "str", "a file under `configs/model`, by name or path: `model.*`, `student.*`"),
    Flag("distill_config", "str", "a file under `configs/experiment`, by name or path: `transfer.*`, `data.*`"),
    Flag("finetune_config", "str", "a file under `configs/experiment`, by name or path: `lora.*`, stage 2's `data.*`"),
    Flag("eval_config", "str", "a file under `configs/experiment`, by name or path: `eval.batch_size`, `eval.seq_len`"),
    Flag("pretrained_model_name_or_path", "str", "`model.path`"),
    Flag("load_distill_checkpoint", "str", "script 2: the run's or adapter's folder whose transfer is taken up"),
    Flag("load_finetune_checkpoint", "str", "refused with what to use instead (`trenchcoat eval`, `generate`)"),
    Flag("resume_distill", "switch", NO_EFFECT + "the same command always continues where it was"),
    Flag("resume_finetune", "switch", NO_EFFECT + "the same command always continues where it was"),
    Flag("attention_type", "str", "`student.name`"),
    Flag("learned_kernel", "str", "`student.feature_map.adapter_dim`: of `untied_head_adapter`, or none"),
    Flag("lk_skip_connection", "switch", "`student.feature_map.skip=true`"),
    Flag("lk_zero_init", "switch", "`student.feature_map.init=identity` (without it, the file's, else kaiming)"),
    Flag("tie_qk_kernels", "switch", "`student.tied=true`"),
    Flag("train_qk", "switch", NO_EFFECT + "transfer trains feature maps and mixes; LoRA trains q_proj and k_proj"),
    Flag("state_chunk_len", "int", NO_EFFECT + "the operator chooses its chunks"),
    Flag("layers_per_model", "int", "accepted when it means all layers, else refused with what to use instead"),
    Flag("layers_limit_min", "int", "accepted when it means all layers, else refused with what to use instead"),
    Flag("layers_limit_max", "int", "accepted when it means all layers, else refused with what to use instead"),
    Flag("lr", "float", "`transfer.lr`"),
    Flag("finetune_lr", "float", "`lora.lr` (and a folder of its own for stage 2)"),
    Flag("weight_decay", "float", "`transfer.weight_decay`, `lora.weight_decay`"),
    Flag("optim", "str", "AdamW only: `adamw_torch`, `adamw_torch_fused`, `adamw`; others are refused"),
    Flag("scheduler", "str", "`transfer.schedule`, `lora.schedule`"),
    Flag("gradient_accumulation_steps", "int", "`transfer.accumulation`, `lora.accumulation`, over all processes"),
    Flag("num_train_epochs", "float", "`transfer.epochs`, `lora.epochs`"),
    Flag("max_steps", "int", "`transfer.max_steps`, `lora.max_steps`"),
    Flag("num_train_steps", "int", "the same in micro-batches, divided by the accumulation and rounded up"),
    Flag("eval_steps", "int", "`transfer.eval_every`, `lora.eval_every`"),
    Flag("no_init_eval", "switch", NO_EFFECT + "the loss before training is always measured"),
    Flag("no_peft_grad_ckpt", "switch", "`lora.gradient_checkpointing=false` (without it: true)"),
    Flag("fsdp_activation_checkpointing", "switch", "`lora.gradient_checkpointing=true`"),
    Flag("finetune_attn_mlps", "switch", "`lora.train_feature_maps=true` (and a folder of its own for stage 2)"),
    Flag("dataset_chunk_size", "int", "`data.seq_len`"),
    Flag("batch_size", "int", "`transfer.batch_size`, `lora.batch_size`"),
    Flag("num_workers", "int", NO_EFFECT + "rows are packed once and read by index"),
    Flag("data_dir", "str", "`data.path`: a file, a folder, or where the configuration's relative path begins"),
    Flag("enable_fsdp", "switch", "`parallel.shard=full` (without it: `none`)"),
    Flag("low_cpu_fsdp", "switch", NO_EFFECT + "no process ever holds more than its share while loading"),
    Flag("pure_bf16", "switch", "`model.dtype=bfloat16`; what is trained stays float32"),
    Flag("fsdp_cpu_offload", "switch", "`parallel.cpu_offload=true`"),
    Flag("huggingface_token", "str", "the token for this process's downloads; it is written nowhere"),
    Flag("checkpoint_dir", "str", "the folder that `run.dir` lies in (`./checkpoints`)"),
    Flag("replicate", "int", "part of the name of `run.dir`"),
    Flag("seed", "int", "`run.seed`"),
    Flag("verbose", "switch", NO_EFFECT + "the log says what is done"),
    Flag("debug", "switch", "the traceback of an error, and the libraries' notices"),
    Flag("no_cuda", "switch", "`model.device=cpu`"),
    Flag("wandb_entity", "str", "`run.trackers=[wandb]` under this entity (without it nothing is sent anywhere)"),
    Flag("project_name", "str", "`run.project`"),
    Flag("no_wandb", "switch", "no Weights & Biases, whatever --wandb_entity says"),
    Flag("num_generations", "int", NO_EFFECT + "`trenchcoat generate RUN --prompt ...` writes text"),
    Flag("top_k", "int", NO_EFFECT + "`trenchcoat generate RUN --top-k ...`"),
    Flag("top_p", "float", NO_EFFECT + "`trenchcoat generate RUN --top-p ...`"),
    Flag("max_new_tokens", "int", NO_EFFECT + "`trenchcoat generate RUN --max-new-tokens ...`"),
    Flag("benchmark", "switch", NO_EFFECT + "`trenchcoat bench` measures"),
    Flag("print_model", "switch", NO_EFFECT + "the run's `environment.json` and `recipe.yaml` describe it"),
)  # fmt: skip
"""Every flag that the scripts take."""

_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}


class _Parser(argparse.ArgumentParser):
    """A wrong command line is one line, not the usage of sixty flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the flags")


def build_parser(script: str, description: str) -> argparse.ArgumentParser:
    """The grammar of one script; a flag that is not given is None."""
    parser = _Parser(script, description=description, allow_abbrev=False)
    for flag in FLAGS:
        help_text = flag.effect.replace("%", "%%")
        if flag.kind == "switch":
            parser.add_argument(f"--{flag.name}", action="store_true", default=None, help=help_text)
        else:
            metavar = flag.kind.upper()
            parser.add_argument(f"--{flag.name}", type=_TYPES[flag.kind], default=None, metavar=metavar, help=help_text)
    return parser


def parse(script: str, description: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; raises ``UsageError`` for an unknown flag (with the nearest one) or a value of the wrong kind."""
    args, rest = build_parser(script, description).parse_known_args(arguments)
    if rest:
        near = difflib.get_close_matches(rest[0].split("=")[0], [f"--{flag.name}" for flag in FLAGS], n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise UsageError(f"unknown argument {rest[0]!r}: {hint}")
    return args


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, and their values."""
    return {flag.name: value for flag in FLAGS if (value := getattr(args, flag.name)) is not None}

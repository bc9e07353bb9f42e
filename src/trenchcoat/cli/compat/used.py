"""The original's demo and evaluation command lines, run as `chat` and `eval` on an adapter made from its checkpoint.

A checkpoint is one of ours (a run's or adapter's folder), the original's `.pt` file or a hub id. The last two are
imported once, into ``<checkpoint_dir>/imported``; settings that their keys do not tell are those of the model's
configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from trenchcoat.cli.app import main
from trenchcoat.cli.compat.configs import OldConfig, read_config
from trenchcoat.cli.terminal import guarded, warn
from trenchcoat.config import UsageError, UserError

Use = Literal["demo", "eval", "mmlu"]

_COMMON = "attn_mlp_checkpoint_path finetune_checkpoint_path load_distill_checkpoint load_finetune_checkpoint"
_VALUES: dict[Use, str] = {
    "demo": f"model_config_path {_COMMON} top_k top_p max_new_tokens seed huggingface_token",
    "eval": f"model_config {_COMMON} task num_shots batch_size limit huggingface_token",
    "mmlu": f"model_config pretrained_model_name_or_path {_COMMON} huggingface_token",
}
"""Flags with a value that have an effect; others of the original's are accepted and named in a warning."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def run_use(use: Use, configs: Path, arguments: Sequence[str] | None = None) -> int:
    """Run one script; returns the exit code of the command that takes its place."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    made: list[str] = []

    def translate() -> None:
        try:
            made.extend(command_of(use, words, configs))
        except UserError as error:
            raise UsageError(str(error)) from error

    return guarded(translate, debug="--debug" in words) or main(made)


def command_of(use: Use, words: Sequence[str], configs: Path) -> list[str]:
    """Our command line for the original's; imports its checkpoint if that has not been done. Raises ``UserError``."""
    parser = _Parser(use, allow_abbrev=False)
    parser.add_argument("--checkpoint_dir", default="./checkpoints")
    for name in _VALUES[use].split():
        parser.add_argument(f"--{name}")
    args, rest = parser.parse_known_args(words)
    ignored = [word for word in rest if word.startswith("--")]
    if ignored:
        warn(f"accepted, but without effect here: {', '.join(ignored)}")
    if args.huggingface_token is not None:
        os.environ["HF_TOKEN"] = args.huggingface_token
    folder = str(_folder(args, [Path("configs"), configs]))
    if use == "demo":
        options = {"--top-k": args.top_k, "--top-p": args.top_p, "--max-new-tokens": args.max_new_tokens,
                   "--seed": args.seed}  # fmt: skip
    elif use == "eval":
        if args.task is None:
            raise UsageError("--task must be given, for example --task piqa")
        options = {"--tasks": args.task, "--num-fewshot": args.num_shots or "0", "--batch-size": args.batch_size,
                   "--limit": args.limit}  # fmt: skip
    else:
        options = {"--tasks": "mmlu", "--num-fewshot": "5"}
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    return ["chat" if use == "demo" else "eval", folder, *given]


def _folder(args: argparse.Namespace, folders: Sequence[Path]) -> Path:
    """The folder of ours that holds the checkpoint."""
    maps = args.attn_mlp_checkpoint_path or args.load_distill_checkpoint
    lora = args.finetune_checkpoint_path or args.load_finetune_checkpoint
    if maps is None and lora is None:
        raise UsageError("--attn_mlp_checkpoint_path or --finetune_checkpoint_path must be given")
    for name in (lora, maps):  # a folder of ours holds both
        if name is not None and Path(name).is_dir():
            return Path(name)
    return _imported(args, maps or lora, lora if maps is not None else None, folders)


def _imported(args: argparse.Namespace, maps: str, lora: str | None, folders: Sequence[Path]) -> Path:
    """The adapter made from the original's files."""
    from trenchcoat.models.hub import find_adapter
    from trenchcoat.models.lolcats.checkpoints import import_checkpoint
    from trenchcoat.models.lolcats.settings import Asked

    name = getattr(args, "model_config", None) or getattr(args, "model_config_path", None) or Path(maps).parent.name
    if not name:
        raise UsageError("--model_config must be given: the name of a configuration, or a file's path")
    config = read_config("model", name, folders)
    base = getattr(args, "pretrained_model_name_or_path", None) or config.at("model.pretrained_model_name_or_path")
    if base is None:
        raise UsageError(f"{config.file} names no model: set model.pretrained_model_name_or_path in it")
    mark = hashlib.sha256(repr((maps, lora, base)).encode()).hexdigest()[:8]
    out = Path(args.checkpoint_dir) / "imported" / f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', Path(name).stem)}-{mark}"
    if not out.is_dir() or find_adapter(out) is None:
        for line in import_checkpoint(maps, lora, base, out, Asked(**_asked(config))):
            warn(line)
    return out


def _asked(config: OldConfig) -> dict[str, Any]:
    """What the keys of a checkpoint do not tell, from the model's configuration."""
    names = {"attention": "attention_type", "window": "window_size", "feature_map": "feature_map",
             "affine": "affine_attention_factors"}  # fmt: skip
    found = {ours: config.at(f"attention.{theirs}") for ours, theirs in names.items()}
    found["skip"] = config.at("attention.learned_kernel_kwargs.skip_connection")
    kept = config.at("attention.softmax_attentions")
    return {**found, "keep_softmax": None if kept is None else tuple(kept)}

"""The scripts of the original research code: its flags and configuration files, run by our stages.

In ``llama_recipes``, ``distill_llama.py`` is stage 1 and ``distill_llama_finetune.py`` stage 2 of one run; given the
same arguments both name the same folder, so the second finds the first. The root's ``distill_llama.py`` runs both. Each
flag's counterpart is in ``docs/COMPAT.md``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trenchcoat.cli.compat.flags import given_flags, parse
from trenchcoat.cli.compat.plan import Script, ScriptPlan, ScriptStage, make_script_plan
from trenchcoat.cli.compat.start import adopt_transfer, base_config, check_layers, check_rope
from trenchcoat.cli.terminal import guarded, quiet_libraries, show, warn
from trenchcoat.config import UsageError, UserError
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder

_SCRIPTS: dict[Script, str] = {
    "transfer": "distill_llama.py",
    "finetune": "distill_llama_finetune.py",
    "both": "distill_llama.py",
}
_DESCRIPTIONS: dict[Script, str] = {
    "transfer": "Stage 1, attention transfer, with the flags of the original research code. Under torchrun, "
    "--enable_fsdp shards the model over the processes.",
    "finetune": "Stage 2, LoRA on the transferred model, with the flags of the original research code. Given the same "
    "arguments as distill_llama.py, it continues that script's run.",
    "both": "Attention transfer, then LoRA where --finetune_config is given, with the flags of the original research "
    "code. With --load_distill_checkpoint, that transfer is used.",
}


def run_script(script: Script, configs: Path, arguments: Sequence[str] | None = None) -> int:
    """Run one script; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 stopped).

    Named configurations are looked for in ``./configs``, then in ``configs``. Errors are one line on standard error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    return guarded(lambda: _run(script, words, configs, debug), debug=debug)


def plan_of(stage: ScriptStage, arguments: Sequence[str], configs: Path) -> ScriptPlan:
    """The plan of a command line, checked against the base model's config; runs nothing.

    A token or an entity goes to the environment variable that its library reads. Raises ``UserError``.
    """
    return _plan(stage, parse(_SCRIPTS[stage], _DESCRIPTIONS[stage], arguments), configs)


def plans_of(script: Script, arguments: Sequence[str], configs: Path) -> dict[ScriptStage, ScriptPlan]:
    """The plans of the stages that a script runs, in order; see :func:`plan_of`."""
    args = parse(_SCRIPTS[script], _DESCRIPTIONS[script], arguments)
    stages: list[ScriptStage] = ["transfer", "finetune"] if script == "both" else [script]
    if script == "both" and args.finetune_config is None:
        stages.remove("finetune")
    if script == "both" and args.load_distill_checkpoint not in (None, "default") and not args.resume_distill:
        stages.remove("transfer")
    if not stages:
        raise UsageError("--load_distill_checkpoint without --finetune_config leaves nothing to do: give it too")
    return {stage: _plan(stage, args, configs) for stage in stages}


def _plan(stage: ScriptStage, args: argparse.Namespace, configs: Path) -> ScriptPlan:
    flags = given_flags(args)
    if "huggingface_token" in flags:
        os.environ["HF_TOKEN"] = flags["huggingface_token"]
    plan = make_script_plan(stage, args, [Path("configs"), configs])
    base = base_config(plan.recipe.model.path)
    check_layers(flags, base)
    remarks = check_rope(plan.model_config, base, overridden="pretrained_model_name_or_path" in flags)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        remarks.append(f"gradient_accumulation_steps counts micro-batches of all {processes} processes together")
    if plan.recipe.run.trackers and "wandb_entity" in flags:
        os.environ["WANDB_ENTITY"] = flags["wandb_entity"]
    return replace(plan, remarks=(*plan.remarks, *remarks))


def _run(script: Script, arguments: Sequence[str], configs: Path, debug: bool) -> None:
    from trenchcoat.conversion import stages

    if not debug:
        quiet_libraries()
    try:
        plans = plans_of(script, arguments, configs)
    except UserError as error:
        raise UsageError(str(error)) from error
    remarks = dict.fromkeys(remark for plan in plans.values() for remark in plan.remarks)
    if remarks:
        warn("; ".join(remarks))
    for stage, plan in plans.items():
        if stage == "finetune":
            if plan.recipe.transfer is not None:
                _use_transfer(plan)
            show(stages.finetune(plan.recipe))
        elif plan.recipe.transfer is not None:
            show(stages.transfer(plan.recipe))
        elif len(plans) == 1:
            warn("this --distill_config has no transfer (trainer.name: null): nothing to do before stage 2")


def _use_transfer(plan: ScriptPlan) -> None:
    """Find the first script's run; raises ``UserError`` that says how to make it when there is none."""
    own = Path(plan.recipe.run.dir)
    if plan.transfer_dir.is_dir() and plan.transfer_dir.resolve() != own.resolve():
        adopt_transfer(plan.transfer_dir, plan.recipe)
    if RunFolder(own).result(TRANSFER) is not None:
        return
    state = "is not finished" if RunFolder(plan.transfer_dir).begun(TRANSFER) else "has not been run"
    raise UserError(
        f"the attention transfer of these arguments {state} (expected in {plan.transfer_dir}): run distill_llama.py "
        "with the same arguments first, or name another run's folder with --load_distill_checkpoint"
    )

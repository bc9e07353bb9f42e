"""What a plan comes to: one sentence, the command to type, and how far its hours can be trusted."""

from __future__ import annotations

import math

from trenchcoat.config.units import gib
from trenchcoat.planning.advice import enough_gpus
from trenchcoat.planning.blocks.ways import BlocksPlan
from trenchcoat.planning.plan import Machine, Plan, Planner, StagePlan, Way

STAGE_TITLES = {"transfer": "attention transfer", "lora": "LoRA"}

TRUST = (
    "Hours are arithmetic: {mfu:.0%} of the peak (--mfu), nothing for evaluation and loading. The only published ones, "
    "of LoLCATs with 20M tokens a stage, are longer: 70B on 8 H100 4 + 14 h (this arithmetic: 0.28 + 0.56), 405B on 24 "
    "H100 16 h of LoRA (7). Measure a few steps before you believe either."
)
"""The published hours (arXiv 2410.10254) beside ours for the recipes `lolcats_llama3_1_70b` and `_405b`."""


def verdict(planner: Planner, plan: Plan, blocks: BlocksPlan | None) -> str:
    """One sentence: whether the machine does each stage, how, and how long it takes; what is missing if it does not.

    ``blocks`` are the ways of running attention transfer block by block, if that is possible at all.
    """
    who = _who(plan.machine)
    if plan.chosen is not None:
        way = plan.chosen
        done = " and ".join(f"{STAGE_TITLES[name]} in {about(stage.hours)}" for name, stage in way.stages.items())
        return f"{who} {done}: {way.name}, up to {gib(way.peak)} each{_without_nf4(planner, way)}."
    found = []
    for name in planner.stages:
        one = _alone(plan, name)
        streamed = blocks.best(plan.machine.gpus) if blocks is not None and name == "transfer" else None
        if one is not None:
            found.append(f"{who} {STAGE_TITLES[name]} in {about(one[1].hours)}: {one[0].name}")
        elif streamed is not None:
            found.append(f"{who} {STAGE_TITLES[name]} block by block in {about(streamed.hours)}: {streamed.name}")
        else:
            found.append(f"{STAGE_TITLES[name]} {_missing(planner, name)}")
    sentence = "; ".join(found)
    return f"{sentence[0].upper()}{sentence[1:]}."


def command(plan: Plan, blocks: BlocksPlan | None, named: str) -> str | None:
    """The command to type for ``named`` (a recipe or model, and overrides); None where no stage can be run."""
    way = plan.chosen
    if way is not None:
        verb = "linearize" if len(way.stages) == 2 else "transfer" if "transfer" in way.stages else "finetune"
        return _launched(f"{verb} {named} {way.settings}".strip(), way, plan.machine)
    one = _alone(plan, "transfer")
    if one is not None:
        return _launched(f"transfer {named} {one[0].settings}".strip(), one[0], plan.machine)
    return f"trenchcoat blocks run {named}" if blocks is not None and blocks.best(plan.machine.gpus) else None


def about(hours: float | None) -> str:
    """A time in words."""
    if hours is None:
        return "a time that --tokens N (of one pass over the data) would tell"
    if hours < 1:
        return f"about {max(1, math.ceil(60 * hours))} min"
    return f"about {hours:.2g} h" if hours < 100 else f"about {hours / 24:.0f} days"


def _who(machine: Machine) -> str:
    number, verb = ("one", "does") if machine.gpus == 1 else (str(machine.gpus), "do")
    text = f"{number} {machine.gpu} with {gib(machine.gpu_memory)} {verb}"
    return f"{text[0].upper()}{text[1:]}"


def _alone(plan: Plan, name: str) -> tuple[Way, StagePlan] | None:
    """The fastest way in which the stage ``name`` fits, whatever the others do."""
    fitting = [(way, way.stages[name]) for way in plan.ways if name in way.stages and way.stage_fits.get(name)]
    return max(fitting, key=lambda pair: pair[1].tokens_per_second, default=None)


def _without_nf4(planner: Planner, way: Way) -> str:
    """How many GPUs would hold the base in its own precision."""
    gpus = enough_gpus(planner) if way.layout.nf4 else None
    return "" if gpus is None else f" (the base in its own precision takes {gpus} such GPUs)"


def _missing(planner: Planner, name: str) -> str:
    """What a stage that does not fit would need."""
    gpus = enough_gpus(planner, [name])
    return f"needs {gpus} such GPUs" if gpus is not None else "does not fit, however many of these GPUs there are"


def _launched(words: str, way: Way, machine: Machine) -> str:
    """The command line of a way: under torchrun where it uses several GPUs."""
    if way.layout.ranks == 1:
        return f"trenchcoat {words}"
    if machine.nodes == 1:
        return f"torchrun --nproc_per_node {machine.gpus} -m trenchcoat {words}"
    meet = "--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
    each = f"--nnodes {machine.nodes} --nproc_per_node {machine.gpus_per_node}"
    return f"torchrun {each} {meet} -m trenchcoat {words}      (on every node)"

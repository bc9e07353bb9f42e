"""Notes on a plan: the bottleneck of a step, uneven splits and, if nothing fits, what would."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from trenchcoat.config.units import gib, tera
from trenchcoat.planning.blocks.size import block_bytes
from trenchcoat.planning.footprint import Layout
from trenchcoat.planning.plan import RESERVE_BYTES, RESERVE_SHARE, Plan, Planner, Way, layouts

MOST_GPUS = 1024
"""The largest number of GPUs tried."""


def notes_on(planner: Planner, plan: Plan) -> list[str]:
    """Notes on ``plan``, made by ``planner``."""
    found = [] if plan.chosen is not None else _what_would_fit(planner, plan)
    machine, needed = plan.machine, sum(plan.disk.values())
    if machine.disk is not None and needed > machine.disk:
        found.append(f"{tera(needed)} of disk are needed, {tera(machine.disk)} is available")
    if machine.bandwidth is not None:
        minutes = plan.disk["weights of the base"] / machine.bandwidth / 60
        found.append(f"reading the weights once takes {minutes:.1f} min at {machine.bandwidth / 1e9:g} GB/s")
    if plan.chosen is not None:
        found += _about(planner, plan.chosen)
    return found


def enough_gpus(planner: Planner, names: Sequence[str] | None = None) -> int | None:
    """The smallest number of GPUs over which the sharded base fits: powers of two in a node, then whole nodes.

    ``names``: of the stages that have to fit; None for all.
    """
    stages = [stage for name, stage in planner.stages.items() if names is None or name in names]
    node = planner.machine.gpus_per_node
    small = [2**i for i in range(1, 10) if 2**i < node]
    for gpus in [*small, *range(node, MOST_GPUS + 1, node)]:
        layout = Layout(ranks=gpus, shared_by=gpus)
        if gpus > 1 and all(planner.fits(planner.memory(stage, layout)) for stage in stages):
            return gpus
    return None


def one_layer_bytes(planner: Planner) -> float:
    """Memory of attention transfer with one layer of the model at a time; the recipe must have that stage."""
    assert planner.recipe.transfer is not None
    return block_bytes(planner.step(planner.recipe.transfer), 1)


def _what_would_fit(planner: Planner, plan: Plan) -> list[str]:
    least = min(plan.ways, key=lambda way: way.peak)
    found = [
        f"nothing fits {plan.machine.gpus} x {gib(plan.machine.gpu_memory)}: the least is {gib(least.peak)} per GPU "
        f"({least.name}), plus a reserve of {gib(RESERVE_BYTES)} and {RESERVE_SHARE:.0%}"
    ]
    smaller = _with_other_settings(planner)
    enough = enough_gpus(planner)
    if smaller is not None:
        found.append(smaller)
    if enough is not None:
        found.append(f"{enough} such GPUs would be enough, with parallel.shard=full")
    elif smaller is None:
        found.append("more GPUs alone would not be enough: use GPUs with more memory, or a smaller data.seq_len")
    if planner.recipe.transfer is not None:
        found.append(
            "attention transfer needs only one layer at a time: block by block it would take "
            f"{gib(one_layer_bytes(planner))} or more on one GPU; `trenchcoat blocks plan` shows how"
        )
    return found


def _with_other_settings(planner: Planner) -> str | None:
    """The first of gradient checkpointing, batch size 1, or both, that makes one of the ways fit."""
    lora = planner.recipe.lora
    checkpointed: list[tuple[str, str, Any]] = []
    if lora is not None and not lora.gradient_checkpointing:
        checkpointed.append(("lora", "gradient_checkpointing", True))
    rows = [(name, "batch_size", 1) for name, stage in planner.stages.items() if stage.batch_size > 1]
    for changes in (checkpointed, rows, checkpointed + rows if checkpointed and rows else []):
        recipe = planner.recipe
        for stage, field, value in changes:
            recipe = dataclasses.replace(
                recipe, **{stage: dataclasses.replace(getattr(recipe, stage), **{field: value})}
            )
        changed = dataclasses.replace(planner, recipe=recipe)
        for name, chosen, layout in layouts(planner.machine) if changes else []:
            if changed.way(name, chosen, layout).fits:
                settings = " ".join(f"{stage}.{field}={str(value).lower()}" for stage, field, value in changes)
                return f"with {settings} it would fit: {name}"
    return None


def _about(planner: Planner, way: Way) -> list[str]:
    """Notes on the chosen way."""
    found = []
    for name, stage in planner.stages.items():
        waits = planner.seconds(stage, way.layout)
        bound = max(waits, key=lambda key: waits[key])
        if bound != "arithmetic":
            rows = math.ceil(waits[bound] / waits["arithmetic"]) * stage.batch_size
            found.append(
                f"{name} is bound by the {bound}: {waits[bound]:.2g} s per micro-batch against "
                f"{waits['arithmetic']:.2g} s of arithmetic; {name}.batch_size={rows} would balance the two"
            )
    if way.layout.offload:
        held = next(iter(way.stages.values())).memory.host
        found.append(f"{way.name}: {gib(held * planner.machine.node_gpus)} of host memory per node")
    for name, stage in planner.stages.items():
        if stage.accumulation % way.layout.ranks:
            found.append(uneven(name, stage.accumulation, way.layout.ranks))
    if any(stage.tokens is None for stage in way.stages.values()):
        found.append(f"the size of {planner.recipe.data.path} is unknown; with --tokens the hours are shown too")
    return found


def uneven(stage: str, accumulation: int, processes: int) -> str:
    """Note that the micro-batches of a step do not divide evenly among ``processes``."""
    return (
        f"{stage}.accumulation={accumulation} micro-batches per step do not divide evenly among {processes} "
        f"processes; {stage}.accumulation={processes * math.ceil(accumulation / processes)} does"
    )

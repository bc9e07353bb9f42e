"""What is worth saying about a plan: what it waits for, what does not divide, and, when nothing fits, what would."""

from __future__ import annotations

import dataclasses
import math

from trenchcoat.config import Recipe
from trenchcoat.config.units import gib, tera
from trenchcoat.planning.blocksize import block_bytes
from trenchcoat.planning.footprint import Layout
from trenchcoat.planning.plan import RESERVE_BYTES, RESERVE_SHARE, Plan, Planner, Way, layouts

MOST_GPUS = 1024
"""More are not looked at."""


def notes_on(planner: Planner, plan: Plan) -> list[str]:
    """Sentences about ``plan``, which ``planner`` made."""
    found = [] if plan.chosen is not None else _what_would_fit(planner, plan)
    machine, needed = plan.machine, sum(plan.disk.values())
    if machine.disk is not None and needed > machine.disk:
        found.append(f"{tera(needed)} of disk are needed, {tera(machine.disk)} are there")
    if machine.bandwidth is not None:
        minutes = plan.disk["weights of the base"] / machine.bandwidth / 60
        found.append(f"reading the weights once takes {minutes:.1f} min at {machine.bandwidth / 1e9:g} GB/s")
    if plan.chosen is not None:
        found += _about(planner, plan.chosen)
    return found


def enough_gpus(planner: Planner) -> int | None:
    """The smallest number of GPUs over which the sharded base fits: powers of two in a node, then whole nodes."""
    node = planner.machine.gpus_per_node
    small = [2**i for i in range(1, 10) if 2**i < node]
    for gpus in [*small, *range(node, MOST_GPUS + 1, node)]:
        layout = Layout(ranks=gpus, shared_by=gpus)
        if gpus > 1 and all(planner.fits(planner.memory(stage, layout)) for stage in planner.stages.values()):
            return gpus
    return None


def one_layer_bytes(planner: Planner) -> float:
    """Attention transfer with a single layer of the model in memory; the recipe must have that stage."""
    recipe = planner.recipe
    assert recipe.transfer is not None
    parts = (planner.shapes, recipe.student, recipe.transfer)
    return block_bytes(*parts, 1, seq_len=recipe.data.seq_len, dtype_bytes=planner.dtype_bytes)


def _what_would_fit(planner: Planner, plan: Plan) -> list[str]:
    least = min(plan.ways, key=lambda way: way.peak)
    found = [
        f"nothing fits {plan.machine.gpus} x {gib(plan.machine.gpu_memory)}: the least is {gib(least.peak)} a GPU "
        f"({least.name}), beside a reserve of {gib(RESERVE_BYTES)} and {RESERVE_SHARE:.0%}"
    ]
    smaller = _with_other_settings(planner)
    enough = enough_gpus(planner)
    if smaller is not None:
        found.append(smaller)
    if enough is not None:
        found.append(f"{enough} such GPUs would do, with parallel.shard=full")
    elif smaller is None:
        found.append("more GPUs alone would not do: use GPUs with more memory, or a smaller data.seq_len")
    if planner.recipe.transfer is not None:
        found.append(
            "attention transfer needs only one layer at a time: block by block it would take "
            f"{gib(one_layer_bytes(planner))} or more on one GPU; `trenchcoat blocks plan` says how"
        )
    return found


def _with_other_settings(planner: Planner) -> str | None:
    """Checkpointing, single rows, or both: the first with which one of the ways fits."""
    recipe = planner.recipe
    trials: list[tuple[str, Recipe]] = []
    if recipe.lora is not None and not recipe.lora.gradient_checkpointing:
        lora = dataclasses.replace(recipe.lora, gradient_checkpointing=True)
        trials.append(("lora.gradient_checkpointing=true", dataclasses.replace(recipe, lora=lora)))
    large = [name for name, stage in planner.stages.items() if stage.batch_size > 1]
    if large:
        settings = " ".join(f"{name}.batch_size=1" for name in large)
        trials.append((settings, _single_rows(recipe)))
        if len(trials) == 2:
            trials.append((f"{trials[0][0]} {settings}", _single_rows(trials[0][1])))
    for settings, changed in trials:
        other = dataclasses.replace(planner, recipe=changed)
        for name, chosen, layout in layouts(planner.machine):
            if other.way(name, chosen, layout).fits:
                return f"with {settings} it would fit: {name}"
    return None


def _single_rows(recipe: Recipe) -> Recipe:
    transfer, lora = recipe.transfer, recipe.lora
    return dataclasses.replace(
        recipe,
        transfer=None if transfer is None else dataclasses.replace(transfer, batch_size=1),
        lora=None if lora is None else dataclasses.replace(lora, batch_size=1),
    )


def _about(planner: Planner, way: Way) -> list[str]:
    """Of the way that was chosen."""
    found = []
    for name, stage in planner.stages.items():
        waits = planner.seconds(stage, way.layout)
        bound = max(waits, key=lambda key: waits[key])
        if bound != "arithmetic":
            rows = math.ceil(waits[bound] / waits["arithmetic"]) * stage.batch_size
            found.append(
                f"{name} waits for the {bound}: {waits[bound]:.2g} s a micro-batch against "
                f"{waits['arithmetic']:.2g} s of arithmetic; {name}.batch_size={rows} would balance them"
            )
    if way.layout.offload:
        held = next(iter(way.stages.values())).memory.host
        processes = min(planner.machine.gpus, planner.machine.gpus_per_node)
        found.append(f"{way.name}: {gib(held * processes)} of host memory a node")
    for name, stage in planner.stages.items():
        ranks = way.layout.ranks
        if stage.accumulation % ranks:
            whole = ranks * math.ceil(stage.accumulation / ranks)
            found.append(
                f"{name}.accumulation={stage.accumulation} micro-batches a step do not divide among {ranks} processes; "
                f"{name}.accumulation={whole} does"
            )
    if any(stage.tokens is None for stage in way.stages.values()):
        found.append(f"the size of {planner.recipe.data.path} is not known here; --tokens gives hours")
    return found

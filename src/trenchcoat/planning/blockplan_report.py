"""A plan of block-wise transfer for people and for programs: tables, what is worth saying about it, a JSON document."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.table import Table

from trenchcoat.config import Recipe
from trenchcoat.config.units import gib, tera
from trenchcoat.planning.blockplan import BlocksPlan, plan_blocks
from trenchcoat.planning.blockways import HOST_USABLE, PARALLEL, STREAMING, BlockWay
from trenchcoat.planning.plan import DISK_RATE, HOST_MEMORY, RESERVE_BYTES, RESERVE_SHARE, Machine, PlanReport

Column = tuple[str, Callable[[BlockWay], str]]

_WHO: list[Column] = [
    ("GPUs", lambda way: str(way.gpus)),
    ("way", lambda way: f"{way.name} *" if way.asked else way.name),
]
_MEMORY: list[Column] = [
    ("layers\na block", lambda way: str(way.layers)),
    ("fits", lambda way: "yes" if way.fits else "no"),
    ("one\nGPU", lambda way: gib(way.device_bytes)),
    ("host,\na node", lambda way: tera(way.host_bytes)),
    ("hidden states\non disk", lambda way: tera(way.disk_bytes) if way.disk_bytes else "-"),
]
_TIME: list[Column] = [
    ("passes", lambda way: str(way.passes) if way.passes else "-"),
    ("read", lambda way: _if_possible(way, tera(way.read_bytes))),
    ("written", lambda way: tera(way.written_bytes) if way.written_bytes else "-"),
    ("hours of\ncomputing", lambda way: _hours(way, way.compute_hours)),
    ("hours of\ndisk", lambda way: _hours(way, way.disk_hours)),
    ("hours", lambda way: _hours(way, way.hours)),
    ("GPU-\nhours", lambda way: _hours(way, way.gpu_hours)),
]
_LIMIT: Column = ("limit", lambda way: way.limit)
_TEXTS = ("way", "fits", "limit")


def report_blocks_plan(recipe: Recipe, machine: Machine, *, tokens: float | None = None) -> PlanReport:
    """Plan the transfer of ``recipe`` block by block; ``tokens`` is one pass over the training data.

    Raises ``UserError``.
    """
    plan = plan_blocks(recipe, machine, tokens)
    notes = notes_on_blocks(recipe, plan)
    memory = _table("What it needs", [*_WHO, *_MEMORY, _LIMIT], plan)
    time = _table("How long it takes, at least", [*_WHO, *_TIME, _LIMIT], plan)
    time.caption = "* what `trenchcoat blocks run` does with this recipe"
    shown = (_headline(recipe, plan), memory, time, *(f"- {note}" for note in notes))
    return PlanReport(shown, plan.as_dict() | {"chosen": plan.chosen.name, "notes": notes})


def side_by_side(plan: BlocksPlan) -> Table:
    """Joint, streaming, pipeline and parallel with all GPUs of the machine, for `trenchcoat plan`."""
    ways = [way for way in plan.of(plan.machine.gpus) if way.kind != STREAMING or way.asked]
    if plan.chosen.kind != STREAMING:
        found = plan.best(plan.machine.gpus, STREAMING)
        ways[1:1] = [] if found is None else [found]
    columns = [*_WHO[1:], *_MEMORY, *_TIME[-2:], _LIMIT]
    return _table_of("Attention transfer: all layers at once, or block by block", columns, ways)


def notes_on_blocks(recipe: Recipe, plan: BlocksPlan) -> list[str]:
    """Sentences about ``plan``: what was chosen and why, what does not fit, what is not counted."""
    gpus, chosen, transfer = plan.machine.gpus, plan.chosen, recipe.transfer
    assert transfer is not None
    found = [f"{chosen.name}: {chosen.why}"] if chosen.why else []
    for way in plan.of(gpus):
        if not way.fits and not way.asked and way.why:
            found.append(f"{way.name}: {way.why}")
    quickest = plan.best(gpus)
    if quickest is not None and quickest is not chosen and quickest.hours < 0.9 * (chosen.hours or math.inf):
        found.append(f"quicker: {quickest.name}, {quickest.hours:.3g} h ({quickest.settings})")
    parallel = plan.best(gpus, PARALLEL)
    if parallel is not None:
        found.append(
            f"parallel: {parallel.collect_hours:.3g} of its {parallel.hours:.3g} h are the teacher's pass on the "
            "GPUs of one node, which keeps the inputs of all blocks"
        )
    if chosen.kind == STREAMING and transfer.accumulation % gpus:
        whole = gpus * math.ceil(transfer.accumulation / gpus)
        found.append(
            f"transfer.accumulation={transfer.accumulation} micro-batches a step do not divide among {gpus} processes; "
            f"transfer.accumulation={whole} does"
        )
    if recipe.model.quantize != "none":
        found.append(
            f"blocks are counted in the weights' own precision, not with model.quantize={recipe.model.quantize}"
        )
    if plan.machine.disk is None:
        found.append("--disk says how much there is, to compare with")
    return found


def _headline(recipe: Recipe, plan: BlocksPlan) -> str:
    machine, rate = plan.machine, plan.machine.bandwidth or DISK_RATE
    host = gib(machine.host_memory) if machine.host_memory else f"{gib(HOST_MEMORY)} a GPU"
    return (
        f"{plan.model}: attention transfer of {plan.shapes.layers} layers on {plan.tokens:,.0f} tokens "
        f"({plan.distinct:,.0f} in distinct rows of {recipe.data.seq_len}; {plan.validation:,.0f} for validation); "
        f"hidden states of the distinct ones are {tera(plan.boundary_bytes)} between two blocks\n"
        f"up to {machine.gpus} x {machine.gpu} with {gib(machine.gpu_memory)}, "
        f"{min(machine.gpus, machine.gpus_per_node)} a node; {machine.mfu:.0%} of the peak; {HOST_USABLE:.0%} of "
        f"{host} of host memory; a node reads {rate / 1e9:g} and writes "
        f"{(machine.write_bandwidth or rate) / 1e9:g} GB/s; {gib(RESERVE_BYTES)} and {RESERVE_SHARE:.0%} of a GPU's "
        f"need kept in reserve; everything else on disk is {tera(plan.other_disk)}"
    )


def _table(title: str, columns: list[Column], plan: BlocksPlan) -> Table:
    return _table_of(title, columns, plan.ways)


def _table_of(title: str, columns: list[Column], ways: list[BlockWay]) -> Table:
    """One row a way; a line where the number of GPUs changes."""
    table = Table(title=title, title_justify="left")
    for name, _ in columns:
        table.add_column(name, justify="left" if name in _TEXTS else "right")
    for i, way in enumerate(ways):
        if i and way.gpus != ways[i - 1].gpus:
            table.add_section()
        table.add_row(*(cell(way) for _, cell in columns))
    return table


def _if_possible(way: BlockWay, text: str) -> str:
    return text if way.passes else "-"


def _hours(way: BlockWay, hours: float) -> str:
    return _if_possible(way, f"{hours:.3g}" if hours >= 0.01 else f"{hours:.1g}")

"""Reports of a plan: tables and notes for the terminal, and a complete JSON document.

`trenchcoat plan` reports the ways of running a recipe, and compares a simulated step with the arithmetic; `trenchcoat
blocks plan` reports the ways of running its attention transfer block by block.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trenchcoat.config import Recipe, UserError
from trenchcoat.config.units import GIB, gib, tera
from trenchcoat.models.shapes import find_config
from trenchcoat.planning.advice import notes_on, uneven
from trenchcoat.planning.blocks.ways import PARALLEL, STREAMING, BlocksPlan, BlockWay, plan_blocks, plan_transfer
from trenchcoat.planning.footprint import MEMORY_PARTS
from trenchcoat.planning.plan import (
    HOST_MEMORY,
    HOST_USABLE,
    RESERVE_BYTES,
    RESERVE_SHARE,
    Machine,
    Plan,
    Planner,
    StagePlan,
    Way,
    make_plan,
)
from trenchcoat.planning.simulate import Sharding, simulate
from trenchcoat.planning.verdict import STAGE_TITLES, TRUST, command, verdict

_WIDTH = 80
"""Columns of a terminal that a plan without details fits."""
_NARROW: Any = {"box": SIMPLE_HEAD, "padding": 0, "show_edge": False}
"""A table of many columns has no lines between them."""
_TEXT_COLUMNS = ("way", "fits", "settings", "limit", "part", "stage")
"""Left-aligned columns."""


@dataclass(frozen=True)
class PlanReport:
    """``shown`` for the terminal (texts and tables, in order), ``document`` for JSON."""

    shown: tuple[Any, ...]
    document: dict[str, Any]


def report_plan(
    recipe: Recipe,
    machine: Machine,
    *,
    named: str,
    tokens: float | None = None,
    simulated: bool = False,
    details: bool = False,
) -> PlanReport:
    """Plan ``recipe`` on ``machine``; with ``simulated``, also run a step of each stage on fake tensors to compare.

    ``named``: the recipe or model and its overrides, as they were typed. ``tokens``: the number of training tokens per
    epoch. ``details``: also show the memory part by part, the ways through the blocks, disk and notes. Raises
    ``UserError``.
    """
    planner, plan = make_plan(recipe, machine, tokens=tokens)
    blocks = _blocks_plan(planner, plan)
    one_by_one = blocks if isinstance(blocks, BlocksPlan) else None
    notes, sentence = notes_on(planner, plan), verdict(planner, plan, one_by_one)
    typed = command(plan, one_by_one, f"{named} model.device=auto" if recipe.model.device == "cpu" else named)
    shown: list[Any] = ["", _wrapped(sentence), "", *([f"  {typed}", ""] if typed else [])]
    shown += [_ways_table(plan), _wrapped(TRUST.format(mfu=machine.mfu))]
    if details:
        shown += ["", _wrapped(_headline(recipe, plan)), _speeds_table(plan)]
        shown += [_parts_table(plan, stage) for stage in planner.stages]
        shown += (
            [] if blocks is None else [_side_by_side(blocks) if isinstance(blocks, BlocksPlan) else _wrapped(blocks)]
        )
        shown += [_wrapped(_disk_line(plan)), _wrapped(_state_line(plan))]
    if details or plan.chosen is None:
        shown += _bullets(notes)
    document = plan.as_dict() | {"notes": notes, "verdict": sentence, "command": typed}
    if blocks is not None:
        document["blocks"] = asdict(blocks) if isinstance(blocks, BlocksPlan) else blocks
    if simulated:
        way = _way_to_simulate(plan)
        document["simulated"] = {name: _simulated(planner, way, name) for name in planner.stages}
        shown.append(_comparison(way.name, document["simulated"]))
    return PlanReport(tuple(shown), document)


def _blocks_plan(planner: Planner, plan: Plan) -> BlocksPlan | str | None:
    """The ways of running attention transfer block by block, or why there are none; None without that stage."""
    if planner.recipe.transfer is None:
        return None
    try:
        return plan_transfer(planner, plan, gpus=[plan.machine.gpus])
    except UserError as error:
        return f"block by block: {error}"


def report_blocks_plan(recipe: Recipe, machine: Machine, *, tokens: float | None = None) -> PlanReport:
    """Plan the transfer of ``recipe`` block by block; ``tokens`` is the number of training tokens per epoch.

    Raises ``UserError``.
    """
    plan = plan_blocks(recipe, machine, tokens)
    notes = notes_on_blocks(recipe, plan)
    memory = _block_ways("What it needs", _WHO + _MEMORY + _LIMIT, plan.ways)
    time = _block_ways("How long it takes, at least", _WHO + _TIME, plan.ways)
    time.caption = "* what `trenchcoat blocks run` does with this recipe"
    shown = (_wrapped(_blocks_headline(recipe, plan)), memory, time, *_bullets(notes))
    return PlanReport(shown, asdict(plan) | {"chosen": plan.chosen.name, "notes": notes})


def notes_on_blocks(recipe: Recipe, plan: BlocksPlan) -> list[str]:
    """Notes on ``plan``: the choice and its reason, what does not fit, what is not counted."""
    gpus, chosen, transfer = plan.machine.gpus, plan.chosen, recipe.transfer
    assert transfer is not None
    found = [f"{chosen.name}: {chosen.why}"] if chosen.why else []
    for way in plan.of(gpus):
        if not way.fits and not way.asked and way.why:
            found.append(f"{way.name}: {way.why}")
    fastest = plan.best(gpus)
    if fastest is not None and fastest is not chosen and fastest.hours < 0.9 * (chosen.hours or math.inf):
        found.append(f"faster: {fastest.name}, {fastest.hours:.3g} h ({fastest.settings})")
    parallel = plan.best(gpus, PARALLEL)
    if parallel is not None:
        found.append(
            f"parallel: {parallel.collect_hours:.3g} of its {parallel.hours:.3g} h are the teacher's pass on the "
            "GPUs of one node, which stores the inputs of all blocks"
        )
    if chosen.kind == STREAMING and transfer.accumulation % gpus:
        found.append(uneven("transfer", transfer.accumulation, gpus))
    if recipe.model.quantize != "none":
        found.append(
            f"blocks are counted in the weights' own precision, not with model.quantize={recipe.model.quantize}"
        )
    if plan.machine.disk is None:
        found.append("pass the free disk space as --disk to check it too")
    return found


def _wrapped(text: str, indent: str = "") -> str:
    """``text`` line by line within ``_WIDTH`` columns."""
    options: Any = {"subsequent_indent": indent, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, _WIDTH, **options) for line in text.splitlines())


def _bullets(notes: Iterable[str]) -> list[str]:
    return [_wrapped(f"- {note}", "  ") for note in notes]


def _hardware(machine: Machine) -> str:
    return (
        f"{machine.gpus} x {machine.gpu} with {gib(machine.gpu_memory)}, {machine.node_gpus} per node; "
        f"{machine.mfu:.0%} of the peak; "
    )


def _headline(recipe: Recipe, plan: Plan) -> str:
    shapes = plan.shapes
    rows = ", ".join(
        f"{name} {stage.batch_size} x {recipe.row_tokens(stage)} tokens per process"
        for name, stage in (("transfer", recipe.transfer), ("lora", recipe.lora))
        if stage is not None
    )
    return (
        f"{plan.model}: {shapes.parameters / 1e9:.4g} billion parameters in {shapes.layers} layers; {rows}\n"
        f"{_hardware(plan.machine)}{gib(RESERVE_BYTES)} and {RESERVE_SHARE:.0%} of the need kept in reserve"
    )


def _blocks_headline(recipe: Recipe, plan: BlocksPlan) -> str:
    machine = plan.machine
    host = gib(machine.host_memory) if machine.host_memory else f"{gib(HOST_MEMORY)} per GPU"
    return (
        f"{plan.model}: attention transfer of {plan.shapes.layers} layers on {plan.tokens:,} tokens "
        f"({plan.distinct:,} in distinct rows of {recipe.data.seq_len}; {plan.validation:,} for validation); "
        f"hidden states of the distinct ones are {tera(plan.boundary_bytes)} between two blocks\n"
        f"up to {_hardware(machine)}{HOST_USABLE:.0%} of {host} of host memory; a node reads "
        f"{machine.read_rate / 1e9:g} and writes {machine.write_rate / 1e9:g} GB/s; {gib(RESERVE_BYTES)} and "
        f"{RESERVE_SHARE:.0%} of a GPU's need kept in reserve; everything else on disk is {tera(plan.other_disk)}"
    )


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str] | None], **style: Any) -> Table:
    """A table of ``rows``; None draws a separator line."""
    table = Table(title=title, title_justify="left", **style)
    for heading in headings:
        justify: Any = "left" if heading in _TEXT_COLUMNS else "right"
        table.add_column(heading, justify=justify, no_wrap=heading in ("part", "limit"))
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    return table


def _ways_table(plan: Plan) -> Table:
    """One row per way: what fits and how long it takes."""
    stages = list(plan.ways[0].stages)
    titles = " + ".join(stages)
    rows = [
        [
            f"{way.name} *" if way.name == plan.best else way.name,
            " + ".join(gib(stage.memory.total).removesuffix(" GiB") for stage in way.stages.values()),
            "yes" if way.fits else "no",
            " + ".join(_speed(stage)[1] for stage in way.stages.values()),
        ]
        for way in plan.ways
    ]
    table = _table("Ways to run it", ["way", f"GiB of one GPU:\n{titles}", "fits", f"hours:\n{titles}"], rows)
    mark = "* the fastest that fits; " if plan.best is not None else ""
    table.caption = f"{mark}--details shows the rest"
    return table


def _speeds_table(plan: Plan) -> Table:
    """One row per way: tokens/s of all GPUs together, and the settings that select it."""
    rows = [[way.name, *(_speed(stage)[0] for stage in way.stages.values()), way.settings] for way in plan.ways]
    headings = [f"{name}\ntokens/s" for name in plan.ways[0].stages]
    return _table("Tokens/s of all GPUs", ["way", *headings, "settings"], rows, **_NARROW)


def _speed(stage: StagePlan) -> tuple[str, str]:
    waits = "" if stage.bound_by == "arithmetic" else f" ({stage.bound_by})"
    hours = "?" if stage.hours is None else f"{stage.hours:.3g}" if stage.hours >= 0.01 else "< 0.01"
    return f"{stage.tokens_per_second:,.0f}{waits}", hours


def _parts_table(plan: Plan, stage: str) -> Table:
    """One row per part, one column per way."""
    memories = [way.stages[stage].memory for way in plan.ways]
    parts = [part for part in MEMORY_PARTS if any(memory.parts[part] for memory in memories)]
    return _table(
        f"GiB of one GPU at its worst moment: {STAGE_TITLES[stage]}",
        ["part", *(way.name for way in plan.ways)],
        [
            *([part, *(f"{memory.parts[part] / GIB:.2f}" for memory in memories)] for part in parts),
            None,
            ["total", *(f"{memory.total / GIB:.2f}" for memory in memories)],
            ["moment", *(memory.moment for memory in memories)],
        ],
        **_NARROW,
    )


_Column = tuple[str, Callable[[BlockWay], str]]


def _hours(way: BlockWay, hours: float) -> str:
    return "-" if not way.passes else f"{hours:.3g}" if hours >= 0.01 else f"{hours:.1g}"


_WHO: list[_Column] = [
    ("GPUs", lambda way: str(way.gpus)),
    ("way", lambda way: f"{way.name} *" if way.asked else way.name),
]
_MEMORY: list[_Column] = [
    ("layers\na block", lambda way: str(way.layers)),
    ("fits", lambda way: "yes" if way.fits else "no"),
    ("one\nGPU", lambda way: gib(way.device_bytes)),
    ("host,\na node", lambda way: tera(way.host_bytes)),
    ("states\non disk", lambda way: tera(way.disk_bytes) if way.disk_bytes else "-"),
]
_TIME: list[_Column] = [
    ("passes", lambda way: str(way.passes) if way.passes else "-"),
    ("read", lambda way: tera(way.read_bytes) if way.passes else "-"),
    ("written", lambda way: tera(way.written_bytes) if way.written_bytes else "-"),
    ("hours of\ncomputing", lambda way: _hours(way, way.compute_hours)),
    ("hours of\ndisk", lambda way: _hours(way, way.disk_hours)),
    ("hours", lambda way: _hours(way, way.hours)),
    ("GPU-\nhours", lambda way: _hours(way, way.gpu_hours)),
]
_LIMIT: list[_Column] = [("limit", lambda way: way.limit)]


def _block_ways(title: str, columns: list[_Column], ways: list[BlockWay]) -> Table:
    """One row per way; a separator where the number of GPUs changes."""
    rows: list[list[str] | None] = []
    for i, way in enumerate(ways):
        if i and way.gpus != ways[i - 1].gpus:
            rows.append(None)
        rows.append([cell(way) for _, cell in columns])
    return _table(title, [heading for heading, _ in columns], rows, **_NARROW)


def _side_by_side(plan: BlocksPlan) -> Table:
    """Joint, streaming, pipeline and parallel with all GPUs of the machine, for `trenchcoat plan`."""
    ways = [way for way in plan.of(plan.machine.gpus) if way.kind != STREAMING or way.asked]
    if plan.chosen.kind != STREAMING:
        found = plan.best(plan.machine.gpus, STREAMING)
        ways[1:1] = [] if found is None else [found]
    columns = _WHO[1:] + _MEMORY + _TIME[-2:] + _LIMIT
    return _block_ways("Attention transfer: all layers at once, or block by block", columns, ways)


def _disk_line(plan: Plan) -> str:
    parts = ", ".join(f"{name} {tera(size)}" for name, size in plan.disk.items() if size >= 1e6)
    return f"disk: {tera(sum(plan.disk.values()))} ({parts})"


def _state_line(plan: Plan) -> str:
    (far, window), shapes = plan.state, plan.shapes
    teacher = plan.dtype_bytes * 2 * shapes.layers * shapes.kv_heads * shapes.head_dim
    kept = f", and {plan.kept_bytes / 1024:.3g} KiB a token of kept groups" if plan.kept_bytes else ""
    return (
        f"during generation, one sequence holds {far / GIB:.3g} GiB of far sums (float32) and "
        f"{window / GIB:.3g} GiB of window, whatever its length{kept} (the original model: {teacher / 1024:.3g} KiB a "
        "token)"
    )


def _way_to_simulate(plan: Plan) -> Way:
    """The chosen way, else a sharded one, else the first, among those that can be simulated."""
    able = [way for way in plan.ways if not way.layout.nf4 and not way.layout.offload]
    preferred = [way for way in able if way.name == plan.best] or [w for w in able if w.layout.shared_by > 1]
    return (preferred or able)[0]


def _simulated(planner: Planner, way: Way, name: str) -> dict[str, Any]:
    """Simulated and calculated memory of a step of the stage ``name``."""
    layout, counted = way.layout, way.stages[name].memory.total
    shard: Sharding = "full" if layout.shared_by == layout.ranks else "node"
    found = simulate(
        find_config(planner.recipe.model.path, planner.recipe.model.revision),
        planner.recipe.student,
        planner.stages[name],
        seq_len=planner.recipe.row_tokens(planner.stages[name]),
        ranks=layout.ranks,
        shard="none" if layout.shared_by == 1 else shard,
        node_size=planner.machine.gpus_per_node,
        dtype=planner.dtype,
    )
    sizes = {"arithmetic_bytes": counted, "simulated_bytes": found.peak}
    return {"way": way.name, **sizes, "parts": found.parts, "seconds": found.seconds}


def _comparison(way: str, measured: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, found in measured.items():
        counted, simulated = found["arithmetic_bytes"], found["simulated_bytes"]
        sizes = [f"{counted / GIB:.2f}", f"{simulated / GIB:.2f}", f"{counted / simulated - 1:+.1%}"]
        rows.append([STAGE_TITLES[name], *sizes, f"{found['seconds']:.0f} s"])
    headings = ("stage", "arithmetic", "simulation", "difference", "simulated in")
    return _table(f"Arithmetic and simulation, GiB of one GPU: {way}", headings, rows)

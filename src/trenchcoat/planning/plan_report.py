"""A plan for people and for programs: rich tables, a JSON document, and the simulation beside the arithmetic."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from trenchcoat.config import Recipe, UserError
from trenchcoat.config.units import GIB, gib, tera
from trenchcoat.models.shapes import find_config
from trenchcoat.planning.advice import notes_on
from trenchcoat.planning.blockplan import BlocksPlan, blocks_of
from trenchcoat.planning.blockplan_report import side_by_side
from trenchcoat.planning.footprint import PARTS, Layout
from trenchcoat.planning.plan import (
    RESERVE_BYTES,
    RESERVE_SHARE,
    Machine,
    Plan,
    Planner,
    PlanReport,
    StagePlan,
    Way,
    make_plan,
)
from trenchcoat.planning.simulate import Sharding, Simulated, simulate

STAGE_TITLES = {"transfer": "attention transfer", "lora": "LoRA"}


def report_plan(
    recipe: Recipe, machine: Machine, *, tokens: float | None = None, simulated: bool = False
) -> PlanReport:
    """Plan ``recipe`` on ``machine``; with ``simulated`` a step of each stage is run on fake tensors, and compared.

    ``tokens`` is the size of one pass over the training data. Raises ``UserError``.
    """
    planner, plan = make_plan(recipe, machine, tokens=tokens)
    notes = notes_on(planner, plan)
    shown: list[Any] = [_headline(recipe, plan), _ways_table(plan)]
    shown += [_parts_table(plan, stage) for stage in planner.stages]
    document = plan.as_dict() | {"notes": notes}
    if recipe.transfer is not None:
        blocks = blocks_beside(planner, plan)
        shown.append(blocks if isinstance(blocks, str) else side_by_side(blocks))
        document["blocks"] = blocks if isinstance(blocks, str) else blocks.as_dict()
    shown += [_disk_line(plan), _state_line(plan), *(f"- {note}" for note in notes)]
    if simulated:
        way = _way_to_simulate(plan)
        measured = {name: _simulate(planner, way, name) for name in planner.stages}
        shown.append(_comparison(way, measured))
        document["simulated"] = {
            name: {
                "way": way.name,
                "arithmetic_bytes": way.stages[name].memory.total,
                "simulated_bytes": found.peak,
                "parts": found.parts,
                "seconds": found.seconds,
            }
            for name, found in measured.items()
        }
    return PlanReport(tuple(shown), document)


def blocks_beside(planner: Planner, plan: Plan) -> BlocksPlan | str:
    """Transfer block by block with all GPUs of the machine, or why it cannot be planned."""
    try:
        return blocks_of(planner, plan, gpus=[plan.machine.gpus])
    except UserError as error:
        return f"block by block: {error}"


def _headline(recipe: Recipe, plan: Plan) -> str:
    machine, shapes = plan.machine, plan.shapes
    rows = ", ".join(
        f"{name} {stage.batch_size} x {recipe.data.seq_len} tokens a process"
        for name, stage in (("transfer", recipe.transfer), ("lora", recipe.lora))
        if stage is not None
    )
    return (
        f"{plan.model}: {shapes.parameters / 1e9:.4g} billion parameters in {shapes.layers} layers; {rows}\n"
        f"{machine.gpus} x {machine.gpu} with {gib(machine.gpu_memory)}, {min(machine.gpus, machine.gpus_per_node)} a "
        f"node; {machine.mfu:.0%} of the peak; {gib(RESERVE_BYTES)} and {RESERVE_SHARE:.0%} of the need kept in reserve"
    )


def _ways_table(plan: Plan) -> Table:
    """One row a way."""
    table = Table(title="Ways to run it (memory of one GPU, tokens/s of all)", title_justify="left")
    table.add_column("way")
    stages = list(plan.ways[0].stages)
    for name in stages:
        table.add_column(STAGE_TITLES[name], justify="right")
    table.add_column("fits")
    for name in stages:
        for what in ("tokens/s", "hours"):
            table.add_column(f"{name}\n{what}", justify="right")
    table.add_column("settings")
    for way in plan.ways:
        table.add_row(
            f"{way.name} *" if way.name == plan.best else way.name,
            *(gib(stage.memory.total) for stage in way.stages.values()),
            "yes" if way.fits else "no",
            *(cell for stage in way.stages.values() for cell in _speed(stage)),
            way.settings,
        )
    if plan.best is not None:
        table.caption = "* the quickest that fits"
    return table


def _speed(stage: StagePlan) -> tuple[str, str]:
    waits = "" if stage.bound_by == "arithmetic" else f" ({stage.bound_by})"
    hours = "?" if stage.hours is None else f"{stage.hours:.3g}"
    return f"{stage.tokens_per_second:,.0f}{waits}", hours


def _parts_table(plan: Plan, stage: str) -> Table:
    """One row a component, one column a way."""
    table = Table(title=f"GiB of one GPU at its worst moment: {STAGE_TITLES[stage]}", title_justify="left")
    table.add_column("part")
    for way in plan.ways:
        table.add_column(way.name, justify="right")
    memories = [way.stages[stage].memory for way in plan.ways]
    for part in PARTS:
        if any(memory.parts[part] for memory in memories):
            table.add_row(part, *(f"{memory.parts[part] / GIB:.2f}" for memory in memories))
    table.add_section()
    table.add_row("total", *(f"{memory.total / GIB:.2f}" for memory in memories))
    table.add_row("moment", *(memory.moment for memory in memories))
    return table


def _disk_line(plan: Plan) -> str:
    parts = ", ".join(f"{name} {tera(size)}" for name, size in plan.disk.items() if size >= 1e6)
    return f"disk: {tera(sum(plan.disk.values()))} ({parts})"


def _state_line(plan: Plan) -> str:
    far, window = plan.state
    return (
        f"while text is written, one sequence holds {far / GIB:.3g} GiB of far sums (float32) and "
        f"{window / GIB:.3g} GiB of window, however long it is"
    )


def _way_to_simulate(plan: Plan) -> Way:
    """The chosen way, or the sharded one, if it can be simulated; else the first that can."""
    able = [way for way in plan.ways if not way.layout.nf4 and not way.layout.offload]
    preferred = [way for way in able if way.name == plan.best] or [w for w in able if w.layout.shared_by > 1]
    return (preferred or able)[0]


def _simulate(planner: Planner, way: Way, name: str) -> Simulated:
    stage, layout = planner.stages[name], way.layout
    return simulate(
        find_config(planner.recipe.model.path, planner.recipe.model.revision),
        planner.recipe.student,
        stage,
        seq_len=planner.recipe.data.seq_len,
        ranks=layout.ranks,
        shard=_sharding(layout),
        node_size=planner.machine.gpus_per_node,
        dtype=planner.dtype,
    )


def _sharding(layout: Layout) -> Sharding:
    if layout.shared_by == 1:
        return "none"
    return "full" if layout.shared_by == layout.ranks else "node"


def _comparison(way: Way, measured: dict[str, Simulated]) -> Table:
    table = Table(title=f"Arithmetic and simulation, GiB of one GPU: {way.name}", title_justify="left")
    for column in ("stage", "arithmetic", "simulation", "difference", "simulated in"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, found in measured.items():
        counted = way.stages[name].memory.total
        table.add_row(
            STAGE_TITLES[name],
            f"{counted / GIB:.2f}",
            f"{found.peak / GIB:.2f}",
            f"{counted / found.peak - 1:+.1%}",
            f"{found.seconds:.0f} s",
        )
    return table

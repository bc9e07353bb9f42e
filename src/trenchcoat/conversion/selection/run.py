"""Selection in a run: measure, choose, score the frontier, and keep the result in the run's folder.

A finished ``selection.json`` made with the same settings is read instead, so a resumed run keeps the same groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trenchcoat.config import Recipe, UserError
from trenchcoat.config.keep import number_of_groups, read_keep, requested_groups
from trenchcoat.conversion.selection.frontier import Frontier
from trenchcoat.conversion.selection.probe import (
    Observe,
    Probe,
    copied,
    full_rows,
    method_named,
    observer_of,
    training_rows,
)
from trenchcoat.evaluation.report.selection import draw_selection
from trenchcoat.evaluation.rows import window_sinks_student
from trenchcoat.evaluation.selection import SELECTION_FILE, FrontierPoint, Selection, combined, ranking
from trenchcoat.models.families import attention_sites
from trenchcoat.runtime import distributed
from trenchcoat.runtime.runfolder import (
    LORA,
    LORA_ONLY,
    SELECT,
    TRANSFER,
    WINDOW_SINKS_LORA,
    RunFolder,
    is_changed,
    stage_settings,
)
from trenchcoat.runtime.runlog import RunLog

if TYPE_CHECKING:
    from trenchcoat.conversion.variants import ModelVariants

CONTROL = "uniform"
"""The method that the chosen one is compared with."""


def select_groups(variants: ModelVariants, reach: float | None = None) -> Selection:
    """The selection of a run, read or made; its ``kept`` are those that the recipe or ``reach`` asks for.

    ``reach``: the share (0 to 1) of both gaps to close with as few groups as possible. With neither, ``kept`` is empty.
    Raises ``UserError`` for rows too short for the window, and for a folder whose stages depend on another selection.
    """
    work, folder = _Selecting(variants), variants.folder
    found = read_selection(variants.recipe, folder, variants.log)
    if found is None:
        found = work.measure()
    if reach is not None:
        found, number = work.smallest(found, reach)
    else:
        number = requested_groups(variants.recipe.student, found.groups)
    found = dataclasses.replace(found, kept=found.keep(number))
    write_selection(found, folder)
    return found


def read_selection(recipe: Recipe, folder: RunFolder, log: RunLog) -> Selection | None:
    """The selection in a run's folder if it was made with these settings; a collective.

    Raises ``UserError`` when it was not, but a stage was started with its groups.
    """
    path, settings = folder.directory / SELECTION_FILE, stage_settings(recipe, SELECT)
    found = distributed.from_main(lambda: Selection.load(path) if path.is_file() else None)
    if found is None:
        return None
    names = [n for n in {**found.settings, **settings} if is_changed(n, found.settings.get(n), settings.get(n))]
    if not names:
        log.info(f"selection: read from {path}")
        return found
    changed = f"{names[0]} was {found.settings.get(names[0])!r}, now {settings.get(names[0])!r}"
    begun = [stage for stage in (TRANSFER, LORA, LORA_ONLY, WINDOW_SINKS_LORA) if folder.begun(stage)]
    if begun:
        raise UserError(
            f"{path} was made with other settings ({changed}), and stage {begun[0]!r} was started with its groups. "
            "Give this run another folder (run.dir=...), or use those settings"
        )
    log.info(f"selection: {path} was made with other settings ({changed}); selecting again")
    return None


def write_selection(selection: Selection, folder: RunFolder) -> None:
    """Write the file and its pictures; a collective."""

    def write() -> None:
        """On one process."""
        selection.save(folder.directory / SELECTION_FILE)
        draw_selection(selection, folder.directory)

    distributed.from_main(write)


def with_groups(recipe: Recipe, kept: Sequence[str]) -> Recipe:
    """The recipe with these groups named in ``student.keep``."""
    return dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, keep=read_keep(list(kept))))


def selection_length(recipe: Recipe) -> int:
    """Tokens of a row of selection; ``UserError`` where the first half of a copy would be seen from the second."""
    length, window = recipe.select.seq_len or recipe.data.seq_len, recipe.student.window
    if length < 4 * window:
        raise UserError(
            f"select.seq_len is {length} tokens (null: data.seq_len), but must be at least 4 windows = {4 * window}, "
            "so that the first half of a copied text is out of the second half's sight: set "
            f"select.seq_len={4 * window}, a smaller student.window (where it is used), or name the groups in "
            "student.keep"
        )
    return length


def probe_of(
    recipe: Recipe,
    model: Any,
    observe: Observe,
    rows: tuple[Tensor, Tensor],
    log: RunLog,
) -> Probe:
    """The probe of a recipe; ``rows``: text, and the text whose first halves are repeated."""
    return Probe(
        model=model,
        observe=observe,
        near=window_sinks_student(recipe),
        whole=frozenset(recipe.student.keep_softmax),
        text_NT=rows[0],
        copy_NT=copied(rows[1]),
        cfg=recipe.select,
        seed=recipe.run.seed,
        log=log,
    )


def groups_of(model: Any) -> int:
    """Number of key/value groups of a model."""
    return sum(site.num_kv_heads for site in attention_sites(model))


def scored(recipe: Recipe, probe: Probe, base: str) -> Selection:
    """The scores of all groups by the recipe's method, nothing chosen; ``base`` is the fingerprint of the weights."""
    cfg = recipe.select
    groups = groups_of(probe.model)
    probe.log.info(
        f"selection: scoring {groups} key/value groups by {cfg.method}, on {cfg.rows} rows of text and {cfg.rows} of "
        f"copies ({probe.text_NT.shape[1]} tokens)"
    )
    parts = method_named(cfg.method)(probe)
    settings = stage_settings(recipe, SELECT)
    return Selection(cfg.method, combined(parts), parts, groups, settings=settings, base=base)


class _Selecting:
    """The parts of :func:`select_groups` that need the model."""

    def __init__(self, variants: ModelVariants) -> None:
        self.variants, self.recipe, self.cfg = variants, variants.recipe, variants.recipe.select

    # Measuring

    def measure(self) -> Selection:
        """Scores and frontier with the settings of the recipe; ``UserError`` at once for more groups than there are."""
        requested_groups(self.recipe.student, groups_of(self.variants.model))
        found = scored(self.recipe, self.probe, self.variants.base_fingerprint)
        return self._with_frontier(found) if self.cfg.frontier else found

    def _with_frontier(self, selection: Selection) -> Selection:
        orders = {selection.method: selection.ranking()}
        if selection.method != CONTROL:
            orders[CONTROL] = ranking(combined(method_named(CONTROL)(self.probe)))
        most = len(selection.ranking())
        numbers = {min(most, number_of_groups(share, selection.groups)) for share in self.cfg.frontier}
        numbers |= {requested_groups(self.recipe.student, selection.groups), 0, most}
        points: list[FrontierPoint] = []
        with self.variants.log.progress("frontier", len(orders) * len(numbers)) as display:
            for method, order in orders.items():
                for number in sorted(numbers):
                    points.append(self.frontier.point(method, order[:number]))
                    display.update(len(points))
        gaps = {part: dataclasses.asdict(gap) for part, gap in self.frontier.gaps().items()}
        return dataclasses.replace(selection, frontier=tuple(points), gaps=gaps)

    def smallest(self, selection: Selection, reach: float) -> tuple[Selection, int]:
        """(selection with the points measured on the way, least number of groups that closes ``reach`` of both gaps).

        A gap within its noise is left out, as no share of it can be measured.
        """
        if not selection.frontier:
            raise UserError("--reach needs the frontier: leave select.frontier at its default, or use --keep")
        order = selection.ranking()
        points = {point.groups: point for point in selection.frontier if point.method == selection.method}

        def reached(number: int) -> bool:
            """Whether that many groups are enough."""
            if number not in points:
                points[number] = self.frontier.point(selection.method, order[:number])
            return all(share is None or share >= reach for share in (points[number].text, points[number].copy))

        high = min((number for number in sorted(points) if reached(number)), default=len(order))
        low = max((number for number in points if number < high), default=0)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        others = [point for point in selection.frontier if point.method != selection.method]
        return dataclasses.replace(selection, frontier=(*(points[n] for n in sorted(points)), *others)), max(1, high)

    # Text

    def _probe(self, text_NT: Tensor, more_NT: Tensor) -> Probe:
        model = self.variants.assemble_teacher()
        return probe_of(self.recipe, model, observer_of(model), (text_NT, more_NT), self.variants.log)

    @cached_property
    def probe(self) -> Probe:
        """For the scores: training text, other rows for the copies."""
        length = selection_length(self.recipe)
        return self._probe(*training_rows(self.variants.batches(1, length), self.cfg.rows, length))

    @cached_property
    def frontier(self) -> Frontier:
        """On held-out rows, evenly spread; copies of rows between half of them, if there are so many."""
        length = selection_length(self.recipe)
        batches = self.variants.batches(1, length)
        available = batches.rows("validation")
        rows = min(self.cfg.frontier_rows, available)
        starts = [i * available // rows for i in range(rows)]
        between = available // (2 * rows)

        def row_at(start: int) -> Tensor:
            """A full row that begins with a validation row."""
            places = ((start + i) % available for i in count())
            return full_rows((batches.validation_batch(place) for place in places), 1, length)

        text = torch.cat([row_at(start) for start in starts])
        more = torch.cat([row_at(start + between) for start in starts[::2]])
        return Frontier(self._probe(text, more), self.recipe.eval.batch_size)

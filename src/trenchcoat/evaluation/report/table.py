"""A table of strings, for the terminal and for Markdown (from which the HTML page is made)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import table as rich_table
from rich.box import SIMPLE_HEAD


@dataclass(frozen=True)
class Table:
    """Headings and rows of cells; the first cell of a row is its name."""

    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    bold: Collection[int] = ()
    """Rows set in bold."""

    def as_rich(self, title: str, *, compact: bool = False, wrap: bool = False) -> rich_table.Table:
        """To print with rich; ``compact`` puts one space between columns, ``wrap`` breaks lines of long cells."""
        table = rich_table.Table(
            title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=compact
        )
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=not wrap)
        for number, row in enumerate(self.cells):
            table.add_row(*row, style="bold" if number in self.bold else None)
        return table

    def as_markdown(self, *, numbers: bool = True) -> list[str]:
        """The lines, and an empty one after them; ``numbers``: all columns but the first are aligned to the right."""
        stars = ["**" if number in self.bold else "" for number in range(len(self.cells))]
        rows = [[f"{star}{_escaped(cell)}{star}" for cell in row] for star, row in zip(stars, self.cells, strict=True)]
        rule = "|---" + ("|---:" if numbers else "|---") * (len(self.headings) - 1) + "|"
        return [_line([*map(_escaped, self.headings)]), rule, *map(_line, rows), ""]


def _line(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _escaped(text: str) -> str:
    """Text safe inside a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")

"""Score conversions of one model on long text and copies, against the untrained window of 64 + 4 sinks and the model.

    python scripts/score_long_text.py MODEL books.jsonl runs/kept_12 runs/kept_6 --out scores.json

Rows come from the middle of the first books that are long enough, one row a book: 8 of 512 tokens (scored past 256), 4
of 2,048 (past 512), and copies: 4 texts of 256, 512 and 1,024 tokens, each followed by itself, scored on the second
half. `--long 8192` adds 4 rows of that many tokens, scored past a quarter of them. `--lengths 256 512 ...` takes other
rows in place of all these: 4 of the longest length, of which shorter ones are the beginnings, each length scored past a
quarter, and copies of half as many tokens. Every model reads the same rows; errors are jackknife errors over rows
(trenchcoat.evaluation.statistics). `--log-scale 600` scores every model with student.kept_log_scale=600 too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import trenchcoat
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.evaluation.scoring import score, score_copies, score_spans
from trenchcoat.evaluation.statistics import Estimate, RowSums, gap_closed, paired_difference
from trenchcoat.models.attach import set_kept_log_scale
from trenchcoat.runtime.files import write_json

BASELINE = StudentConfig(name="window_sinks", window=64, sinks=4, feature_map=FeatureMapConfig())
TEXTS = {"512 tokens, past 256": (8, 512, 256), "2,048 tokens, past 512": (4, 2048, 512)}
"""Rows, tokens of a row, first token that counts."""
COPIES = {"copy, 256 + 256": 256, "copy, 512 + 512": 512, "copy, 1,024 + 1,024": 1024}
COPY_ROWS = 4
SHIFT = "below 2W minus the model"


@dataclass(frozen=True)
class Losses:
    """Losses of one model by column of the table; those below 2W beside them."""

    columns: dict[str, RowSums]
    below: RowSums | None


def main() -> None:
    """Score, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the softmax model: a folder or hub id")
    parser.add_argument("books", type=Path, help="JSON lines with a field 'text'; none of them trained on")
    parser.add_argument("runs", nargs="*", help="run folders, merged folders or adapters")
    parser.add_argument("--untrained", nargs="*", default=[], metavar="SELECTION.JSON", help="kept groups, untrained")
    parser.add_argument("--window", type=int, default=128, help="W of the untrained rows with kept groups")
    parser.add_argument("--below", type=int, default=256, help="tokens of a row that the shift is measured on: 2W")
    parser.add_argument("--long", type=int, metavar="TOKENS", help="score rows of this length too")
    parser.add_argument("--lengths", type=int, nargs="*", metavar="TOKENS", help="score rows of these lengths instead")
    parser.add_argument("--rows", type=int, default=COPY_ROWS, help="how many of them")
    parser.add_argument("--baseline-window", type=int, default=BASELINE.window, help="W of the untrained window alone")
    parser.add_argument("--log-scale", type=float, nargs="*", default=[], metavar="A", help="score with these as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="score columns whose name contains this alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    texts, copies = TEXTS if args.long is None else {**TEXTS, **_long(args.long, COPY_ROWS)}, COPIES
    if args.lengths:
        texts = {name: of for tokens in args.lengths for name, of in _long(tokens, args.rows).items()}
        copies = {f"copy, {tokens // 2:,} + {tokens // 2:,}": tokens // 2 for tokens in args.lengths}
    texts, copies = ({name: of[name] for name in of if args.only in name} for of in (texts, copies))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = Rows(args.books, tokenizer, args.below, texts, copies, args.rows, together=bool(args.lengths))
    teacher = rows.losses(_base(args.model))
    baseline = dataclasses.replace(BASELINE, window=args.baseline_window)
    window = rows.losses(_untrained(args.model, baseline))
    columns, found = [*texts, *copies, *([SHIFT] if texts else [])], {}
    for name, model in _models(args):
        found[name] = _closed(rows.losses(model), window, teacher)
        del model
        sys.stderr.write(f"{name}: {_line(found[name], columns)}\n")
    if args.out:
        write_json(args.out, {name: {column: vars(e) for column, e in row.items()} for name, row in found.items()})
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    sys.stdout.write(
        "\n".join([*lines, *(f"| {name} | {_line(row, columns)} |" for name, row in found.items())]) + "\n"
    )


def _long(tokens: int, rows: int) -> dict[str, tuple[int, int, int]]:
    return {f"{tokens:,} tokens, past {tokens // 4:,}": (rows, tokens, tokens // 4)}


class Rows:
    """The rows of the protocol."""

    def __init__(
        self,
        books: Path,
        tokenizer: Any,
        below: int,
        columns: dict[str, tuple[int, int, int]],
        copies: dict[str, int],
        copy_rows: int = COPY_ROWS,
        *,
        together: bool = False,
    ) -> None:
        """`together`: shorter rows are the beginnings of the longest."""
        texts = [json.loads(line)["text"] for line in books.read_text(encoding="utf-8").splitlines() if line.strip()]
        self.books: list[Tensor] = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
        self.below, self.columns, self.copies = below, columns, copies
        self.copy_rows, self.together = copy_rows, together

    def middle(self, rows: int, tokens: int) -> Tensor:
        """[rows, tokens] from the middle of that many books."""
        long = [book for book in self.books if len(book) >= 2 * tokens]
        if len(long) < rows:
            raise SystemExit(f"{rows} books of {2 * tokens:,} tokens are needed; the file has {len(long)}")
        return torch.stack([book[len(book) // 2 :][:tokens] for book in long[:rows]])

    def losses(self, model: Any) -> Losses:
        """What one model loses on all rows."""
        columns, below = self._texts_together(model) if self.together else self._texts(model)
        for name, tokens in self.copies.items():
            ids = self.middle(self.copy_rows, tokens)
            columns[name] = score_copies(model, torch.cat([ids, ids], 1), batch_size=1)[0]
        return Losses(columns, below)

    def _texts(self, model: Any) -> tuple[dict[str, RowSums], RowSums | None]:
        columns, below = {}, None
        for name, (count, tokens, first) in self.columns.items():
            scored = score(model, self.middle(count, tokens), window=first // 2, exact=self.below, batch_size=1)
            columns[name] = scored.far
            below = below or scored.near
        return columns, below

    def _texts_together(self, model: Any) -> tuple[dict[str, RowSums], RowSums | None]:
        if not self.columns:
            return {}, None
        count, longest, _ = max(self.columns.values())
        spans = [(first, tokens) for _, tokens, first in self.columns.values()]
        below, *parts = score_spans(model, self.middle(count, longest), [(0, self.below + 1), *spans], batch_size=1)
        return dict(zip(self.columns, parts, strict=True)), below


def _models(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    for path in args.untrained:
        kept = tuple(json.loads(Path(path).read_text(encoding="utf-8"))["kept"])
        student = StudentConfig(name="window_sinks", window=args.window, sinks=4, keep=kept)
        name = f"{len(kept)} groups of {path}, window {args.window}, untrained"
        yield from _scaled(name, _untrained(args.model, student), args.log_scale)
    for run in args.runs:
        yield from _scaled(run, trenchcoat.load(run)[0], args.log_scale)


def _scaled(name: str, model: Any, bases: list[float]) -> Iterator[tuple[str, Any]]:
    """The model as it is, then with each `student.kept_log_scale`."""
    yield name, model
    for base in bases:
        set_kept_log_scale(model, base)
        yield f"{name}, log scale {base:g}", model


def _base(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


def _untrained(name: str, student: StudentConfig) -> Any:
    model = _base(name)
    trenchcoat.attach_students(model, student)
    trenchcoat.set_mode(model, "student")
    return model


def _closed(row: Losses, window: Losses, teacher: Losses) -> dict[str, Estimate]:
    """Share of the gap closed by column, and the shift below 2W in nats."""
    found = {name: gap_closed(row.columns[name], window.columns[name], teacher.columns[name]) for name in row.columns}
    shares = {name: share for name, share in found.items() if share is not None}
    if row.below is None or teacher.below is None:
        return shares
    return {**shares, SHIFT: paired_difference(row.below, teacher.below)}


def _line(row: dict[str, Estimate], columns: list[str]) -> str:
    found = {name: f"{100 * e.value:.1f} ± {100 * e.error:.1f} %" for name, e in row.items()}
    if SHIFT in row:
        found[SHIFT] = f"{row[SHIFT].value:+.4f} ± {row[SHIFT].error:.4f}"
    return " | ".join(found.get(name, "–") for name in columns)


if __name__ == "__main__":
    main()

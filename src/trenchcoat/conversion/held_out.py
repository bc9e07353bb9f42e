"""The held-out rows that every model of a report reads: text at several lengths, and rows that repeat themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trenchcoat.config import Recipe, UserError
from trenchcoat.data.batches import Batches
from trenchcoat.evaluation.cachesize import cache_size
from trenchcoat.evaluation.copies import random_copies, text_copies
from trenchcoat.evaluation.results import LengthScores, Scores
from trenchcoat.evaluation.rows import exact_tokens
from trenchcoat.evaluation.scoring import EvalRows, gather_rows, score, score_copies
from trenchcoat.evaluation.statistics import NOTHING, RowSums
from trenchcoat.models.shapes import positions_of

if TYPE_CHECKING:
    from trenchcoat.conversion.variants import ModelVariants

FEWEST_ROWS = 4
"""Rows at a larger factor, if the text has as many: fewer give no useful error."""
RANDOM_ERROR, RANDOM_ROUNDS = 0.05, 8
"""Random copies are added, ``eval.copy_rows`` at a time, until the accuracy's standard error is below this."""


def evaluation_rows(batches: Batches, rows: int) -> EvalRows:
    """``rows`` validation rows, evenly spread: neighbouring rows often come from the same document."""
    found = gather_rows(list(batches.validation()))
    available = len(found.ids)
    chosen = torch.arange(min(rows, available)) * available // min(rows, available)
    return EvalRows(found.ids[chosen], found.real[chosen], found.counted[chosen])


@dataclass(frozen=True)
class HeldOut:
    """Everything that a model of the report reads."""

    text: EvalRows
    longer: dict[int, EvalRows] = field(default_factory=dict)
    """Factor -> rows of so many times the length."""
    copies: dict[int, Tensor] = field(default_factory=dict)
    """Factor -> [n, T] ids of texts followed by themselves."""
    special: tuple[int, ...] = ()
    """Ids of the tokenizer's special tokens."""
    notes: tuple[str, ...] = ()
    """What could not be had, and why."""


def read_held_out(variants: ModelVariants) -> HeldOut:
    """The rows of ``eval`` at each of ``eval.length_factors``; those that the text or the model is too short for are
    left out, with a note."""
    cfg, seq_len = variants.recipe.eval, evaluation_length(variants.recipe)
    text = evaluation_rows(variants.batches(cfg.batch_size, seq_len), cfg.rows)
    longer: dict[int, EvalRows] = {}
    copies: dict[int, Tensor] = {}
    notes: list[str] = []
    positions = positions_of(variants.model.config)
    for factor in cfg.length_factors:
        tokens = factor * seq_len
        if factor > 1 and positions is not None and tokens > positions:
            notes.append(f"Rows of {tokens:,} tokens were not scored: the model has {positions:,} positions.")
            continue
        rows = text if factor == 1 else _longer_rows(variants, tokens, factor)
        if rows is None:
            notes.append(f"Rows of {tokens:,} tokens were not scored: the held-out text has fewer than two.")
            continue
        if factor > 1:
            longer[factor] = rows
        found = text_copies(rows, tokens // 2, _fewer(cfg.copy_rows, factor)) if cfg.copy_rows else None
        if tokens // 2 <= 2 * variants.recipe.student.window:
            notes.append(f"Copies of {tokens // 2:,} tokens were not scored: the window of a student holds them.")
        elif found is not None:
            copies[factor] = found
    special = tuple(variants.tokenizer.all_special_ids)
    return HeldOut(text, longer, copies, special, tuple(notes))


def evaluation_length(recipe: Recipe) -> int:
    """Tokens of an evaluation row."""
    return recipe.eval.seq_len or recipe.data.seq_len


def _fewer(rows: int, factor: int) -> int:
    """Rows at a factor for as many tokens as ``rows`` have at 1."""
    return min(rows, max(FEWEST_ROWS, rows // factor))


def _longer_rows(variants: ModelVariants, tokens: int, factor: int) -> EvalRows | None:
    cfg = variants.recipe.eval
    try:
        batches = variants.batches(cfg.batch_size, tokens)
    except UserError:  # not one row of this length; with shorter ones the same text was read
        return None
    rows = evaluation_rows(batches, _fewer(cfg.rows, factor))
    return rows if len(rows.ids) > 1 and rows.ids.shape[1] > tokens // 2 else None


def score_held_out(model: nn.Module, held: HeldOut, recipe: Recipe) -> Scores:
    """All scores of ``model``."""
    window, batch, exact = recipe.student.window, recipe.eval.batch_size, exact_tokens(recipe.student)
    scores = score(model, held.text, window=window, batch_size=batch, exact=exact)
    longer: dict[int, LengthScores] = {}
    for factor, rows in held.longer.items():
        found = score(model, rows, window=window, batch_size=max(1, batch // factor), exact=exact)
        longer[factor] = LengthScores(found.far, found.near)
    copied = {
        factor: score_copies(model, ids, batch_size=max(1, batch // factor)) for factor, ids in held.copies.items()
    }
    for factor, (losses, hits) in copied.items():
        if factor > 1:
            longer[factor] = dataclasses.replace(longer[factor], copy=losses, copy_hits=hits)
    own = copied.get(1, (NOTHING, NOTHING))
    random = _score_random(model, held, recipe) if 1 in copied else NOTHING
    return dataclasses.replace(
        scores, longer=longer, copy=own[0], copy_hits=own[1], random_hits=random, cache=cache_size(model)
    )


def _score_random(model: nn.Module, held: HeldOut, recipe: Recipe) -> RowSums:
    """Right first choices on random tokens followed by themselves."""
    half, rows = held.copies[1].shape[1] // 2, recipe.eval.copy_rows
    found = RowSums([], [])
    for number in range(RANDOM_ROUNDS):
        ids = random_copies(held.text, half, rows, special=held.special, seed=number)
        _, hits = score_copies(model, ids, batch_size=recipe.eval.batch_size)
        found = RowSums(found.sums + hits.sums, found.counts + hits.counts)
        if found.error < RANDOM_ERROR:
            break
    return found

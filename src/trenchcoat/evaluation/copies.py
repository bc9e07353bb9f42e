"""Rows whose second half repeats the first: held-out text, or random tokens.

A model that still reads what lies beyond its window predicts the second half nearly for certain; a window alone cannot.
Shapes: N rows, h tokens of a half.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from trenchcoat.evaluation.scoring import EvalRows


def text_copies(text: EvalRows, half: int, rows: int) -> Tensor | None:
    """[N, 2 h] ids: at most ``rows`` pieces of ``half`` tokens of the text, evenly spread, each followed by itself.

    None if the text has fewer than two such pieces.
    """
    pieces = text.ids[text.real].unfold(0, half, half) if int(text.real.sum()) >= half else text.ids[:0]
    if len(pieces) < 2:
        return None
    rows = min(rows, len(pieces))
    chosen = pieces[torch.arange(rows) * len(pieces) // rows]
    return torch.cat([chosen, chosen], dim=1)


def random_copies(text: EvalRows, half: int, rows: int, *, special: Collection[int] = (), seed: int = 0) -> Tensor:
    """[N, 2 h] ids: ``rows`` rows of ``half`` random tokens followed by themselves.

    Tokens are drawn evenly from those that occur in the text, ``special`` ones left out.
    """
    known = torch.tensor(sorted(set(text.ids[text.real].tolist()) - set(special)))
    generator = torch.Generator().manual_seed(seed)
    chosen = known[torch.randint(len(known), (rows, half), generator=generator)]
    return torch.cat([chosen, chosen], dim=1)

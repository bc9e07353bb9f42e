"""Rows of softmax attention maps in blocks of queries, for what is measured on them: no full map is ever in memory.

Shape legend: B rows, H query heads, G key/value heads, T tokens, n queries of a block, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WEIGHTS_AT_ONCE = 1 << 22
"""Attention weights held at once (16 MiB in float32)."""


def softmax_rows(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    seen: Callable[[int, int], Tensor],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
    first: int = 0,
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, weights [B, H, stop - start, stop] in float32) for the queries from ``first`` on, in blocks.

    ``seen(start, stop)`` tells which keys those queries see (bool, broadcastable to [B, H, n, T]). A sink logit [H]
    takes its share of each row's weight.
    """
    batch, heads, tokens, _ = q_BHTD.shape
    key = k_BGTD.float().repeat_interleave(heads // k_BGTD.shape[1], dim=1).transpose(2, 3)
    step = max(1, WEIGHTS_AT_ONCE // (batch * heads * tokens))
    for start in range(first, tokens, step):
        stop = min(start + step, tokens)
        score = torch.matmul(q_BHTD[:, :, start:stop].float() * scale, key[..., :stop])  # no query sees a later key
        if softcap is not None:
            score = score.div_(softcap).tanh_().mul_(softcap)
        score = score.masked_fill_(~seen(start, stop)[..., :stop], torch.finfo(torch.float32).min)
        if sink_logit is None:
            yield start, stop, score.softmax(-1)
        else:
            sink = sink_logit.float()[:, None, None].expand(batch, heads, stop - start, 1)
            yield start, stop, torch.cat([score, sink], dim=-1).softmax(-1)[..., :-1]

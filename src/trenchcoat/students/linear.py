"""Pure linear attention over the whole past, without a window.

Source: LoLCATs (https://arxiv.org/abs/2410.10254), section 3.1; Hedgehog (https://arxiv.org/abs/2402.04347).
"""

from __future__ import annotations

from trenchcoat.students.sums import SumAttention


class LinearAttention(SumAttention):
    """Linear attention over every token up to the query; the state has no buffer."""

    kind = "linear"

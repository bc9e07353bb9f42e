"""Students with a softmax window: terrace, sliding, and the untrained baseline window + sinks.

Sources: LoLCATs (https://arxiv.org/abs/2410.10254) for the first two; StreamingLLM (https://arxiv.org/abs/2309.17453)
for window + sinks.
"""

from __future__ import annotations

from trenchcoat.students.sums import SumAttention


class TerraceAttention(SumAttention):
    """Softmax over the query's own chunk of W tokens and the one before, linear attention over everything older."""

    kind = "terrace"


class SlidingAttention(SumAttention):
    """Softmax over the last W tokens, linear attention over everything older."""

    kind = "sliding"


class WindowSinksAttention(SumAttention):
    """Softmax over the terrace window and the first `sinks` tokens; no far part and no parameters."""

    kind = "terrace"
    has_far = False

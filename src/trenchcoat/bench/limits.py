"""The least time that a machine needs for a terrace layer: what has to be computed, and how fast the machine is.

Shape legend: T tokens, W window, D head dim, P columns of a feature map, F = 2 P features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from trenchcoat.bench.layer import LayerSizes
from trenchcoat.bench.timing import Timer


@dataclass(frozen=True)
class Work:
    """What one pass over one row has to do, all heads together."""

    multiply_adds: float
    exponentials: float
    bytes: float
    """Each tensor that goes in or out, once, in float32."""

    @classmethod
    def of(cls, sizes: LayerSizes, tokens: int) -> dict[str, Work]:
        """Of `forward`, `training` (forward and backward with every gradient) and `transfer`, with nothing computed
        that a mask removes. A backward pass computes weights and features again."""
        window, dim, columns = sizes.window, sizes.dim, sizes.columns
        pairs = float(_pairs(tokens, window))
        far = float(max(0, -(-tokens // window) - 2) * window)
        product, matrix = far * 2 * columns * dim, far * dim * columns
        features = 4.0 * columns * far
        forward = cls(2 * pairs * dim + 2 * product + 2 * matrix, pairs + features, 16.0 * tokens * dim)
        learning = 3 * product + 2 * matrix
        backward = 5 * pairs * dim + 5 * product + 6 * matrix
        passes = {
            "forward": forward,
            "training": cls(forward.multiply_adds + backward, 2 * forward.exponentials, 3 * forward.bytes),
            "transfer": cls(forward.multiply_adds + learning, forward.exponentials, forward.bytes),
        }
        return {name: work * sizes.heads for name, work in passes.items()}

    def __mul__(self, times: float) -> Work:
        return Work(self.multiply_adds * times, self.exponentials * times, self.bytes * times)


def _pairs(tokens: int, window: int) -> int:
    """Pairs of a query and a near key of terrace attention."""
    chunks = [min(window, tokens - start) for start in range(0, tokens, window)]
    return sum(n * (n + 1) // 2 + (n * window if i else 0) for i, n in enumerate(chunks))


@dataclass(frozen=True)
class Limits:
    """What the machine reaches on the threads in use, measured with PyTorch in float32."""

    multiply_adds_per_second: float
    exponentials_per_second: float
    bytes_per_second: float

    @classmethod
    def measured(cls, repeats: int, device: str, side: int = 2048) -> Limits:
        """By a product of `side` x `side` matrices, exponentials of numbers in cache, and a copy out of cache (read and
        write are counted)."""
        timer = Timer(repeats, device)
        a, b, c = (torch.ones(side, side, device=device) for _ in range(3))
        x = torch.linspace(-9.0, 0.0, 1 << 17, device=device)
        source = torch.ones(1 << 25, device=device)
        target = torch.empty_like(source)
        return cls(
            side**3 / timer(partial(torch.matmul, a, b, out=c)),
            x.numel() / timer(partial(torch.exp, x, out=torch.empty_like(x))),
            2.0 * source.nbytes / timer(partial(target.copy_, source)),
        )

    def seconds(self, work: Work) -> float:
        """At least: products and exponentials use the same units of the processor, memory works at the same time."""
        computing = (
            work.multiply_adds / self.multiply_adds_per_second + work.exponentials / self.exponentials_per_second
        )
        return max(computing, work.bytes / self.bytes_per_second)

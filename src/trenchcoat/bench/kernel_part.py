"""A part of ``bench kernels``: named measurements on a GPU, each of which may run out of memory without the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic

from trenchcoat.bench.benchmark import SizesT, Target
from trenchcoat.bench.timing import Ceilings, Timer

Measurement = tuple[str, Callable[[], dict[str, Any]]]
"""Name of a measurement, and what makes it."""


class KernelPart(ABC, Generic[SizesT]):
    """One class a part, and one line in :data:`trenchcoat.bench.kernels.KERNEL_PARTS`."""

    full: SizesT
    quick: SizesT
    depths: ClassVar[tuple[str, ...]] = ()
    """Fields of the sizes that ``--layers`` sets."""
    targets: ClassVar[tuple[Target, ...]]

    @abstractmethod
    def memory(self, sizes: SizesT) -> float:
        """Bytes of device memory that the largest measurement takes, roughly."""

    @abstractmethod
    def measurements(self, sizes: SizesT, timer: Timer, limits: Ceilings) -> Iterator[Measurement]:
        """Every measurement, in order."""

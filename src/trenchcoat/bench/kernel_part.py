"""A part of ``bench kernels``: named measurements on a GPU; one that runs out of memory does not affect the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic

from trenchcoat.bench.benchmark import SizesT, Target
from trenchcoat.bench.timing import Ceilings, Timer

Measurement = tuple[str, Callable[[], dict[str, Any]]]
"""Name of a measurement, and the function that makes it."""


class KernelPart(ABC, Generic[SizesT]):
    """Each part is one class, and one line in :data:`trenchcoat.bench.kernels.KERNEL_PARTS`."""

    full: SizesT
    quick: SizesT
    toy: SizesT
    """For Triton's interpreter on a CPU."""
    depths: ClassVar[tuple[str, ...]] = ()
    """Fields of the sizes that ``--layers`` sets."""
    targets: ClassVar[tuple[Target, ...]]

    @abstractmethod
    def memory(self, sizes: SizesT) -> float:
        """Approximate bytes of device memory for the largest measurement."""

    @abstractmethod
    def measurements(self, sizes: SizesT, timer: Timer, limits: Ceilings) -> Iterator[Measurement]:
        """Every measurement, in order."""

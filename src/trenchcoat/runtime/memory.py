"""Peak tensor memory of a piece of code, counted from its allocations."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages created inside the block that are alive: ``live`` now, ``peak`` at most.

    Storages that existed before (parameters, inputs, gradients) do not count, nor does what a kernel allocates and
    frees within one call. Works on any device; forward and backward; costs a few microseconds per operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()
        self._lock = threading.RLock()

    def _forget(self, key: int, size: int) -> None:
        with self._lock:
            self._known.discard(key)
            self.live -= size

    def _see(self, tensor: Tensor, *, created: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            if key in self._known:
                return
            size = storage.nbytes() if created else 0
            self._known.add(key)
            weakref.finalize(storage, self._forget, key, size).atexit = False
            self.live += size
            self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the storages of its inputs and outputs."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see(leaf, created=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, created=True)
        return result


@contextmanager
def live_tensor_memory() -> Iterator[LiveMemory]:
    """Measure the block; read ``peak`` (bytes) afterwards."""
    memory = LiveMemory()
    with memory:
        yield memory

"""Ctrl-C as a stop request, which takes effect at the next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """Raised by ``StopSignal.check`` after a stop request."""


class StopSignal:
    """Set by the first Ctrl-C or SIGTERM; a second Ctrl-C raises ``KeyboardInterrupt`` as usual."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise ``Interrupted`` after a stop request."""
        if self.requested:
            raise Interrupted


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Yield a ``StopSignal`` that listens while the block runs (in the main thread only, as Python requires)."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def handler(number: int, frame: FrameType | None) -> None:
        """Record the request; the next Ctrl-C raises ``KeyboardInterrupt``."""
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for kind in kinds:
        signal.signal(kind, handler)
    try:
        yield stop
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)

"""uvicorn with a time limit for request heads and a shutdown in two steps.

Imported only when serving: it needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from trenchcoat.config import UserError
from trenchcoat.serving.engine import Engine

HEAD_SECONDS = 5.0
"""Time for the head of a request to arrive, once a connection is open or has begun to send."""
MAX_CONNECTIONS = 512


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which waits for the head of a request for ever, with an end to the wait."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Start the time limit if no request is being answered, end it otherwise."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._waiting is None and not self.transport.is_closing():
            self._waiting = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _too_slow(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn with a two-step shutdown: refuse new requests at once, cancel running ones after a grace period."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self.engine, self.grace = engine, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: as above. Second: cancel the running requests now. Third: exit without waiting."""
        if self.engine.stopping.is_set():
            self.force_exit = True
        elif self.should_exit:
            self.engine.stopping.set()
        else:
            self.should_exit = True
            timer = threading.Timer(self.grace, self.engine.stopping.set)
            timer.daemon = True
            timer.start()

    def run_until_signal(self) -> None:
        """Serve until a signal stops it. Raises UserError if the address is not available."""
        try:
            self.run()
        except SystemExit as error:  # uvicorn exits if it cannot start
            place = f"{self.config.host}:{self.config.port}"
            raise UserError(
                f"cannot listen on {place}: the port is in use, or the address is not this machine's; choose another"
            ) from error
        finally:
            self.engine.stopping.set()
            if not self.engine.wait(10.0):
                logging.getLogger("trenchcoat.serving").warning("a generation was still running after 10 s")


def server_config(app: Any, host: str, port: int, *, log_level: str, grace: float) -> uvicorn.Config:
    """uvicorn's settings; `log_level` is for our own log, uvicorn's own shows warnings."""
    log = copy.deepcopy(LOGGING_CONFIG)
    log["formatters"]["default"] |= {"fmt": "%(asctime)s %(levelname)s %(message)s", "use_colors": False}
    log["loggers"]["trenchcoat.serving"] = {"handlers": ["default"], "level": log_level.upper(), "propagate": False}
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=log,
        log_level=log_level if log_level in ("debug", "error") else "warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(grace) + 30,
    )

"""The HTTP layer: client disconnects, errors in OpenAI's format, two-step shutdown.

Imported only when serving: it needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import threading
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from trenchcoat.config import UserError
from trenchcoat.serving.requests import CLIENT_GONE
from trenchcoat.serving.transformers_server import Generator


class DisconnectWatcher:
    """ASGI middleware: sets ``CLIENT_GONE`` as soon as a client disconnects, on every route.

    A request's body is read completely; after that the only message that can arrive is the disconnect.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        gone, disconnected = threading.Event(), asyncio.Event()
        CLIENT_GONE.set(gone)

        async def watch() -> None:
            """Wait for the disconnect."""
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            disconnected.set()

        async def replay() -> Any:
            """Replay the body, then wait for the disconnect."""
            if messages:
                return messages.pop(0)
            await disconnected.wait()
            return {"type": "http.disconnect"}

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, replay, send)
        finally:
            watcher.cancel()


class Server(uvicorn.Server):
    """uvicorn with a two-step shutdown: refuse new requests at once, cancel running ones after a grace period."""

    def __init__(self, config: uvicorn.Config, generator: Generator, grace: float) -> None:
        super().__init__(config)
        self.generator, self.grace = generator, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: as above. Second: cancel the running requests now. Third: exit without waiting."""
        if self.generator.stopping.is_set():
            self.force_exit = True
        elif self.should_exit:
            self.generator.stopping.set()
        else:
            self.should_exit = True
            timer = threading.Timer(self.grace, self.generator.stopping.set)
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
            self.generator.stopping.set()
            self.generator.wait(10.0)


def answer_errors_in_openai_form(app: FastAPI) -> None:
    """Send errors in OpenAI's format, so that client packages show the message."""

    def answer(status: int, message: str) -> JSONResponse:
        """An error response."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        """Errors raised by our own checks."""
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        """A body that is not a JSON object."""
        details = "; ".join(str(item.get("msg")) for item in error.errors())
        return answer(400, f"the body is not a readable JSON object: {details}")

"""HTTP around the application: clients that disconnect, errors in the OpenAI form, stopping in two steps.

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
    """ASGI middleware: notices a client that disconnects, at once and on every route, and sets ``CLIENT_GONE``.

    A request's body is read completely; after that the only message that can arrive is the disconnect.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
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
            """The body, as it was received, then the disconnect."""
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
    """uvicorn, stopping in two steps: no new requests at once, running ones are ended after a grace period."""

    def __init__(self, config: uvicorn.Config, generator: Generator, grace: float) -> None:
        super().__init__(config)
        self.generator, self.grace = generator, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: as above. Second: end the running requests now. Third: exit without waiting."""
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
        """Serve; returns after a signal has ended it. Raises UserError when the address is not available."""
        try:
            self.run()
        except SystemExit as error:  # uvicorn exits when it cannot start
            place = f"{self.config.host}:{self.config.port}"
            raise UserError(
                f"cannot listen on {place}: the port is in use, or the address is not this machine's; choose others"
            ) from error
        finally:
            self.generator.stopping.set()
            self.generator.wait(10.0)


def answer_errors_in_openai_form(app: FastAPI) -> None:
    """Errors as the OpenAI API sends them, whose message is what client packages show."""

    def answer(status: int, message: str) -> JSONResponse:
        """An error of this status."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        """An error that was raised on purpose."""
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        """A body that is not a JSON object."""
        words = "; ".join(str(item.get("msg")) for item in error.errors())
        return answer(400, f"the body is not a readable JSON object: {words}")

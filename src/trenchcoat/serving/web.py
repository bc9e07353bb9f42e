"""The HTTP layer: what is refused before it costs anything, requests to answers, disconnects, log, shutdown.

An ASGI application without a framework: a handful of routes, and full control of when a body is read and when a
connection ends. Imported only when serving: it needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from trenchcoat.serving.answers import Answer, event
from trenchcoat.serving.engine import Engine, Job, Piece, Stopped
from trenchcoat.serving.metrics import Metrics
from trenchcoat.serving.refusals import Refused

T = TypeVar("T")
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTES = {
    "/": "GET",
    "/health": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    COMPLETIONS: "POST",
    CHAT: "POST",
}
"""Besides ``/v1/models/NAME``."""
OPEN_ROUTES = ("/", "/health")
"""Routes that need no key: they say nothing about the model."""

HELD_BODIES = 16
"""Bodies of the largest size that may be held in memory at a time."""
SEND_SECONDS = 60.0
"""Time for a client to take a piece of its answer."""
LINGER_SECONDS = 2.0
"""How long a refused body is still received (and dropped), so that the client gets to read the answer."""
COMMENT_SECONDS = 15.0
"""After this long without text, a stream gets a comment, so that nothing between here and the client times out."""

_log = logging.getLogger("trenchcoat.serving")


class Disconnected(Exception):
    """The client is gone."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server accepts."""

    body: int
    """Bytes of a request."""
    body_seconds: float
    """Time for a request to arrive."""
    queue: int
    """Requests that may wait for the one that runs."""
    api_key: str | None
    hosts: tuple[str, ...] | None
    """Names accepted in ``Host``, besides addresses and names without a dot; None: any."""


class Exchange:
    """One request and its response."""

    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.scope, self.receive, self._send = scope, receive, send
        self.method, self.path = scope["method"], scope["path"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.ident = given if re.fullmatch(r"[\w.\-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        self.began = time.monotonic()
        self.status: int | None = None
        self.received = False
        """Whether the whole body has arrived."""
        self.job: Job | None = None

    @property
    def route(self) -> str:
        """The path if it is one of ours: a bounded number of names."""
        known = self.path if self.path in ROUTES else "other"
        return "/v1/models" if self.path.startswith("/v1/models/") else known

    async def send(self, message: dict[str, Any]) -> None:
        """Send a message; Disconnected if the client does not take it in time."""
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send(message)
        except TimeoutError as error:
            abort = self.scope.get("state", {}).get("abort")
            if abort is not None:
                abort()
            raise Disconnected from error

    async def start(self, status: int, kind: str, headers: dict[str, str]) -> None:
        """Send the status and the headers."""
        self.status = status
        fields = {"content-type": kind, "x-request-id": self.ident, "x-content-type-options": "nosniff"} | headers
        encoded = [(name.encode("ascii"), value.encode("latin-1")) for name, value in fields.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """Send a piece of the body."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        """Send a whole response."""
        await self.start(status, kind, {"content-length": str(len(body))} | (headers or {}))
        await self.write(body, more=False)

    async def json(self, body: dict[str, Any], status: int = 200) -> None:
        """Send a JSON object."""
        await self.answer(status, json.dumps(body).encode(), "application/json")

    async def refuse(self, error: Refused) -> None:
        """Send an error, then drop what still arrives of the body for a while."""
        body = json.dumps(error.json()).encode()
        if self.received:
            await self.answer(error.status, body, "application/json", error.headers)
            return
        headers = {"content-length": str(len(body)), "connection": "close", **error.headers}
        await self.start(error.status, "application/json", headers)
        await self.write(body)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._drop_body()
        await self.write(b"", more=False)

    async def _drop_body(self) -> None:
        while (await self.receive()).get("more_body"):
            pass


class App:
    """The ASGI application for one model."""

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics, self.created = Metrics(), int(time.time())
        self._admitted = self._held = 0
        self._page = resources.files("trenchcoat.serving").joinpath("chat.html").read_bytes()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        try:
            await self._handle(exchange)
        except Refused as error:
            await self._refuse(exchange, error)
        except Disconnected:
            exchange.status = 499
        finally:
            self._record(exchange)

    async def _refuse(self, exchange: Exchange, error: Refused) -> None:
        try:
            await exchange.refuse(error)
        except Disconnected:
            exchange.status = 499

    async def _handle(self, exchange: Exchange) -> None:
        self._check_sender(exchange)
        path = exchange.path
        method = "GET" if path.startswith("/v1/models/") else ROUTES.get(path)
        if method is None:
            raise Refused(f"there is no such route; known: {', '.join(ROUTES)}", status=404)
        if exchange.method != method and (exchange.method, method) != ("HEAD", "GET"):
            raise Refused(f"this route takes {method}", status=405, headers={"allow": method})
        if path == "/":
            await exchange.answer(200, self._page, "text/html; charset=utf-8", _page_headers(self._page))
        elif path == "/health":
            stopping = self.engine.stopping.is_set()
            await exchange.json({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)
        elif path == "/metrics":
            await exchange.answer(200, self.metrics.text().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/v1/models":
            await exchange.json({"object": "list", "data": [self._model()]})
        elif method == "GET":
            self._check_model(path.removeprefix("/v1/models/"))
            await exchange.json(self._model())
        else:
            await self._generate(exchange)

    def _model(self) -> dict[str, Any]:
        entry = {"id": self.name, "object": "model", "owned_by": "trenchcoat", "created": self.created}
        return entry | {"max_model_len": self.engine.context, "chat": self.engine.chat_template is not None}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise Refused(
                f"there is no model {name[:100]!r}; this server is pinned to {self.name!r}", "model", status=404
            )

    def _check_sender(self, exchange: Exchange) -> None:
        """Refuse other hosts' names and requests without the key."""
        host = exchange.headers.get("host", "")
        if self.limits.hosts is not None and not _is_own(host, self.limits.hosts):
            raise Refused(f"Host is {host[:100]!r}; start the server with --allow-host to accept it", status=421)
        key = self.limits.api_key
        if key is not None and exchange.path not in OPEN_ROUTES:
            given = exchange.headers.get("authorization", "").partition(" ")
            if given[0].lower() != "bearer" or not hmac.compare_digest(given[2].strip().encode(), key.encode()):
                message = "this server needs its API key: Authorization: Bearer KEY"
                raise Refused(message, status=401, headers={"www-authenticate": "Bearer"})

    def _record(self, exchange: Exchange) -> None:
        """Count the request and log it, without anything that the client wrote in it."""
        status = exchange.status or 500
        self.metrics.requests[exchange.route, status] += 1
        seconds, job = time.monotonic() - exchange.began, exchange.job
        tokens = "" if job is None else f" prompt={job.prompt_tokens} written={job.written}"
        queued = "" if job is None or job.started is None else f" queued={job.started - job.queued:.2f}s"
        quiet = exchange.route in ("/health", "/metrics") and status == 200
        level = logging.DEBUG if quiet else logging.INFO
        method = exchange.method if exchange.method in ("GET", "POST", "HEAD") else "other"
        _log.log(
            level, "%s %s %s %d %.2fs%s%s", exchange.ident, method, exchange.route, status, seconds, queued, tokens
        )

    # Requests for text

    async def _generate(self, exchange: Exchange) -> None:
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(f"Content-Type is {kind[:100]!r}; expected application/json", status=415)
        self._check_queue()
        body = await self._body(exchange)
        self._check_queue()
        self._admitted += 1
        try:
            await self._run(exchange, body)
        finally:
            self._admitted -= 1
            self._count_queue()

    def _check_queue(self) -> None:
        if self.engine.stopping.is_set():
            raise Refused("the server is stopping", status=503)
        if self._admitted > self.limits.queue:
            wait = math.ceil(self.metrics.run_seconds.mean * self._admitted)
            message = f"{self._admitted} requests are waiting already; try again later"
            raise Refused(message, status=429, headers={"retry-after": str(min(max(wait, 1), 600))})

    def _count_queue(self) -> None:
        self.metrics.running = min(self._admitted, 1)
        self.metrics.waiting = max(self._admitted - 1, 0)

    async def _body(self, exchange: Exchange) -> bytes:
        """The whole body. Refused if it is too large (before it is read, if it says so) or too slow."""
        too_large = Refused(f"the body is larger than {self.limits.body} bytes, the limit of this server", status=413)
        announced = exchange.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.limits.body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await exchange.receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    body += message["body"]
                    self._held += len(message["body"])
                    if len(body) > self.limits.body:
                        raise too_large
                    if self._held > HELD_BODIES * self.limits.body:
                        busy = "too many large requests arrive at once"
                        raise Refused(busy, status=429, headers={"retry-after": "1"})
                    exchange.received = not message["more_body"]
                    if exchange.received:
                        return bytes(body)
        except TimeoutError as error:
            raise Refused(f"the body took longer than {self.limits.body_seconds:g} s to arrive", status=408) from error
        finally:
            self._held -= len(body)

    async def _run(self, exchange: Exchange, body: bytes) -> None:
        """Read the request, wait for the model, answer."""
        self._count_queue()
        gone = asyncio.Event()
        with _task(_watch(exchange.receive, gone)):
            read = self.engine.read(body, chat=exchange.path == CHAT)
            with _task(_when(gone, read.cancel)):
                request, prompts = await _result(read, exchange.ident)
            self._check_model(request.model)
            pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            job = Job(request, prompts, lambda piece: _post(loop, pieces, piece))
            exchange.job = job
            running = self.engine.run(job)
            running.add_done_callback(lambda done: _post(loop, pieces, None))
            with _task(_when(gone, job.gone.set, running.cancel)):
                try:
                    await self._respond(exchange, job, pieces, running)
                finally:
                    job.gone.set()
                    running.cancel()
                    await _end(running)
                    self.metrics.finished(job, time.monotonic())

    async def _respond(
        self, exchange: Exchange, job: Job, pieces: asyncio.Queue[Piece | None], running: Future[None]
    ) -> None:
        answer = Answer(job.request, exchange.ident, self.name)
        if job.request.stream:
            await self._stream(exchange, answer, job, pieces, running)
            return
        collected: list[Piece] = []
        while (piece := await pieces.get()) is not None:
            collected.append(piece)
        error = _failure(job, running, exchange.ident)
        if error is not None:
            raise error
        await exchange.answer(200, await asyncio.to_thread(answer.whole, collected, job), "application/json")

    async def _stream(
        self, exchange: Exchange, answer: Answer, job: Job, pieces: asyncio.Queue[Piece | None], running: Future[None]
    ) -> None:
        """Send every piece when it is there; an error ends the stream as an event of its own."""
        await exchange.start(200, "text/event-stream; charset=utf-8", {"cache-control": "no-cache"})
        for chunk in answer.first_chunks(len(job.prompts) * job.request.n):
            await exchange.write(chunk)
        ready: list[Piece | None] = []
        while None not in ready:
            try:
                async with asyncio.timeout(COMMENT_SECONDS):
                    ready = [await pieces.get()]
            except TimeoutError:
                await exchange.write(b": waiting\n\n")
                continue
            while not pieces.empty():
                ready.append(pieces.get_nowait())
            await exchange.write(b"".join(chunk for piece in ready if piece for chunk in answer.chunks(piece)))
        error = _failure(job, running, exchange.ident)
        if isinstance(error, Disconnected):
            raise error
        end = answer.last_chunks(job) if error is None else [event(error.json())]
        await exchange.write(b"".join(end), more=False)


def _post(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Piece | None], piece: Piece | None) -> None:
    """Hand a piece to the event loop from another thread."""
    loop.call_soon_threadsafe(pieces.put_nowait, piece)


async def _end(future: Future[Any]) -> None:
    """Wait for work in another thread, whatever its outcome."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    future.add_done_callback(lambda done: loop.call_soon_threadsafe(ended.set))
    await ended.wait()


@contextlib.contextmanager
def _task(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Do this work beside what is inside, and end it after that."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()


async def _watch(receive: Receive, gone: asyncio.Event) -> None:
    """Set `gone` at the disconnect: the only message after a body."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _when(gone: asyncio.Event, *steps: Callable[[], Any]) -> None:
    """Take these steps once the client is gone."""
    await gone.wait()
    for step in steps:
        step()


async def _result(future: Future[T], ident: str) -> T:
    """The result of work in another thread; an unforeseen error becomes a 500 that does not show it."""
    await _end(future)
    if future.cancelled():
        raise Disconnected
    error = future.exception()
    if error is None or isinstance(error, Refused):
        return future.result()
    raise _internal(error, ident)


def _failure(job: Job, running: Future[None], ident: str) -> Refused | Disconnected | None:
    """Why a job has no whole answer."""
    error = None if running.cancelled() else running.exception()
    if job.gone.is_set() or running.cancelled():
        return Disconnected()
    if isinstance(error, Stopped):
        return Refused("the server is stopping", status=503)
    return None if error is None else _internal(error, ident)


def _internal(error: BaseException, ident: str) -> Refused:
    _log.error("%s failed: %s", ident, type(error).__name__, exc_info=error)
    return Refused("the request failed; the server's log says why", status=500)


def _is_own(host: str, names: Iterable[str]) -> bool:
    """Whether ``Host`` is an address, a name without a dot, or one of `names`: no page of another site can send it."""
    name = re.sub(r":\d*$", "", host).strip("[]").lower().rstrip(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name in names
    return True


def _page_headers(page: bytes) -> dict[str, str]:
    """Headers that let the chat page run its own script and speak with this server, and nothing else."""
    script = page.partition(b"<script>")[2].partition(b"</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'"
    return {"content-security-policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}

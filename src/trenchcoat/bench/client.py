"""A server process, and timed requests to an OpenAI server, with the standard library alone."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trenchcoat.config import UserError
from trenchcoat.serving.server import KEY_VARIABLE

START_SECONDS = 600.0
"""Time for a server to load its model and listen."""
ANSWER_SECONDS = 3600.0
"""Time for one piece of an answer to arrive: on a CPU the prompts of all clients are read first."""
_CAPACITY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
"""What vLLM's log says of its cache."""


@dataclass(frozen=True)
class Endpoint:
    """A server that answers."""

    address: str
    """Up to and with `/v1`."""
    model: str
    log: Path | None = None
    banned: tuple[int, ...] = ()
    """Tokens that answers must not have."""

    def capacity(self) -> dict[str, float] | None:
        """The number of `requests` of so many `tokens` in vLLM's cache; None where the log does not say."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log is not None else ""
        found = _CAPACITY.search(text)
        return None if found is None else {"tokens": int(found[1].replace(",", "")), "requests": float(found[2])}


@dataclass(frozen=True)
class Timed:
    """An answer."""

    first: float
    """Seconds to the first text."""
    seconds: float
    """Seconds to the end."""
    tokens: int
    began: float
    """By the clock of `time.perf_counter`."""
    arrivals: tuple[float, ...]
    """Seconds after `began` at which pieces of text arrived; usually one for each token."""
    state_bytes: int | None
    """Size of the state after it, if the server says (the embedded one does)."""

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first; None for a single one."""
        after = self.seconds - self.first
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else None

    def tokens_between(self, start: float, stop: float) -> float:
        """Tokens that arrived between two times of the clock, where each piece has as many as the others."""
        pieces = sum(start < self.began + arrival <= stop for arrival in self.arrivals)
        return pieces * self.tokens / len(self.arrivals) if self.arrivals else 0.0


def endpoint(address: str, log: Path | None = None) -> Endpoint:
    """The server at ``address`` (``http://host:port`` or with ``/v1``); ``UserError`` if none answers there."""
    base = address.strip().rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UserError(f"--url {address!r} is no address; expected one such as http://127.0.0.1:8000")
    with _request(f"{base}/v1/models") as answer:
        served = json.load(answer).get("data") or [{}]
    if "id" not in served[0]:
        raise UserError(f"{base}/v1/models names no model: it is not an OpenAI server")
    return Endpoint(f"{base}/v1", str(served[0]["id"]), log)


def ask(server: Endpoint, prompt: Sequence[int], tokens: int) -> Timed:
    """A streamed completion of ``tokens`` tokens after ``prompt``; ``UserError`` for an answer without any."""
    body: dict[str, Any] = {
        "model": server.model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if server.banned:
        body["logit_bias"] = {str(token): -100 for token in server.banned}
    began = time.perf_counter()
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    with _request(f"{server.address}/completions", body) as answer:
        for line in answer:
            text = line.decode("utf-8").strip().removeprefix("data:").strip()
            if not text or text == "[DONE]":
                continue
            event = json.loads(text)
            if "error" in event:
                raise UserError(f"{server.address}: {event['error'].get('message', event['error'])}")
            if event.get("choices"):
                arrivals.append(time.perf_counter() - began)
            usage = event.get("usage") or usage
    seconds, written = time.perf_counter() - began, int(usage.get("completion_tokens") or 0)
    if not written:
        raise UserError(f"{server.address} answered {len(prompt)} tokens with none, or does not say how many")
    first = arrivals[0] if arrivals else seconds
    return Timed(first, seconds, written, began, tuple(arrivals), usage.get("state_bytes"))


@contextmanager
def _request(address: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    asked = urllib.request.Request(address, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=ANSWER_SECONDS) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
        raise UserError(f"{address} refuses with {error.code}: {said}") from error
    except OSError as error:
        raise UserError(f"{address} does not answer: {error}") from error


class ServerProcess:
    """A server that was started here."""

    def __init__(self, command: Callable[[int], Sequence[str]], log: Path, threads: int | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        threaded = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command(self.port), stdout=output, stderr=output, env={**os.environ, **threaded}
            )

    def ready(self) -> Endpoint:
        """Wait until it answers; ``UserError`` with the end of its log if it does not."""
        deadline = time.monotonic() + START_SECONDS
        address = f"http://127.0.0.1:{self.port}"
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
            except OSError:
                time.sleep(0.1)
            else:
                return endpoint(address, self.log)
        end = self.log.read_text(encoding="utf-8", errors="replace")[-1000:]
        raise UserError(f"the server did not start; the end of what it wrote:\n{end}")


@contextmanager
def started(command: Callable[[int], Sequence[str]], log: Path, *, threads: int | None) -> Iterator[ServerProcess]:
    """A server for the length of the block: the process of ``command`` (of a free port), whose output goes to ``log``;
    ``threads``: of the CPU."""
    server = ServerProcess(command, log, threads)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()

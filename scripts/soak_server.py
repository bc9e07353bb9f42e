"""Keeps a server under requests of mixed kinds and says whether it lost one, or grew.

    python scripts/soak_server.py DIR                                   # 30 minutes, 2,000 requests
    python scripts/soak_server.py DIR --minutes 1 --requests 150
    python scripts/soak_server.py --url http://127.0.0.1:8000           # a server that is running already

DIR is a run's, an adapter's or a merged folder. Four clients send completions and chats, whole and streamed, valid and
invalid, short and as long as the server takes, and some that the client breaks off at once, while it waits, or in the
middle of a stream. Memory is the server's resident memory (`/metrics`), read every second: the median of the last fifth
of the time may be 5 % over that of the second fifth (the first is warming up). The exit code is 0 if every request had
the answer that its kind expects, the server counted them all, none is left running, and memory is flat.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from statistics import median
from typing import Any

GROWTH = 0.05
CLIENTS = 4
TEXT = "The coat is long and its pockets hold more than a window shows. "


@dataclass
class Client:
    """Sends requests of one server; `lost` lists those whose answer was not what their kind expects."""

    host: str
    port: int
    name: str
    context: int
    chat: bool
    random: random.Random
    sent: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def post(self, body: dict[str, Any], path: str = "/v1/completions") -> tuple[int, bytes]:
        """One request with its whole answer."""
        connection = HTTPConnection(self.host, self.port, timeout=600)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def leave(self, body: dict[str, Any], received: int) -> None:
        """One request whose client leaves after so many bytes of the answer, or without waiting for any."""
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(data)}\r\n"
        with socket.create_connection((self.host, self.port), timeout=600) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
            time.sleep(self.random.random() * 0.2)
            while received > 0 and (piece := connection.recv(4096)):
                received -= len(piece)

    # The kinds of requests: each returns a complaint, or None

    def whole(self) -> str | None:
        """A completion, possibly of several texts."""
        n = self.random.choice((1, 1, 2))
        status, body = self.post({"prompt": TEXT, "max_tokens": 16, "n": n, "temperature": 1, "logprobs": 2})
        texts = json.loads(body).get("choices", [])
        return None if status == 200 and len(texts) == n else f"{status} with {len(texts)} of {n} texts"

    def stream(self) -> str | None:
        """A streamed completion, to its end."""
        status, body = self.post({"prompt": TEXT, "max_tokens": 24, "stream": True, "stop": ["@@"]})
        return None if status == 200 and body.endswith(b"data: [DONE]\n\n") else f"{status} without an end"

    def talk(self) -> str | None:
        """A chat, streamed or not; without a template, the error that says so."""
        body = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 16, "stream": self.random.random() < 0.5}
        status, _ = self.post(body, "/v1/chat/completions")
        return None if status == (200 if self.chat else 400) else f"{status}"

    def long(self) -> str | None:
        """As long a prompt as fits in bytes; every token of the tokenizer has one byte at least."""
        text = (TEXT * (self.context // len(TEXT) + 1))[: min(self.context, 4096) - 8]
        status, _ = self.post({"prompt": text, "max_tokens": 4})
        return None if status == 200 else f"{status}"

    def wrong(self) -> str | None:
        """A request that is refused."""
        fields = self.random.choice(({"temperature": -1}, {"generation_config": "{}"}, {"n": 10**6}, {"prompt": 3}))
        status, _ = self.post({"prompt": TEXT} | fields)
        return None if status == 400 else f"{status}"

    def large(self) -> str | None:
        """A text that cannot fit, or a body over the limit."""
        status, _ = self.post({"prompt": "x" * self.random.choice((2_000_000, 6_000_000))})
        return None if status in (400, 413) else f"{status}"

    def gone(self) -> str | None:
        """A request that the client leaves at once."""
        self.leave({"prompt": TEXT, "max_tokens": 10_000}, 0)
        return None

    def gone_while_streaming(self) -> str | None:
        """A stream that the client leaves."""
        self.leave({"prompt": TEXT, "max_tokens": 10_000, "stream": True}, 2000)
        return None

    def run(self, ends: Callable[[], bool], pause: float) -> None:
        """Send requests until it is time to end."""
        kinds = (self.whole, self.stream, self.talk, self.long, self.wrong, self.gone, self.gone_while_streaming)
        while not ends():
            kind = self.large if self.random.random() < 0.03 else self.random.choice(kinds)
            self.sent[kind.__name__] += 1
            try:
                complaint = kind()
            except (OSError, HTTPException, ValueError) as error:
                complaint = f"{type(error).__name__}: {error}"
            if complaint is not None:
                self.lost.append(f"{kind.__name__}: {complaint}")
            time.sleep(self.random.random() * 2 * pause)


class Server:
    """The server under test."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80

    def get(self, path: str) -> str:
        """A text from the server."""
        connection = HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Its metrics, by name and labels."""
        lines = [line for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def answered(self) -> int:
        """Requests for text that it has counted."""
        routes = ("/v1/completions", "/v1/chat/completions")
        return int(sum(value for name, value in self.metrics().items() if any(f'route="{r}"' in name for r in routes)))

    def idle(self, seconds: float) -> bool:
        """Wait until no request runs or waits; whether that came about."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.metrics()
            if found["trenchcoat_requests_running"] == found["trenchcoat_requests_waiting"] == 0:
                return True
            time.sleep(0.2)
        return False


def soak(url: str, minutes: float, requests: int, seed: int = 0) -> dict[str, Any]:
    """Run the clients; the figures, with `passed`."""
    server, resident = Server(url), list[float]()
    model = json.loads(server.get("/v1/models"))["data"][0]
    context = model["max_model_len"] or 2048
    clients = [
        Client(server.host, server.port, model["id"], context, model["chat"], random.Random(seed + number))
        for number in range(CLIENTS)
    ]
    before, began = server.answered(), time.monotonic()
    over = threading.Event()

    def sent() -> int:
        """Requests of all clients so far."""
        return sum(sum(client.sent.values()) for client in clients)

    def ends() -> bool:
        """Whether both the time and the number of requests are reached."""
        return over.is_set() or (time.monotonic() - began >= 60 * minutes and sent() >= requests)

    pause = 60 * minutes * CLIENTS / requests / 2
    threads = [threading.Thread(target=client.run, args=(ends, pause), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        resident.append(server.metrics()["process_resident_memory_bytes"])
        time.sleep(min(1.0, 60 * minutes / 50))
    idle = server.idle(60)
    fifth = max(len(resident) // 5, 1)
    early, late = median(resident[fifth : 2 * fifth]), median(resident[-fifth:])
    found: dict[str, Any] = {
        "seconds": round(time.monotonic() - began, 1),
        "requests": sent(),
        "kinds": dict(sum((client.sent for client in clients), Counter[str]())),
        "counted_by_the_server": server.answered() - before,
        "lost": [line for client in clients for line in client.lost],
        "idle_at_the_end": idle,
        "resident_mib": [round(early / 2**20, 1), round(late / 2**20, 1)],
        "growth": round(late / early - 1, 4),
    }
    counted = found["counted_by_the_server"] == found["requests"]
    return found | {"passed": counted and idle and not found["lost"] and late <= early * (1 + GROWTH)}


def _started(folder: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server of that folder, once it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "trenchcoat", "serve", folder, "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return process, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.2)
    raise SystemExit(process.returncode)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="DIR")
    parser.add_argument("--url", help="a server that is running already")
    parser.add_argument("--minutes", type=float, default=30, help="at least so long (30)")
    parser.add_argument("--requests", type=int, default=2000, help="at least so many (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mix of requests (0)")
    args = parser.parse_args()
    if (args.folder is None) == (args.url is None):
        parser.error("give a folder or --url")
    process, url = (None, args.url) if args.folder is None else _started(args.folder)
    try:
        found = soak(url, args.minutes, args.requests, args.seed)
    finally:
        if process is not None:
            process.terminate()
            process.wait()
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["passed"] else 1)


if __name__ == "__main__":
    main()

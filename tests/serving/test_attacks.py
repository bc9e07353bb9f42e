"""Clients that send too much, too slowly or from elsewhere: a real process on loopback, every loop bounded.

Each test asserts what the attacker gets and that `/health` answers other clients meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from serve_kit import LONG, PROMPT, Running, ask, metric, running, wait_until
from trenchcoat.serving import web

pytest_plugins = ["serve_fixtures"]

KEY, SECRET = "key-4f1d", "my secret prompt"
QUEUE = 3


@pytest.fixture(scope="module")
def small(adapter: Path, template: Path) -> Iterator[Running]:
    """A server with small limits and a key. Its answers may be long."""
    options = ("--queue", QUEUE, "--max-body", 1, "--body-seconds", 2, "--api-key", KEY)
    with running(adapter, "--context", 2 * LONG, "--chat-template", template, *options) as found:
        found.client = found.client.with_options(api_key=KEY)
        yield found


def post(server: Running, body: Any, path: str = "/v1/completions", **headers: str) -> Any:
    return ask(server, path, body, **{"Authorization": f"Bearer {KEY}", **headers})


@contextmanager
def healthy(server: Running) -> Iterator[list[float]]:
    """Asks for `/health` all the time; fails if it ever took more than three seconds."""
    seconds: list[float] = []
    done = threading.Event()

    def probe() -> None:
        while not seconds or not done.wait(0.02):
            began = time.monotonic()
            assert ask(server, "/health", timeout=30).status == 200
            seconds.append(time.monotonic() - began)

    with ThreadPoolExecutor(1) as pool:
        probing = pool.submit(probe)
        try:
            yield seconds
        finally:
            done.set()
            probing.result()
    assert max(seconds) < 3, f"/health took {max(seconds):.1f} s"


def raw(server: Running, *pieces: bytes, timeout: float = 20) -> socket.socket:
    """A connection on which these bytes were sent."""
    found = socket.create_connection(("127.0.0.1", server.port), timeout=timeout)
    for piece in pieces:
        found.sendall(piece)
    return found


def head(length: int, path: str = "/v1/completions", kind: str = "application/json") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}", f"Content-Type: {kind}"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    pieces = []
    with connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


# Too much


def test_a_body_over_the_limit_is_refused_before_it_is_read(small: Running) -> None:
    with raw(small, head(10**12)) as connection:
        began = time.monotonic()
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
        assert time.monotonic() - began < 1
    answer = post(small, b"x" * (8 * 2**20))
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert "larger than 1048576 bytes" in answer.error


def test_a_body_without_a_length_is_read_up_to_the_limit(small: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=30)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    pieces = (b"x" * 65536 for _ in range(64))
    connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413
    connection.close()


def test_large_prompts_neither_stop_the_server_nor_grow_it(server: Running) -> None:
    """On a server of few tokens a text of megabytes is refused by its length, before it is tokenized."""
    bodies = [{"prompt": "abc " * 900_000}, {"prompt": ["abc " * 30_000] * 32}, {"prompt": [[1] * 30_000] * 32}]
    bodies += [{"messages": [{"role": "user", "content": "x" * 3_000_000}]}]
    ask(server, "/v1/completions", bodies[0])
    before = metric(server, "process_resident_memory_bytes")
    with healthy(server) as probes:
        for body in bodies * 2:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            began = time.monotonic()
            answer = ask(server, path, body)
            assert (answer.status, time.monotonic() - began < 5) == (400, True)
            assert "this server takes fewer than" in answer.error
    assert len(probes) >= 5
    assert metric(server, "process_resident_memory_bytes") < before + 100 * 2**20


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"prompt":' * 100_000,
        b'{"prompt": "x", "seed": ' + b"9" * 500_000 + b"}",
        b'{"prompt": [' + b"[]," * 300_000 + b"[]]}",
        b'{"prompt": "x", "logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(60_000)) + b"}}",
        b'{"prompt": "x", "stop": [' + b",".join(b'"s%d"' % i for i in range(60_000)) + b"]}",
        b'{"prompt": "x", "' + b"k" * 900_000 + b'": 1}',
        b"\xff\xfe" * 1000,
        b'{"messages": [' + b",".join([b'{"role":"user"}'] * 50_000) + b"]}",
        b'{"messages": [{"role": "user", "content": ' + b"[" * 400 + b"]" * 400 + b"}]}",
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", '
        b'"parameters": ' + b'{"a":' * 400 + b"1" + b"}" * 400 + b"}}], " + b'"n": 0}',
    ],
    ids="lists objects digits prompts biases stops name no-text messages deep-content deep-tools".split(),
)
def test_malicious_json_is_refused_in_little_time(small: Running, body: bytes) -> None:
    path = "/v1/chat/completions" if body.startswith(b'{"messages"') else "/v1/completions"
    with healthy(small):
        began = time.monotonic()
        answer = post(small, body, path)
        assert time.monotonic() - began < 3
    assert answer.status == 400, answer.body[:200]
    assert len(answer.body) < 1000


def test_beams_and_templates_of_a_client_reach_nothing(server: Running) -> None:
    template = "{% for a in range(10**8) %}{% for b in range(10**8) %}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "x"}]
    with healthy(server):
        for extra in (
            {"generation_config": json.dumps({"num_beams": 300})},
            {"chat_template_kwargs": {"chat_template": template}},
            {"chat_template": template},
        ):
            for path, body in (("/v1/chat/completions", {"messages": messages}), ("/v1/completions", {"prompt": "x"})):
                answer = ask(server, path, body | extra)
                assert (answer.status, "is not a field that this server knows" in answer.error) == (400, True)


def test_stop_strings_cost_little_and_nothing_once_the_client_is_gone(endless: Running) -> None:
    stops = [f"\u00ff{number}" * 60 for number in range(16)]
    body = json.dumps({"prompt": PROMPT, "max_tokens": LONG, "stop": stops}).encode()
    connection = raw(endless, head(len(body)), body)
    wait_until(lambda: metric(endless, "trenchcoat_requests_running") == 1, 20)
    connection.close()
    wait_until(lambda: metric(endless, "trenchcoat_requests_running") == 0, 20)
    assert ask(endless, "/v1/completions", {"prompt": "x", "max_tokens": 2}).status == 200


# Too slowly


def test_slow_bodies_are_ended(small: Running) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(raw(small, head(1000), b'{"prompt": ')) for _ in range(20)]
        assert post(small, {"prompt": "x", "max_tokens": 1}).status == 200, "they hold no place in the queue"
        began = time.monotonic()
        for connection in slow:
            assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 10


def test_bodies_that_trickle_are_ended(small: Running) -> None:
    with raw(small, head(1000)) as connection:
        connection.settimeout(0.1)
        for _ in range(100):
            try:
                connection.sendall(b" ")
                if connection.recv(65536).startswith(b"HTTP/1.1 408 "):
                    return
            except TimeoutError:
                continue
    pytest.fail("a body may take more than ten seconds")


def test_heads_that_do_not_end_are_ended(small: Running) -> None:
    connections = [raw(small), raw(small, b"POST /v1/comp"), raw(small, b"GET /health HTTP/1.1\r\nHost: localhost\r\n")]
    keep, answered = raw(small, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"), b""
    while not answered.endswith(b"}"):
        answered += keep.recv(65536)
    keep.sendall(b"GET /hea")
    began = time.monotonic()
    for connection in (*connections, keep):
        assert received(connection) == b""
    assert time.monotonic() - began < 15
    assert received(raw(small, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000))[:13] in (b"", b"HTTP/1.1 400 ")


# Too many


def test_a_full_queue_answers_429_with_retry_after(small: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": LONG}).encode()
    with ExitStack() as stack:
        for count in range(1, QUEUE + 2):
            stack.enter_context(raw(small, head(len(body)), body))
            wait_until(lambda now=count: _admitted(small) == now, 20)  # type: ignore[misc]
        with healthy(small):
            answer = post(small, {"prompt": "x"})
            assert (answer.status, int(answer.headers["retry-after"]) >= 1) == (429, True)
            assert f"{QUEUE + 1} requests are waiting already" in answer.error
            with pytest.raises(openai.RateLimitError):
                small.client.completions.create(model=small.name, prompt="x")
    wait_until(lambda: _admitted(small) == 0, 20)
    assert post(small, {"prompt": "x", "max_tokens": 1}).status == 200


def _admitted(server: Running) -> int:
    lines = post_metrics(server).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return int(values["trenchcoat_requests_running"]) + int(values["trenchcoat_requests_waiting"])


def post_metrics(server: Running) -> str:
    return str(ask(server, "/metrics", Authorization=f"Bearer {KEY}").body.decode())


def test_a_client_that_leaves_the_queue_frees_its_place(small: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": LONG}).encode()
    with raw(small, head(len(body)), body):
        wait_until(lambda: _admitted(small) == 1, 20)
        for _ in range(3 * QUEUE):
            waiting = raw(small, head(len(body)), body)
            wait_until(lambda: _admitted(small) == 2, 20)
            waiting.close()
            wait_until(lambda: _admitted(small) == 1, 20)
    wait_until(lambda: _admitted(small) == 0, 20)


# From elsewhere


def test_the_key_is_needed_everywhere_but_for_the_page_and_health(small: Running) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/models", None), ("/metrics", None)):
            answer = ask(small, path, body, **headers)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert [ask(small, path).status for path in ("/", "/health")] == [200, 200]
    assert [model.id for model in small.client.models.list()] == ["coat"]
    with pytest.raises(openai.AuthenticationError):
        small.client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("box", 200), ("evil.example", 421),
     ("127.0.0.1.evil.example:8000", 421), ("localhost.evil.example", 421)],
)  # fmt: skip
def test_names_of_other_hosts_are_refused(server: Running, host: str, status: int) -> None:
    assert ask(server, "/v1/models", Host=host).status == status


def test_a_page_of_another_site_cannot_send_a_request_unasked(server: Running) -> None:
    """What a browser sends without asking first: these three types, and no header of ours."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        request = ask(server, "/v1/completions", {"prompt": "x"}, Content_Type=kind)
        assert request.status == 415
    assert "access-control-allow-origin" not in ask(server, "/health").headers


def test_the_log_has_ids_and_nothing_that_a_client_wrote(small: Running) -> None:
    sent = post(small, {"prompt": SECRET, "max_tokens": 3, "user": SECRET}, X_Request_ID="my-id.1")
    assert sent.headers["x-request-id"] == "my-id.1"
    odd = post(small, {"prompt": SECRET, "temperature": SECRET}, X_Request_ID="two words")
    assert odd.headers["x-request-id"] != "two words"
    ask(small, f"/v1/models/{SECRET.replace(' ', '-')}?key={KEY}")
    wait_until(lambda: odd.headers["x-request-id"] in small.log.read_text(), 10)
    log = small.log.read_text()
    assert "my-id.1 POST /v1/completions 200" in log
    assert f"prompt={len(SECRET)} written=3" in log
    assert f"{odd.headers['x-request-id']} POST /v1/completions 400" in log
    assert not any(word in log for word in (SECRET, KEY, "secret", "two words", "Traceback"))


def test_metrics_count_what_was_done(server: Running) -> None:
    names = ("trenchcoat_prompt_tokens_total", "trenchcoat_generated_tokens_total", "trenchcoat_run_seconds_count")
    before = [metric(server, name) for name in names]
    ask(server, "/v1/completions", {"prompt": "abcd", "max_tokens": 3, "n": 2})
    ask(server, "/v1/completions", {"prompt": "abcd", "max_tokens": 0})
    assert [metric(server, name) - old for name, old in zip(names, before, strict=True)] == [4, 6, 1]
    text = ask(server, "/metrics").body.decode()
    assert 'trenchcoat_requests_total{route="/v1/completions",status="200"}' in text
    assert 'trenchcoat_requests_total{route="/v1/completions",status="400"}' in text
    assert metric(server, "trenchcoat_state_bytes") > 1000
    for line in text.splitlines():
        assert line.startswith("# TYPE ") or float(line.rsplit(" ", 1)[1]) >= 0, line


def test_a_client_that_does_not_take_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "SEND_SECONDS", 0.05)
    aborted: list[bool] = []

    async def never(message: Any) -> None:
        await asyncio.Event().wait()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"method": "GET", "path": "/", "headers": [], "state": {"abort": lambda: aborted.append(True)}}
    with pytest.raises(web.Disconnected):
        asyncio.run(web.Exchange(scope, receive, never).answer(200, b"x", "text/plain"))
    assert aborted == [True]

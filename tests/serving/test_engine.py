"""The server without a socket: what the model's thread does, and answers to what should not happen."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from typing import Any

import pytest
import torch

from conftest import byte_tokenizer
from tiny_families import make, tokens
from trenchcoat.generation import generate
from trenchcoat.serving.engine import Engine, Job, Piece, Stopped
from trenchcoat.serving.refusals import Refused
from trenchcoat.serving.requests import Request
from trenchcoat.serving.web import App, Limits

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4, 8, 16],
    "original_max_position_embeddings": 40, "factor": 8.0,
}  # fmt: skip


def engine(**changes: Any) -> Engine:
    model = make("llama", **{"vocab_size": 300, **changes}).eval()
    return Engine(model, byte_tokenizer(), None, threading.Event())


def written(engine: Engine, ids: list[int], count: int) -> str:
    """The text of a completion of token ids."""
    pieces: list[Piece] = []
    engine.run(Job(Request(prompts=(ids,), max_tokens=count), [ids], pieces.append)).result()
    return "".join(part.text for piece in pieces for part in piece.parts)


def test_prompts_are_read_as_the_model_reads_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beyond the length at which the rotary frequencies change, where reading in pieces gives another text."""
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 16)
    found = engine(rope_parameters=LONGROPE, max_position_embeddings=40)
    ids = tokens(1, 60)
    with torch.no_grad():
        best = found.model(input_ids=ids).logits[0, -1].argmax()
    assert written(found, ids[0].tolist(), 1) == found.tokenizer.decode([int(best)])
    body = {"prompt": ids[0].tolist(), "echo": True, "logprobs": 1}
    with pytest.raises(Refused, match="prompts of at most 40 tokens: the model's rotary embedding is 'longrope'"):
        found.read(json.dumps(body).encode(), chat=False).result()


def test_a_client_that_leaves_ends_the_reading_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 4)
    found = engine()
    ids = tokens(1, 40)[0].tolist()
    job = Job(Request(prompts=(ids,)), [ids], lambda piece: None)
    calls: list[int] = []

    def leaving(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        job.gone.set()
        return original(*args, **kwargs)

    original = found.model.model.forward
    monkeypatch.setattr(found.model.model, "forward", leaving)
    with pytest.raises(Stopped):
        found.run(job).result()
    assert len(calls) == 1


def answer(app: App, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """The response to a completion request, from the application itself."""
    sent: list[dict[str, Any]] = []

    async def request() -> None:
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"x-request-id", b"the-id")]
        await app({"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}, receive, send)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a request leaves no work behind"

    asyncio.run(request())
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:])


def app(found: Engine) -> App:
    return App(found, "coat", Limits(body=1000, body_seconds=5, queue=1, api_key=None, hosts=None))


@pytest.mark.parametrize("stream", [True, False])
def test_an_unforeseen_error_is_logged_under_the_requests_id(
    stream: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = engine()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory at my secret place")

    monkeypatch.setattr(found.model.model, "forward", broken)
    served = app(found)
    with caplog.at_level(logging.ERROR, "trenchcoat.serving"):
        status, headers, body = answer(served, {"prompt": "x", "stream": stream})
    assert (status, headers["x-request-id"]) == (200 if stream else 500, "the-id")
    error = json.loads(body.removeprefix(b"data: "))["error"]
    assert (error["type"], error["message"]) == ("server_error", "the request failed; the server's log says why")
    assert "the-id failed: RuntimeError" in caplog.text
    monkeypatch.undo()
    assert answer(served, {"prompt": "x", "max_tokens": 1})[0] == 200, "and the next request is answered"


def test_a_client_that_leaves_before_its_request_is_read_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine()
    busy, reads = threading.Event(), list[bytes]()
    monkeypatch.setattr(found, "_read", lambda body, chat: reads.append(body))
    found._reader.submit(busy.wait, 30)
    served = app(found)
    messages = [
        {"type": "http.request", "body": b"{}", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        pytest.fail("a client that is gone gets an answer")

    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    asyncio.run(served(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send))
    busy.set()
    found._reader.submit(lambda: None).result(timeout=30)
    assert reads == []
    assert served.metrics.requests == {("/v1/completions", 499): 1}
    assert (served.metrics.running, served.metrics.waiting) == (0, 0)


def test_a_refused_request_leaves_nothing_behind() -> None:
    served = app(engine())
    assert answer(served, {"prompt": "x", "n": 0})[0] == answer(served, {})[0] == 400
    assert answer(served, {"prompt": "x", "model": "another"})[0] == 404


def test_a_stopping_server_says_so() -> None:
    found = engine()
    found.stopping.set()
    status, _, body = answer(app(found), {"prompt": "x"})
    assert (status, json.loads(body)["error"]["message"]) == (503, "the server is stopping")

"""The serving benchmark: both servers run and are asked, its table and picture show what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_kit import Running
from trenchcoat.bench import serve
from trenchcoat.bench.client import Endpoint, ask, endpoint, started
from trenchcoat.bench.registry import run_benchmark
from trenchcoat.config import UserError

pytest_plugins = ["serve_fixtures"]


def test_the_teacher_is_started_in_the_embedded_server(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "KINDS", ("teacher",))  # the student's process differs by one option
    out = tmp_path / "serve.json"
    run_benchmark("serve", quick=True, model=str(adapter), out=str(out), threads=1)
    found = json.loads(out.read_text())
    assert found["engine"] == "embedded"
    heads, dim, layers = 2, 8, 2
    for context, kinds in found["by_context"].items():
        read = int(context) + found["tokens"] - 1  # the last token written is not read
        assert kinds["teacher"]["state_bytes"] == 2 * 4 * heads * dim * layers * read


def test_a_running_server_is_asked_by_its_address(server: Running, tmp_path: Path) -> None:
    address, out = f"http://127.0.0.1:{server.port}", tmp_path / "serve.json"
    text = run_benchmark("serve", quick=True, url=f"{address},{address}/v1", out=str(out))
    found = json.loads(out.read_text())
    for kind in ("student", "teacher"):  # here the same model
        assert len({kinds[kind]["state_bytes"] for kinds in found["by_context"].values()}) == 1
    for kinds in found["by_context"].values():
        for figures in kinds.values():
            assert figures["first_token_seconds"] > 0
            assert figures["tokens_per_second"] > 0
            assert figures["tokens_per_second_of_all"] > 0
            assert figures["prompt_tokens_per_second"] > 0
            assert figures["requests_per_gib"] == pytest.approx(2**30 / figures["state_bytes"])
    assert "64, teacher" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    answer = ask(endpoint(f"{address}/v1/"), [40, 41, 42], 5)
    assert answer.tokens == 5
    assert 0 < answer.first < answer.seconds
    assert answer.rate == pytest.approx(4 / (answer.seconds - answer.first))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "is no address"),
        ({"url": "http://127.0.0.1:9"}, "does not answer"),
        ({"url": "http://127.0.0.1:9", "engine": "embedded"}, "leave out --engine$"),
        ({"url": "a,b,c"}, "expected the student's address"),
        ({"engine": "sglang"}, "known: embedded, vllm"),
        ({"engine": "embedded", "model": "x", "teacher": "y"}, "--teacher is for --engine vllm"),
        ({"engine": "vllm", "model": "x"}, "--engine vllm: it is not installed"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_benchmark("serve", quick=True, **options)


def test_refusals_and_failed_starts_say_why(server: Running, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/v1"
    with pytest.raises(UserError, match=r"refuses with 404"):
        ask(Endpoint(address, "another"), [40], 2)
    with pytest.raises(UserError, match=r"refuses with 400: .*this server takes fewer"):
        ask(endpoint(address), [40] * 500, 2)
    command = ["sh", "-c", "echo no model here; exit 3"]
    with started(lambda port: command, tmp_path / "log", threads=None) as failed, pytest.raises(UserError) as raised:
        failed.ready()
    assert "did not start" in str(raised.value)
    assert "no model here" in str(raised.value)


def test_the_size_of_vllms_cache_is_read_from_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO GPU KV cache size: 93,952 tokens\nINFO Maximum concurrency for 4,352 tokens per request: 21.59x\n"
    )
    assert Endpoint("", "", log).capacity() == {"tokens": 4352, "requests": 21.59}
    log.write_text("INFO nothing")
    assert Endpoint("", "", log).capacity() is None

"""`trenchcoat serve` as clients see it: a real server process on loopback, the `openai` client package."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from serve_kit import CONTEXT, LONG, PROMPT, Running, running
from trenchcoat.cli import app as cli
from trenchcoat.config import UserError
from trenchcoat.models import hub
from trenchcoat.serving.server import ServeSettings, _limits, serve

pytest_plugins = ["serve_fixtures"]


def expected(adapter: Path, prompt: str, tokens: int) -> str:
    """Greedy generation in this process."""
    model, tokenizer = hub.load(adapter, device="cpu")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def complete(server: Running, prompt: str = PROMPT, tokens: int = 12, **options: Any) -> Any:
    return server.client.completions.create(model=server.name, prompt=prompt, max_tokens=tokens, **options)


def refused(server: Running, **body: Any) -> str:
    """The message of the 400 that this request to /completions gets."""
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(**{"model": server.name, "prompt": PROMPT, "max_tokens": 4, **body})
    return str(caught.value)


def test_the_model_is_listed(server: Running) -> None:
    assert [model.id for model in server.client.models.list()] == ["coat"]


def test_a_completion_is_what_generate_writes(server: Running, adapter: Path) -> None:
    done = complete(server)
    assert done.choices[0].text == expected(adapter, PROMPT, 12)
    assert done.choices[0].finish_reason == "length"
    assert (done.model, done.usage.prompt_tokens, done.usage.completion_tokens) == ("coat", len(PROMPT), 12)


def test_streamed_chunks_add_up_to_the_whole(server: Running) -> None:
    whole = complete(server, tokens=20).choices[0].text
    chunks = list(complete(server, tokens=20, stream=True))
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 3, "it came in one chunk"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_streamed_and_whole(server: Running, adapter: Path) -> None:
    messages = [{"role": "user", "content": "What is in the pockets?"}]
    options: dict[str, Any] = {"model": server.name, "messages": messages, "max_tokens": 10}
    done = server.client.chat.completions.create(**options)
    rendered = "user: What is in the pockets?\nassistant:"
    assert done.choices[0].message.content == expected(adapter, rendered, 10)
    chunks = list(server.client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == done.choices[0].message.content


def test_concurrent_requests_get_their_own_texts(server: Running, adapter: Path) -> None:
    prompts = [f"{number} coats" for number in range(8)]

    def ask(prompt: str) -> str:
        if int(prompt[0]) % 2:
            return str(complete(server, prompt).choices[0].text)
        return "".join(chunk.choices[0].text for chunk in complete(server, prompt, stream=True))

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, prompts))
    assert texts == [expected(adapter, prompt, 12) for prompt in prompts]


def test_a_temperature_samples_by_its_seed(server: Running) -> None:
    texts = [complete(server, temperature=1.5, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert complete(server, temperature=0).choices[0].text == complete(server).choices[0].text


# Invalid requests


def test_a_prompt_over_the_limit(server: Running) -> None:
    message = f"the prompt has {CONTEXT} tokens; this server takes fewer than {CONTEXT}"
    assert message in refused(server, prompt="x" * CONTEXT)
    assert message in refused(server, prompt="x" * CONTEXT, stream=True)
    done = complete(server, "x" * (CONTEXT - 3), tokens=50)
    assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": ""}, "no token"),
        ({"prompt": ["a", 3]}, "expected a string, token ids"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": "many"}, "max_tokens is 'many'"),
        ({"best_of": 2}, "best_of=2 is not available"),
        ({"stop": 5}, "stop is 5"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"extra_body": {"generation_config": "{}"}}, "'generation_config' is not a field"),
    ],
    ids=str,
)
def test_unsupported_and_invalid_fields_are_refused(server: Running, body: dict[str, Any], said: str) -> None:
    assert said in refused(server, **body)


@pytest.mark.parametrize(
    ("route", "content", "status"),
    [
        ("completions", b'{"prompt": ', 400),
        ("completions", b"", 400),
        ("completions", b"[1]", 400),
        ("completions", b'{"prompt": "x", "windw": 8}', 400),
        ("chat/completions", b'{"model": "coat"}', 400),
        ("chat/completions", b'{"messages": [{"role": "user"}]}', 200),
        ("chat/completions", b'{"messages": 3}', 400),
        ("chat/completions", b'{"messages": [{"content": "x"}]}', 400),
        ("audio/transcriptions", b"{}", 404),
    ],
)
def test_wrong_json(server: Running, route: str, content: bytes, status: int) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/{route}", data=content, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        found, text = error.code, error.read()
    assert (found, bool(json.loads(text))) == (status, True), text


def test_chat_needs_a_template(endless: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        endless.client.chat.completions.create(model=endless.name, messages=[{"role": "user", "content": "x"}])


# Clients that disconnect, servers that stop


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_the_server(endless: Running, stream: bool) -> None:
    if stream:
        chunks = complete(endless, tokens=LONG, stream=True)
        for _, _ in zip(range(3), chunks, strict=False):
            pass
        chunks.close()
    else:
        body = json.dumps({"model": endless.name, "prompt": PROMPT, "max_tokens": LONG}).encode()
        with socket.create_connection(("127.0.0.1", endless.port)) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            time.sleep(0.5)
    assert complete(endless).choices[0].finish_reason == "length"  # within the client's timeout of 60 s


def _stop(found: Running) -> float:
    """Seconds until the process was gone after a SIGTERM; its exit code is 0 and it did not crash."""
    began = time.monotonic()
    found.process.send_signal(signal.SIGTERM)
    found.process.wait(timeout=90)
    assert found.process.returncode == 0, found.log.read_text()
    assert "Traceback" not in found.log.read_text()
    return time.monotonic() - began


def test_shutdown_lets_short_requests_end_and_ends_long_ones(adapter: Path) -> None:
    with running(adapter, "--context", 2 * LONG, "--grace", 3) as found, ThreadPoolExecutor(3) as pool:
        short = complete(found, tokens=150, stream=True)
        text = next(iter(short)).choices[0].text
        long_stream = complete(found, tokens=LONG, stream=True)
        waiting = pool.submit(complete, found, tokens=LONG)
        time.sleep(0.3)
        stopped = pool.submit(_stop, found)
        text += "".join(chunk.choices[0].text for chunk in short)
        assert len(text) > 20
        with pytest.raises(openai.APIError) as ended:
            list(long_stream)
        assert "the server is stopping" in str(ended.value.body)
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            waiting.result()
        assert stopped.result() < 60


# Starting


def test_merged_folders_are_served_too_and_stop_at_once(adapter: Path, tmp_path: Path) -> None:
    model, tokenizer = hub.load(adapter, device="cpu")
    hub.save_merged(model, tmp_path / "merged", tokenizer)
    with running(tmp_path / "merged", "--name", "team/coat") as found:
        done = found.client.completions.create(model="team/coat", prompt=PROMPT, max_tokens=12)
        assert done.choices[0].text == expected(adapter, PROMPT, 12)
        assert _stop(found) < 20


def test_a_port_in_use_is_reported(adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", str(adapter), "--port", str(taken.getsockname()[1])]) == 1
    assert "trenchcoat: cannot listen on 127.0.0.1" in capfd.readouterr().err


def test_invalid_settings_are_refused(adapter: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    for settings, said in [
        (ServeSettings(name="a:b"), "--name is 'a:b'"),
        (ServeSettings(context=1), "--context is 1"),
        (ServeSettings(grace=-1.0), "--grace is -1"),
        (ServeSettings(log_level="loud"), "--log-level is 'loud'"),
        (ServeSettings(queue=-1), "--queue is -1"),
        (ServeSettings(max_body=0), "--max-body is 0"),
        (ServeSettings(body_seconds=0), "--body-seconds is 0"),
        (ServeSettings(api_key=""), "the API key is empty"),
        (ServeSettings(chat_template=str(tmp_path / "absent")), "cannot be read as text"),
        (ServeSettings(device="gpu"), "not a device"),
    ]:
        with pytest.raises(UserError, match=said):
            serve(adapter, settings, lambda line: None)
    with pytest.raises(UserError, match="ordinary 'llama' model"):
        serve(tiny_model_dir, ServeSettings(), lambda line: None)


def test_the_key_and_the_hosts_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRENCHCOAT_API_KEY", raising=False)
    assert _limits(ServeSettings()).api_key is None
    monkeypatch.setenv("TRENCHCOAT_API_KEY", "from-the-environment")
    assert _limits(ServeSettings()).api_key == "from-the-environment"
    assert _limits(ServeSettings(api_key="given")).api_key == "given"
    for host in ("127.0.0.1", "localhost", "::1"):
        assert _limits(ServeSettings(host=host)).hosts == ()
    assert _limits(ServeSettings(host="0.0.0.0")).hosts is None
    assert _limits(ServeSettings(host="0.0.0.0", allow_host=("Coat.Example",))).hosts == ("coat.example",)

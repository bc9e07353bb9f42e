"""`trenchcoat serve --engine vllm` as clients see it: a real process on loopback, the `openai` client package."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from vllm_kit import NEW, expected, prompts, save_merged

LENGTHS = (1, 5, 17, 40, 90, 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_merged(tmp_path_factory.mktemp("served") / "coat", "groups")


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a server that has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--engine", "vllm", "--port", str(port), "--context", "256", "--dtype", "float32", "--name", "coat"]
    command = [sys.executable, "-m", "trenchcoat", "serve", str(folder), *options, "--vllm-option=--enforce-eager"]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("wb") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        try:
            _wait(port, process, log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            process.terminate()
            process.wait(60)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


def complete(client: openai.OpenAI, prompt: list[int], **options: Any) -> Any:
    settings: dict[str, Any] = {"max_tokens": NEW, "temperature": 0.0, "extra_body": {
        "ignore_eos": True, "return_token_ids": True}}  # fmt: skip
    return client.completions.create(model="coat", prompt=prompt, **{**settings, **options})


def test_tokens_streamed_and_whole_and_24_at_once(client: openai.OpenAI, folder: Path) -> None:
    asked = prompts(LENGTHS)
    wanted = [tokens for tokens, _ in expected(folder, asked)]
    assert [complete(client, prompt).choices[0].token_ids for prompt in asked] == wanted
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda prompt: complete(client, prompt).choices[0].token_ids, asked * 4))
    assert found == wanted * 4
    whole = complete(client, asked[3]).choices[0].text
    chunks = list(complete(client, asked[3], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole
    assert len(chunks) > 3


def test_clients_that_leave_and_prompts_that_are_too_long(client: openai.OpenAI, folder: Path) -> None:
    asked = prompts(LENGTHS)
    for prompt in asked:
        with complete(client, prompt, stream=True, max_tokens=50) as stream:
            next(iter(stream))
    with pytest.raises(openai.BadRequestError, match="256"):
        complete(client, [5] * 300)
    assert complete(client, asked[2]).choices[0].token_ids == expected(folder, asked[2:3])[0][0]

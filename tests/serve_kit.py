"""A server process on loopback with a client, and raw requests to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import save_tiny_model
from trenchcoat.cli import app as cli
from trenchcoat.config import FeatureMapConfig, ModelConfig, StudentConfig
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.hub import adapter_state

SOURCE = Path(cli.__file__).parents[2]
STUDENT = StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=6))
CONTEXT = 400
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PROMPT = "The coat is long and"
LONG = 100_000
"""Tokens that take minutes to generate, so that only cancellation ends the request."""


@dataclass
class Running:
    """A server process and its client."""

    process: subprocess.Popen[str]
    port: int
    client: openai.OpenAI
    name: str
    log: Path
    """What the process wrote to its standard error."""


def save_base(folder: Path) -> Path:
    """A tiny Llama that writes printable characters and never ends a text: its other tokens have a logit of 0."""
    save_tiny_model(folder, seed=0, tie_word_embeddings=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for token, row in enumerate(model.lm_head.weight):
            text = tokenizer.decode([token])
            row.mul_(4.0 if len(text) == 1 and text.isascii() and text.isprintable() else 0.0)
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path) -> Path:
    """An adapter for it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    attach_students(model, STUDENT)
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    set_mode(model, "student")
    hub.save_adapter(model, folder, base=ModelConfig(path=str(base)))
    return folder


@contextmanager
def running(folder: Path, *options: object) -> Iterator[Running]:
    """`trenchcoat serve` with these options, once it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "trenchcoat", "serve", str(folder), "--port", str(port), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
        found = Running(process, port, client, folder.name, Path(log.name))
        try:
            wait_until(lambda: process.poll() is not None or _listens(port), 90)
            assert process.poll() is None, found.log.read_text()
            yield found
        finally:
            client.close()
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds; fails if it takes longer."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.05)


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    """By their names in lower case."""
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"]["message"])


def ask(server: Running, path: str, body: Any = None, *, timeout: float = 60, **headers: str) -> Answer:
    """One request; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", data, {"Content-Type": "application/json", **named}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return Answer(answer.status, _lower(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, _lower(error.headers), error.read())


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def metric(server: Running, name: str) -> float:
    """The sum of a metric's values over its labels."""
    lines = ask(server, "/metrics").body.decode().splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert values, name
    return sum(values)

"""What serving costs: a linearized model and its softmax teacher in the same engine, asked over HTTP, by context.

The embedded server serves both at once, so that a busy machine slows both equally. vLLM takes the memory that it is
given, so it serves one after the other. Prompts are random tokens, and no two are the same: nothing is found in a
prefix cache.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

from trenchcoat.bench.benchmark import Benchmark, Settings, grid
from trenchcoat.bench.client import Endpoint, Timed, ask, endpoint, started
from trenchcoat.config import FeatureMapConfig, ModelConfig, StudentConfig, UserError
from trenchcoat.config.units import GIB
from trenchcoat.evaluation.report.plots import page
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students
from trenchcoat.models.basefolder import read_config
from trenchcoat.models.loading import load_model, model_source
from trenchcoat.serving import vllm_server
from trenchcoat.serving.server import ServeSettings

ENGINES = ("embedded", "vllm")
KINDS = ("student", "teacher")
_COLOURS = {"student": "#0072B2", "teacher": "#000000"}
_TOKENS = range(10, 250)
"""Ids of prompts: characters and pieces of words in every tokenizer."""


@dataclass(frozen=True)
class ServeSizes:
    """What is asked."""

    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    tokens: int = 64
    """Tokens of an answer."""
    clients: int = 4
    """Requests at once, for the throughput."""
    repeats: int = 3


class Prompts:
    """Random prompts, none twice."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def __call__(self, length: int) -> list[int]:
        """Another prompt of ``length`` tokens."""
        return self._random.choices(_TOKENS, k=length)


class ServeBenchmark(Benchmark[ServeSizes]):
    """``bench serve``."""

    full = ServeSizes()
    quick = ServeSizes(contexts=(16, 64), tokens=6, clients=2, repeats=1)
    options = ("model", "teacher", "engine", "url")
    implementation = None

    def run(self, sizes: ServeSizes, settings: Settings) -> dict[str, Any]:
        """First token, tokens a second and memory of a request, by context."""
        prompts = Prompts()
        found: dict[str, dict[str, Any]] = {}
        facts: dict[str, Any] = {"engine": "a running server" if settings.url else settings.engine or ENGINES[0]}
        with tempfile.TemporaryDirectory() as name:
            for group in _servers(settings, sizes, Path(name)):
                with group as servers:
                    for context in sizes.contexts:
                        settings.say(f"{context} tokens: {' and '.join(servers)}")
                        figures = _asked(servers, context, sizes, prompts)
                        found.setdefault(str(context), {}).update(figures)
                    facts |= {
                        f"{kind}_requests_in_cache": served.capacity()
                        for kind, served in servers.items()
                        if served.capacity() is not None
                    }
        return {**facts, "tokens": sizes.tokens, "clients": sizes.clients, "by_context": found}

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each context and kind."""
        rows = {
            f"{context}, {kind}": row for context, kinds in record["by_context"].items() for kind, row in kinds.items()
        }
        capacity = [
            f"vLLM's cache holds {record[key]['requests']:g} requests of {record[key]['tokens']} tokens: {kind}"
            for kind in KINDS
            if (key := f"{kind}_requests_in_cache") in record
        ]
        head = f"serving by {record['engine']}: {record['tokens']} tokens after a prompt, {record['clients']} clients"
        return [head, *grid("context", rows), *capacity]

    def draw(self, record: dict[str, Any], path: Path) -> bool:
        """First token, speed and size of a request's state, by context."""
        figures = {
            "first_token_seconds": "seconds to the first token",
            "tokens_per_second": "tokens a second, one request",
            "state_bytes": "bytes of a request's state",
        }
        by_context = record["by_context"]
        shown = {
            name: title
            for name, title in figures.items()
            if any(row.get(name) for kinds in by_context.values() for row in kinds.values())
        }
        with page(path, (3.4 * len(shown), 3.2), columns=len(shown)) as (_, axes):
            for place, (name, title) in zip(axes, shown.items(), strict=True):
                for kind, colour in _COLOURS.items():
                    found = {int(n): kinds[kind][name] for n, kinds in by_context.items() if kind in kinds}
                    points = [point for point in found.items() if point[1] is not None]
                    if points:
                        place.plot(*zip(*points, strict=True), marker="o", color=colour, label=kind)
                place.set(xscale="log", yscale="log", title=title, xlabel="tokens of the prompt")
                place.set_xticks([int(n) for n in by_context], [f"{int(n):,}" for n in by_context])
                place.xaxis.set_minor_locator(NullLocator())
            axes[0].legend(frameon=False)
        return True


def _servers(
    settings: Settings, sizes: ServeSizes, folder: Path
) -> Iterator[AbstractContextManager[dict[str, Endpoint]]]:
    """Context managers that give the servers to measure together, by kind."""
    if settings.url is not None:
        if settings.model or settings.teacher or settings.engine:
            raise UserError("--url is a running server: leave out --model, --teacher and --engine")
        addresses = settings.url.split(",")
        if len(addresses) > len(KINDS):
            raise UserError(f"--url {settings.url}: expected the student's address, or the student's and the teacher's")
        yield _running(dict(zip(KINDS, addresses, strict=False)))
        return
    engine = settings.engine or ENGINES[0]
    if engine not in ENGINES:
        raise UserError(f"--engine is {engine!r}; known: {', '.join(ENGINES)}")
    context = max(sizes.contexts) + sizes.tokens
    model = Path(settings.model).expanduser() if settings.model is not None else _untrained(folder / "embedded")
    cfg = ServeSettings(context=context, name="bench", device=settings.device, log_level="warning")
    if engine == "embedded":
        if settings.teacher is not None:
            raise UserError("--teacher is for --engine vllm; the embedded server serves the model's own softmax")
        both = {kind: partial(_embedded, model, replace(cfg, softmax=kind == "teacher")) for kind in KINDS}
        yield _started(both, dict.fromkeys(KINDS, model), settings, folder)
        return
    cfg = replace(cfg, device="auto")
    why_not = vllm_server.why_not(model, cfg)
    if why_not is not None:
        raise UserError(f"--engine vllm: {why_not}")
    if settings.teacher is None:
        raise UserError("--engine vllm serves the teacher from its own folder: give --teacher DIR")
    for kind, place in zip(KINDS, (model, Path(settings.teacher).expanduser()), strict=True):
        yield _started({kind: partial(_vllm, place, cfg)}, {kind: place}, settings, folder)


def _embedded(model: Path, cfg: ServeSettings, port: int) -> list[str]:
    """The command of the embedded server."""
    options = {"--port": port, "--context": cfg.context, "--name": cfg.name, "--device": cfg.device}
    given = [str(part) for item in options.items() for part in item]
    softmax = ["--softmax"] if cfg.softmax else []
    return [sys.executable, "-m", "trenchcoat", "serve", str(model), "--engine", "embedded", *given, *softmax]


def _vllm(model: Path, cfg: ServeSettings, port: int) -> list[str]:
    """The command of vLLM's server."""
    return vllm_server.command_line(model, replace(cfg, port=port))


@contextmanager
def _running(addresses: Mapping[str, str]) -> Iterator[dict[str, Endpoint]]:
    yield {kind: endpoint(address) for kind, address in addresses.items()}


@contextmanager
def _started(
    commands: Mapping[str, Callable[[int], list[str]]], models: Mapping[str, Path], settings: Settings, folder: Path
) -> Iterator[dict[str, Endpoint]]:
    """Start a server for each command and wait until all listen."""
    with ExitStack() as stack:
        begun = {
            kind: stack.enter_context(started(command, folder / f"{kind}.log", threads=settings.threads))
            for kind, command in commands.items()
        }
        yield {kind: replace(server.ready(), banned=_end_tokens(models[kind])) for kind, server in begun.items()}


def _end_tokens(place: Path) -> tuple[int, ...]:
    """The tokens that end a text, which answers must not begin with here."""
    adapter = hub.find_adapter(place)
    if adapter is not None:
        base = hub.read_meta(adapter)["base"]
        config = read_config(model_source(ModelConfig(path=base["path"])), base.get("revision"))
    else:
        config = read_config(place)
    found = config.eos_token_id
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)


def _untrained(folder: Path) -> Path:
    """An adapter of the embedded teacher with untrained maps: their values make no difference to the time."""
    cfg = ModelConfig(path="embedded", device="cpu", dtype="float32")
    model, _ = load_model(cfg)
    attach_students(model, StudentConfig(window=32, feature_map=FeatureMapConfig(feature_dim=64)))
    hub.save_adapter(model, folder, base=cfg)
    return folder


def _asked(servers: Mapping[str, Endpoint], context: int, sizes: ServeSizes, prompts: Prompts) -> dict[str, Any]:
    """The figures of each server; they are asked in turn, and their first answer is not counted."""
    alone: dict[str, list[Timed]] = {kind: [] for kind in servers}
    for turn in range(sizes.repeats + 1):
        for kind, server in servers.items():
            answer = ask(server, prompts(context), sizes.tokens)
            if turn:
                alone[kind].append(answer)
    together = {kind: _together(server, context, sizes, prompts) for kind, server in servers.items()}
    return {kind: _figures(alone[kind]) | together[kind] for kind in servers}


def _figures(answers: list[Timed]) -> dict[str, Any]:
    rates = [answer.rate for answer in answers if answer.rate is not None]
    held = answers[-1].state_bytes
    return {
        "first_token_seconds": statistics.median(answer.first for answer in answers),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "state_bytes": held,
        "requests_per_gib": None if held is None else GIB / held,
    }


def _together(server: Endpoint, context: int, sizes: ServeSizes, prompts: Prompts) -> dict[str, float]:
    """All clients at once: tokens a second of all, and the median time to the first token."""
    given = [prompts(context) for _ in range(sizes.clients)]
    began = time.perf_counter()
    with ThreadPoolExecutor(sizes.clients) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt, sizes.tokens), given))
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second_of_all": sum(answer.tokens for answer in answers) / seconds,
        "first_token_seconds_of_all": statistics.median(answer.first for answer in answers),
    }

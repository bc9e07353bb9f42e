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
SHORT = 256
"""Tokens of a prompt that only warms a server up."""
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
    """Requests alone; 0 for none."""


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
    options = ("model", "teacher", "engine", "url", "contexts", "clients", "tokens", "dtype", "vllm_option")
    implementation = None

    def sizes(self, settings: Settings) -> ServeSizes:
        """The command's, where it names some."""
        sizes: ServeSizes = super().sizes(settings)
        given: dict[str, Any] = {
            "contexts": tuple(settings.contexts),
            "clients": settings.clients,
            "tokens": settings.tokens,
        }
        sizes = replace(sizes, **{name: value for name, value in given.items() if value})
        if sizes.repeats < 0:
            raise UserError(f"--repeats is {sizes.repeats}; expected 0 or more")
        return sizes

    def run(self, sizes: ServeSizes, settings: Settings) -> dict[str, Any]:
        """First token, tokens a second and memory of a request, by context."""
        prompts = Prompts()
        found: dict[str, dict[str, Any]] = {}
        facts: dict[str, Any] = {
            "engine": "a running server" if settings.url else settings.engine or ENGINES[0],
            "tokens": sizes.tokens,
            "clients": sizes.clients,
            "by_context": found,
        }
        with tempfile.TemporaryDirectory() as name:
            for group in _servers(settings, sizes, Path(name)):
                with group as servers:
                    for context in sizes.contexts:
                        settings.say(f"{context} tokens: {' and '.join(servers)}")
                        figures = _asked(servers, context, sizes, prompts)
                        found.setdefault(str(context), {}).update(figures)
                        settings.keep(facts)
                    for kind, served in servers.items():
                        longest = served.capacity()
                        if longest is not None:
                            facts.setdefault("requests_in_cache", {}).setdefault(kind, []).append(longest)
            for kind, lengths in facts.get("requests_in_cache", {}).items():
                lengths += _capacities(kind, settings, sizes, Path(name))
        return facts

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each context and kind."""
        rows = {
            f"{context}, {kind}": row for context, kinds in record["by_context"].items() for kind, row in kinds.items()
        }
        capacity = [
            f"vLLM's cache holds {each['requests']:g} requests of {each['tokens']} tokens: {kind}"
            for kind, lengths in record.get("requests_in_cache", {}).items()
            for each in lengths
        ]
        head = f"serving by {record['engine']}: {record['tokens']} tokens after a prompt, {record['clients']} clients"
        return [head, *grid("context", rows), *capacity]

    def draw(self, record: dict[str, Any], path: Path) -> bool:
        """First token, speed and size of a request's state, by context."""
        figures = {
            "first_token_seconds": "seconds to the first token",
            "tokens_per_second": "tokens a second, one request",
            "prompt_tokens_per_second": f"{record['clients']} prompts, tokens a second",
            "decode_tokens_per_second": f"{record['clients']} answers, tokens a second",
            "state_bytes": "bytes of a request's state",
        }
        by_context = record["by_context"]
        shown = {
            name: title
            for name, title in figures.items()
            if any(row.get(name) is not None for kinds in by_context.values() for row in kinds.values())
        }
        with page(path, (3.4 * len(shown), 3.2), columns=len(shown)) as (_, axes):
            for place, (name, title) in zip(axes, shown.items(), strict=True):
                for kind, colour in _COLOURS.items():
                    found = {int(n): kinds[kind].get(name) for n, kinds in by_context.items() if kind in kinds}
                    points = [point for point in found.items() if point[1] is not None]
                    if points:
                        place.plot(*zip(*points, strict=True), marker="o", color=colour, label=kind)
                place.set(xscale="log", title=title, xlabel="tokens of the prompt")
                place.set_ylim(bottom=0)
                place.set_xticks([int(n) for n in by_context], [f"{int(n):,}" for n in by_context])
                place.xaxis.set_minor_locator(NullLocator())
            axes[0].legend(frameon=False)
        return True


def _servers(
    settings: Settings, sizes: ServeSizes, folder: Path
) -> Iterator[AbstractContextManager[dict[str, Endpoint]]]:
    """Context managers that give the servers to measure together, by kind."""
    if settings.url is not None:
        given = [name for name in ("model", "teacher", "engine", "dtype", "vllm_option") if getattr(settings, name)]
        if given:
            named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"--url is a running server: leave out {named}")
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
    cfg = _server_settings(settings, context)
    if engine == "embedded":
        if settings.vllm_option:
            raise UserError("--vllm-option is for --engine vllm")
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
        yield _started({kind: partial(_vllm, place, cfg, settings)}, {kind: place}, settings, folder)


def _server_settings(settings: Settings, context: int) -> ServeSettings:
    cfg = ServeSettings(context=context, name="bench", device=settings.device, log_level="warning")
    return cfg if settings.dtype is None else replace(cfg, dtype=settings.dtype)


def _capacities(kind: str, settings: Settings, sizes: ServeSizes, folder: Path) -> list[dict[str, float]]:
    """What vLLM's cache holds of requests of the other contexts, by its log: it says so of the longest it may get."""
    place, found = {"student": settings.model, "teacher": settings.teacher}[kind], []
    for context in sorted(sizes.contexts)[:-1]:
        settings.say(f"{context} tokens: requests in vLLM's cache, {kind}")
        cfg = replace(_server_settings(settings, context + sizes.tokens), device="auto")
        command = partial(
            _vllm, Path(str(place)).expanduser(), replace(cfg, vllm_option=("--enforce-eager",)), settings
        )
        with started(command, folder / f"{kind}.{context}.log", threads=settings.threads) as server:
            held = server.ready().capacity()
        found += [] if held is None else [held]
    return found


def _embedded(model: Path, cfg: ServeSettings, port: int) -> list[str]:
    """The command of the embedded server."""
    options = {
        "--port": port,
        "--context": cfg.context,
        "--name": cfg.name,
        "--device": cfg.device,
        "--dtype": cfg.dtype,
    }
    given = [str(part) for item in options.items() for part in item]
    softmax = ["--softmax"] if cfg.softmax else []
    return [sys.executable, "-m", "trenchcoat", "serve", str(model), "--engine", "embedded", *given, *softmax]


def _vllm(model: Path, cfg: ServeSettings, settings: Settings, port: int) -> list[str]:
    """The command of vLLM's server."""
    options = (*cfg.vllm_option, *settings.vllm_option)
    return vllm_server.command_line(model, replace(cfg, port=port, vllm_option=options))


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
    """The figures of each server; they are asked in turn, after a short prompt that is not counted."""
    alone: dict[str, list[Timed]] = {kind: [] for kind in servers}
    for server in servers.values():
        ask(server, prompts(min(context, SHORT)), sizes.tokens)
    for _ in range(sizes.repeats):
        for kind, server in servers.items():
            alone[kind].append(ask(server, prompts(context), sizes.tokens))
    together = {kind: _together(server, context, sizes, prompts) for kind, server in servers.items()}
    return {kind: _figures(alone[kind]) | together[kind] for kind in servers}


def _figures(answers: list[Timed]) -> dict[str, Any]:
    if not answers:
        return {}
    rates = [answer.rate for answer in answers if answer.rate is not None]
    held = answers[-1].state_bytes
    return {
        "first_token_seconds": statistics.median(answer.first for answer in answers),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "state_bytes": held,
        "requests_per_gib": None if held is None else GIB / held,
    }


def _together(server: Endpoint, context: int, sizes: ServeSizes, prompts: Prompts) -> dict[str, float | None]:
    """All clients at once: tokens a second of all, and the median time to the first token; the prompts' tokens a second
    until the last answer begins; and the answers' tokens a second from then until the first one ends."""
    given = [prompts(context) for _ in range(sizes.clients)]
    began = time.perf_counter()
    with ThreadPoolExecutor(sizes.clients) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt, sizes.tokens), given))
    seconds = time.perf_counter() - began
    all_write, one_ends = max(a.began + a.first for a in answers), min(a.began + a.seconds for a in answers)
    written = sum(answer.tokens_between(all_write, one_ends) for answer in answers)
    return {
        "prompt_tokens_per_second": sizes.clients * context / (all_write - began),
        "decode_tokens_per_second": written / (one_ends - all_write) if one_ends > all_write else None,
        "tokens_per_second_of_all": sum(answer.tokens for answer in answers) / seconds,
        "first_token_seconds_of_all": statistics.median(answer.first for answer in answers),
    }

"""Cost per token: a linearized Llama against its softmax teacher with a KV cache, by context, batch and dtype.

The teacher is measured with both caches of Transformers: the default of `generate()`, which is copied at every token
(`dynamic`), and a preallocated one (`static`), which is faster at long contexts. Timings alternate, so that a busy
machine slows all of them equally.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache

from trenchcoat.bench.benchmark import Benchmark, Settings, at_least, at_most, grid, listed
from trenchcoat.bench.llama import SMALL_LLAMA, random_llama
from trenchcoat.bench.timing import wait
from trenchcoat.config import FeatureMapConfig, StudentConfig, UsageError
from trenchcoat.generation.generate import PREFILL_TOKENS, Session
from trenchcoat.models import embedded
from trenchcoat.models.attach import attach_students, set_mode, set_state_dtype
from trenchcoat.models.cache import cache_nbytes, new_cache
from trenchcoat.runtime.memory import live_tensor_memory


@dataclass(frozen=True)
class DecodeSizes:
    """What is measured."""

    layers: int = 8
    window: int = 64
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    batch: int = 64
    batch_length: int = 4096
    steps: int = 128
    """Timed tokens per turn, a multiple of the window, so that folds are fully counted."""
    batch_steps: int = 64
    repeats: int = 5
    drift: tuple[int, ...] = (1024, 4096, 16384, 32768)
    prompts: tuple[int, ...] = (4096, 32768, 131072)


class Decoder:
    """A random Llama with terrace students, decoded token by token."""

    def __init__(
        self,
        sizes: DecodeSizes,
        *,
        key_maps: str = "per_query_head",
        keep: tuple[str, ...] = (),
        device: str = "cpu",
    ) -> None:
        self.sizes, self.device = sizes, device
        shape = replace(SMALL_LLAMA, window=sizes.window)
        self.model: Any = random_llama(shape, sizes.layers, device, key_maps, torch.float32, keep=keep)

    def started(self, kind: str, context: int, rows: int = 1, room: int = 0) -> Any:
        """A cache filled with `context` random tokens, the same in each row; `kind`: student, dynamic or static."""
        set_mode(self.model, "student" if kind == "student" else "teacher")
        cache: Any = new_cache(self.model)
        ids = torch.randint(SMALL_LLAMA.vocab, (1, context), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for piece in ids.to(self.device).split(PREFILL_TOKENS, 1):
                self.model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        if kind != "static":
            return cache
        static = StaticCache(config=self.model.config, max_cache_len=context + room)
        for index, layer in enumerate(cache.layers):
            static.update(layer.keys, layer.values, index)
        return static

    def steps(self, kind: str, cache: Any, rows: int, steps: int) -> list[float]:
        """Seconds for each of `steps` more tokens."""
        set_mode(self.model, "student" if kind == "student" else "teacher")
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        taken = []
        with torch.no_grad():
            for _ in range(steps):
                wait(self.device)
                began = time.perf_counter()
                self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                wait(self.device)
                taken.append(time.perf_counter() - began)
        return taken


_TimedTurn = tuple[str, int, int, Any]
"""Kind, rows, tokens to time, and a cache to start from (copied for every turn if it has one row)."""


def _turns(decoder: Decoder, plans: dict[Any, _TimedTurn], repeats: int, warm: int) -> dict[Any, dict[str, float]]:
    """Milliseconds per token of the turn with the smallest median (the least disturbed), after `warm` untimed
    tokens."""
    taken: dict[Any, list[Tensor]] = {name: [] for name in plans}
    for turn in range(repeats + 1):
        for name, (kind, rows, steps, cache) in plans.items():
            start = copy.deepcopy(cache) if rows == 1 else cache
            times = decoder.steps(kind, start, rows, steps if turn else warm)
            if turn:
                taken[name].append(1e3 * torch.tensor(times, dtype=torch.float64))
    found = {}
    for name, turns in taken.items():
        best = min(turns, key=lambda times: float(times.median()))
        p50, p99 = best.quantile(torch.tensor([0.5, 0.99]).double()).tolist()
        slowest = max(float(times.median()) for times in turns)
        mean, worst = float(best.mean()), float(best.max())
        found[name] = {"p50": p50, "p99": p99, "mean": mean, "max": worst, "slowest_p50": slowest}
    return found


def _by_context(decoder: Decoder, kinds: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Context -> kind -> milliseconds per token and bytes of the cache, one row."""
    sizes = decoder.sizes
    plans: dict[Any, _TimedTurn] = {
        (length, kind): (kind, 1, sizes.steps, decoder.started(kind, length, room=sizes.steps))
        for length, kind in itertools.product(sizes.lengths, kinds)
    }
    held = {key: cache_nbytes(cache) for key, (*_, cache) in plans.items()}
    times = _turns(decoder, plans, sizes.repeats, 8)
    found: dict[str, dict[str, dict[str, float]]] = {str(length): {} for length in sizes.lengths}
    for (length, kind), row in times.items():
        found[str(length)][kind] = {**row, "bytes": held[length, kind]}
    return found


def _kept_by_context(sizes: DecodeSizes, device: str) -> dict[str, dict[str, Any]]:
    """Context -> what is kept -> as :func:`_by_context`, for an eighth of the groups, each in a layer of its own, and
    for as many groups in whole layers, which use the library's own cache."""
    groups = SMALL_LLAMA.kv_heads
    number = max(1, sizes.layers * groups // 8)
    apart = tuple(f"{layer * sizes.layers // number}.{layer % groups}" for layer in range(number))
    whole = tuple(str(layer * groups * sizes.layers // number) for layer in range(max(1, number // groups)))
    found: dict[str, dict[str, Any]] = {}
    for name, keep in {"kept groups": apart, "kept layers": whole}.items():
        for length, kinds in _by_context(Decoder(sizes, keep=keep, device=device), ("student",)).items():
            found.setdefault(length, {})[name] = kinds["student"]
    return found


def _contexts(sizes: DecodeSizes, device: str) -> dict[str, dict[str, Any]]:
    """Context -> student, both caches of the teacher, one map a key/value head, kept groups and layers -> as
    :func:`_by_context`."""
    curves = _by_context(Decoder(sizes, device=device), ("student", "dynamic", "static"))
    shared = _by_context(Decoder(sizes, key_maps="per_kv_head", device=device), ("student",))
    kept = _kept_by_context(sizes, device)
    return {n: {**row, "per_kv_head": shared[n]["student"], **kept[n]} for n, row in curves.items()}


def _batch(sizes: DecodeSizes, device: str) -> dict[str, Any]:
    """Batches at a longer context: the student at the full batch, the teacher at the same batch and at the same
    memory."""
    decoder = Decoder(sizes, device=device)
    context, steps = sizes.batch_length, sizes.batch_steps
    student = decoder.started("student", context, sizes.batch)
    fits = max(1, cache_nbytes(student) // cache_nbytes(decoder.started("dynamic", context)))
    plans: dict[Any, _TimedTurn] = {
        "student": ("student", sizes.batch, steps, student),
        "teacher, same memory": ("dynamic", fits, steps, decoder.started("dynamic", context, fits)),
        "teacher, same batch": (
            "static", sizes.batch, max(4, steps // 8), decoder.started("static", context, sizes.batch, room=steps)
        ),
    }  # fmt: skip
    found: dict[str, Any] = {"context": context}
    for name, times in _turns(decoder, plans, min(sizes.repeats, 3), 2).items():
        _kind, rows, _steps, cache = plans[name]
        speed = 1e3 * rows / times["mean"]
        found[name] = {**times, "rows": rows, "bytes": cache_nbytes(cache), "tokens_per_second": speed}
    return found


def _embedded(device: str) -> Any:
    """The embedded teacher with untrained terrace students, for any length."""
    model: Any = LlamaForCausalLM.from_pretrained(embedded.teacher_dir(), dtype=torch.float32).eval()
    attach_students(model, StudentConfig(window=32, feature_map=FeatureMapConfig(feature_dim=64)))
    set_mode(model, "student")
    return model.to(device).requires_grad_(False)


def _drift(sizes: DecodeSizes, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """State dtype -> tokens generated -> deviation of a float32 model with such a state from a float64 model that reads
    the same tokens, sampled by the latter: mean KL divergence of the next token over the last 256 tokens (nats), the
    share of these with the same most likely token, and the error of the far sums S (relative, in norm, largest over the
    layers)."""
    models = {"float64": _embedded(device).double(), "float32": _embedded(device)}
    models["bfloat16"] = models["float32"]
    caches: dict[str, Any] = {name: new_cache(model) for name, model in models.items()}
    found: dict[str, dict[str, dict[str, float]]] = {"float32": {}, "bfloat16": {}}
    recent: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for token in range(1, max(sizes.drift) + 1):
            logits: dict[str, Tensor] = {}
            for name, model in models.items():
                set_state_dtype(model, "bfloat16" if name == "bfloat16" else "float32")
                out = model(input_ids=ids, past_key_values=caches[name], use_cache=True).logits
                logits[name] = out[0, -1].double().log_softmax(-1)
            exact = logits["float64"]
            for name, past in recent.items():
                kl = float((exact.exp() * (exact - logits[name])).sum())
                past.append((kl, float(exact.argmax() == logits[name].argmax())))
                if token in sizes.drift:
                    kl, same = (sum(column) / len(column) for column in zip(*past[-256:], strict=True))
                    error = _state_error(caches["float64"], caches[name])
                    found[name][str(token)] = {"kl": kl, "same_token": same, "state_error": error}
            ids = torch.multinomial(exact.exp().cpu(), 1, generator=generator)[None].to(device)
    return found


def _state_error(exact: Any, other: Any) -> float:
    sums = zip(*([layer.state.far_s_BKFE.double() for layer in cache.layers] for cache in (exact, other)), strict=True)
    return max(float((t - s).norm() / s.norm().clamp_min(1e-30)) for s, t in sums)


def _prompts(sizes: DecodeSizes, device: str) -> dict[str, Any]:
    """Peak live bytes and seconds of prefill with a model of the embedded teacher's size."""
    model = _embedded(device)
    found = {}
    for length in sizes.prompts:
        ids = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(2)).tolist()
        session = Session.new(model)
        began = time.perf_counter()
        with live_tensor_memory() as memory:
            session.read(ids)
        seconds = time.perf_counter() - began
        found[str(length)] = {"peak_bytes": memory.peak, "seconds": seconds, "state_bytes": session.nbytes()}
    return {"piece": PREFILL_TOKENS, "by_tokens": found}


def _over(
    kind: str, figure: str, other: str, *, at: tuple[int, int] = (-1, -1)
) -> Callable[[dict[str, Any]], float | None]:
    """The ratio of a figure of `kind` to that of `other`; `at` are the indices of their contexts."""

    def ratio(found: dict[str, Any]) -> float | None:
        """Ratio of the median times or bytes; None if contexts were not measured."""
        rows = list(found.get("milliseconds_by_context", {}).values())
        if not rows:
            return None
        return float(rows[at[0]][kind][figure] / rows[at[1]][other][figure])

    return ratio


PARTS: dict[str, tuple[str, Callable[[DecodeSizes, str], dict[str, Any]]]] = {
    "contexts": ("milliseconds_by_context", _contexts),
    "batch": ("batch", _batch),
    "drift": ("drift", _drift),
    "prompts": ("prompts", _prompts),
}
"""Name -> (field of the record, what measures it)."""


class DecodeBenchmark(Benchmark[DecodeSizes]):
    """``bench decode``."""

    implementation = "decode step"
    full = DecodeSizes()
    quick = DecodeSizes(
        layers=2, window=16, lengths=(32, 128), batch=3, batch_length=64, steps=16, batch_steps=8, repeats=1,
        drift=(64, 128), prompts=(4096, 6144),
    )  # fmt: skip
    targets = (
        at_most(
            1.1, "a token at the longest context over the shortest", _over("student", "p50", "student", at=(-1, 0))
        ),
        at_least(3.0, "times as fast as the teacher at the longest", _over("dynamic", "p50", "student")),
        at_least(4.0, "the same, an eighth of the groups kept", _over("dynamic", "p50", "kept groups")),
        at_least(20.0, "the teacher's cache over the state at the longest", _over("dynamic", "bytes", "student")),
        at_most(1.0, "a token over the teacher's at the shortest", _over("student", "p50", "dynamic", at=(0, 0))),
    )

    options = ("only",)

    def run(self, sizes: DecodeSizes, settings: Settings) -> dict[str, Any]:
        """By context, by batch, drift of the state, prompts; or those of them named in `only`."""
        unknown = [name for name in settings.only if name not in PARTS]
        if unknown:
            raise UsageError(f"bench decode --only names {unknown[0]!r}; its parts are {', '.join(PARTS)}")
        found: dict[str, Any] = {
            "model": {**asdict(SMALL_LLAMA), "layers": sizes.layers, "dtype": "float32", "window": sizes.window}
        }
        for name in settings.only or PARTS:
            field, measure = PARTS[name]
            settings.say(f"measuring {name}")
            found[field] = measure(sizes, settings.device)
            settings.keep(found)
        return found

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each context, each batch, each length of the drift and each prompt."""
        lines = [f"decoding, milliseconds per token and bytes of cache: {listed(record['model'])}"]
        contexts, batch, drift, prompts = (record.get(field) for field, _ in PARTS.values())
        if contexts:
            rows = {f"{context}, {kind}": row for context, kinds in contexts.items() for kind, row in kinds.items()}
            lines += grid("context", rows)
        if batch:
            rows = {name: row for name, row in batch.items() if name != "context"}
            lines += grid(f"context {batch['context']}, batches", rows)
        if drift:
            rows = {f"{tokens}, {dtype}": row for dtype, points in drift.items() for tokens, row in points.items()}
            lines += grid("drift after tokens, state", rows)
        if prompts:
            lines += grid(f"prompt, in chunks of {prompts['piece']}", prompts["by_tokens"])
        return lines

"""What a token costs: a linearized Llama against its softmax teacher with a KV cache, by context, batch and dtype.

The teacher is measured with both caches that Transformers offers it: the one `generate()` takes, which is copied at
every token (`dynamic`), and one allocated beforehand (`static`), the stronger rival at long contexts. All are timed in
turns, so that a busy machine slows all alike.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from trenchcoat.bench.clock import wait
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.generation.generate import PREFILL_TOKENS, Session
from trenchcoat.models import embedded
from trenchcoat.models.attach import attach_students, set_mode, set_state_dtype
from trenchcoat.models.cache import cache_nbytes
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.runtime.runlog import environment

TARGETS: dict[str, float] = {
    "flatness": 1.1,
    "speedup_long": 3.0,
    "state_ratio_long": 20.0,
    "slowdown_short": 1.3,
}
"""At most (`flatness`: time a token at the longest context over the shortest; `slowdown_short`: over the teacher's) and
at least (the other two, at the longest context)."""

_LLAMA: dict[str, Any] = {
    "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 1408, "vocab_size": 4096, "max_position_embeddings": 1 << 20,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    layers: int = 8
    window: int = 64
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    batch: int = 64
    batch_length: int = 4096
    steps: int = 128
    """Timed tokens of one turn, a multiple of the window, so that folds are counted in full."""
    batch_steps: int = 64
    repeats: int = 5
    drift: tuple[int, ...] = (1024, 4096, 16384, 32768)
    prompts: tuple[int, ...] = (4096, 32768, 131072)


QUICK = Sizes(
    layers=2, window=16, lengths=(32, 128), batch=3, batch_length=64, steps=16, batch_steps=8, repeats=1,
    drift=(64, 128), prompts=(4096, 6144),
)  # fmt: skip

Caches = dict[str, Callable[[], Any]]


class Bench:
    """A random Llama with terrace students."""

    def __init__(self, sizes: Sizes, *, key_maps: str = "per_query_head", device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.sizes, self.device = sizes, device
        self.model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=sizes.layers, **_LLAMA)).eval().to(device)
        student = StudentConfig(
            window=sizes.window,
            key_maps=key_maps,  # type: ignore[arg-type]
            feature_map=FeatureMapConfig(feature_dim=64),
        )
        attach_students(self.model, student)
        self.model.to(device).requires_grad_(False)

    def started(self, kind: str, context: int, rows: int = 1, room: int = 0) -> Any:
        """A cache that has read `context` random tokens, the same in each row; `kind`: student, dynamic or static."""
        set_mode(self.model, "student" if kind == "student" else "teacher")
        cache: Any = DynamicCache(config=self.model.config)
        ids = torch.randint(_LLAMA["vocab_size"], (1, context), generator=torch.Generator().manual_seed(1))
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
        """Seconds of each of `steps` more tokens."""
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


def _summary(taken: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of the turn with the smallest median (the least disturbed): milliseconds a token."""
    best = min(taken, key=lambda turn: float(torch.tensor(turn).median()))
    p50, p99 = (1e3 * torch.tensor(best, dtype=torch.float64).quantile(torch.tensor([0.5, 0.99]).double())).tolist()
    turns = [1e3 * float(torch.tensor(turn).median()) for turn in taken]
    mean, worst = 1e3 * sum(best) / len(best), 1e3 * max(best)
    return {"p50": p50, "p99": p99, "mean": mean, "max": worst, "slowest_p50": max(turns)}


def _by_context(bench: Bench, kinds: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Context -> kind -> milliseconds a token and bytes of the cache, one row."""
    sizes, found = bench.sizes, {}
    caches = {(n, kind): bench.started(kind, n, room=sizes.steps) for n in sizes.lengths for kind in kinds}
    held = {key: cache_nbytes(cache) for key, cache in caches.items()}
    taken: dict[tuple[int, str], list[list[float]]] = {key: [] for key in caches}
    for turn in range(sizes.repeats + 1):
        for (length, kind), cache in caches.items():
            times = bench.steps(kind, copy.deepcopy(cache), 1, sizes.steps if turn else 8)
            if turn:
                taken[length, kind].append(times)
    for length in sizes.lengths:
        found[str(length)] = {
            kind: {**_summary(taken[length, kind]), "bytes": float(held[length, kind])} for kind in kinds
        }
    return found


def _batch(bench: Bench) -> dict[str, Any]:
    """Rows at a longer context: the student at the full batch, the teacher at it and at what fits that memory."""
    sizes, found = bench.sizes, {}
    context, steps = sizes.batch_length, sizes.batch_steps
    student = bench.started("student", context, sizes.batch)
    state = cache_nbytes(student)
    row = cache_nbytes(bench.started("dynamic", context))
    fits = max(1, state // row)
    plans = {"student": (sizes.batch, student)}
    plans["teacher, same memory"] = (fits, bench.started("dynamic", context, fits))
    plans["teacher, same batch"] = (sizes.batch, bench.started("static", context, sizes.batch, room=steps))
    kinds = {"student": "student", "teacher, same memory": "dynamic", "teacher, same batch": "static"}
    steps_of = dict.fromkeys(plans, steps) | {"teacher, same batch": max(4, steps // 8)}
    taken: dict[str, list[list[float]]] = {name: [] for name in plans}
    for turn in range(min(sizes.repeats, 3) + 1):
        for name, (rows, cache) in plans.items():
            times = bench.steps(kinds[name], cache, rows, steps_of[name] if turn else 2)
            if turn:
                taken[name].append(times)
    for name, (rows, cache) in plans.items():
        figures = _summary(taken[name])
        found[name] = {
            **figures, "rows": rows, "bytes": cache_nbytes(cache), "tokens_per_second": 1e3 * rows / figures["mean"],
        }  # fmt: skip
    return {"context": context, **found}


def _embedded(device: str) -> Any:
    """The embedded teacher with untrained terrace students, for any length."""
    model: Any = LlamaForCausalLM.from_pretrained(embedded.teacher_dir(), dtype=torch.float32).eval()
    attach_students(model, StudentConfig(window=32, feature_map=FeatureMapConfig(feature_dim=64)))
    set_mode(model, "student")
    return model.to(device).requires_grad_(False)


def _drift(sizes: Sizes, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """State dtype -> tokens generated -> how far a model in float32 with such a state is from one in float64 that reads
    the same tokens, which the latter samples: mean Kullback-Leibler divergence of the next token over the last 256
    tokens (nats), the share of these with the same likeliest token, and the error of the far sums S (relative, in norm,
    largest of the layers)."""
    models = {"float64": _embedded(device).double(), "float32": _embedded(device)}
    models["bfloat16"] = models["float32"]
    caches: dict[str, Any] = {name: DynamicCache(config=model.config) for name, model in models.items()}
    found: dict[str, dict[str, dict[str, float]]] = {"float32": {}, "bfloat16": {}}
    recent: dict[str, list[tuple[float, bool]]] = {name: [] for name in found}
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
                past.append((kl, bool(exact.argmax() == logits[name].argmax())))
                del past[:-256]
                if token in sizes.drift:
                    found[name][str(token)] = {
                        "kl": sum(kl for kl, _ in past) / len(past),
                        "same_token": sum(same for _, same in past) / len(past),
                        "state_error": _state_error(caches["float64"], caches[name]),
                    }
            ids = torch.multinomial(exact.exp().cpu(), 1, generator=generator)[None].to(device)
    return found


def _state_error(exact: Any, other: Any) -> float:
    errors = []
    for a, b in zip(exact.layers, other.layers, strict=True):
        s, t = a.state.far_s_BKFE, b.state.far_s_BKFE.double()
        errors.append(float((t - s).norm() / s.norm().clamp_min(1e-30)))
    return max(errors)


def _prompts(sizes: Sizes, device: str) -> dict[str, Any]:
    """Peak live bytes and seconds of reading prompts with a model of the embedded teacher's size."""
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


def measure(
    *, threads: int | None = None, quick: bool = False, repeats: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Run every measurement; JSON-ready. ``quick``: small sizes, a check that it runs."""
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = QUICK if quick else Sizes()
    sizes = sizes if repeats is None else replace(sizes, repeats=repeats)
    bench = Bench(sizes, device=device)
    curves = _by_context(bench, ("student", "dynamic", "static"))
    shared = _by_context(Bench(sizes, key_maps="per_kv_head", device=device), ("student",))
    first, last = (curves[str(length)] for length in (sizes.lengths[0], sizes.lengths[-1]))
    return {
        "benchmark": "decode",
        "model": {**_LLAMA, "layers": sizes.layers, "dtype": "float32", "window": sizes.window, "feature_dim": 64},
        "milliseconds_by_context": curves,
        "per_kv_head": shared,
        "flatness": last["student"]["p50"] / first["student"]["p50"],
        "speedup_long": last["dynamic"]["p50"] / last["student"]["p50"],
        "speedup_long_static": last["static"]["p50"] / last["student"]["p50"],
        "state_ratio_long": last["dynamic"]["bytes"] / last["student"]["bytes"],
        "slowdown_short": first["student"]["p50"] / first["dynamic"]["p50"],
        "spike": last["student"]["p99"] / last["student"]["p50"],
        "batch": _batch(bench),
        "drift": _drift(sizes, device),
        "prompts": _prompts(sizes, device),
        "targets": None if quick else TARGETS,
        "environment": environment(implementation="decode step", device=device),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    model, batch = result["model"], result["batch"]
    lines = [
        f"Decoding, Llama of {model['layers']} layers, hidden {model['hidden_size']}, window {model['window']}, "
        f"float32, {result['environment']['threads']} threads; milliseconds a token (p50, p99) and MiB of state",
        f"{'context':>8} {'student':>22} {'per_kv_head':>22} {'teacher, dynamic':>22} {'teacher, static':>22}",
    ]
    for context, row in result["milliseconds_by_context"].items():
        kinds = (row["student"], result["per_kv_head"][context]["student"], row["dynamic"], row["static"])
        cells = [f"{one['p50']:>7.2f} {one['p99']:>7.2f} {one['bytes'] / 2**20:>6.1f}" for one in kinds]
        lines.append(f"{context:>8} " + " ".join(cells))
    lines += [
        f"longest context over shortest: {result['flatness']:.2f}x" + _target(result, "flatness", "<="),
        f"against the teacher at the longest: {result['speedup_long']:.1f}x faster"
        + _target(result, "speedup_long", ">=")
        + f", with a static cache {result['speedup_long_static']:.1f}x; state {result['state_ratio_long']:.0f}x smaller"
        + _target(result, "state_ratio_long", ">="),
        f"at the shortest: {result['slowdown_short']:.2f}x the teacher's" + _target(result, "slowdown_short", "<="),
        f"p99 over p50 at the longest (folds included): {result['spike']:.2f}x",
        f"batches at context {batch['context']}:",
    ]
    for name, row in batch.items():
        if name != "context":
            lines.append(
                f"  {name:<22} {row['rows']:>3} rows {row['bytes'] / 2**20:>8.1f} MiB {row['tokens_per_second']:>8.1f} "
                f"tokens/s, p50 {row['p50']:.1f} ms, p99 {row['p99']:.1f} ms"
            )
    for dtype, points in result["drift"].items():
        for tokens, one in points.items():
            lines.append(
                f"drift of a {dtype} state after {tokens} tokens: KL {one['kl']:.2e} nats, same likeliest token "
                f"{100 * one['same_token']:.1f} %, error of S {one['state_error']:.1e}"
            )
    for tokens, one in result["prompts"]["by_tokens"].items():
        lines.append(
            f"prompt of {tokens} tokens (embedded teacher's size, in pieces of {result['prompts']['piece']}): peak "
            f"{one['peak_bytes'] / 2**20:.1f} MiB, {one['seconds']:.1f} s"
        )
    return "\n".join(lines)


def _target(result: dict[str, Any], name: str, sign: str) -> str:
    return "" if result["targets"] is None else f" (target {sign} {result['targets'][name]:g})"

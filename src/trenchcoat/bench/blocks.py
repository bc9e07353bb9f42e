"""Blockwise transfer against the joint run: memory of the process and throughput, on a random model of 2 GB.

Each run is a process of its own, because what a process has held at most cannot be taken back. The bound on memory is
that of the design: weights of two blocks (one at work, one being read), the pass's hidden states (inputs and outputs),
students with gradient and optimizer, and a fixed allowance for the interpreter, the libraries and activations.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trenchcoat.config import Recipe
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.linearize.blocks import stages as blockstages
from trenchcoat.linearize.variants import open_variants
from trenchcoat.models.embedded import teacher_dir
from trenchcoat.runtime.runfolder import TRANSFER
from trenchcoat.runtime.runlog import environment

TARGETS = {"throughput_ratio": 0.9, "memory_over_bound": 1.0}
ALLOWANCE = 400e6
"""Bytes beside weights, hidden states and students."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    hidden: int = 1408
    mlp: int = 3840
    heads: int = 22
    kv_heads: int = 2
    layers: int = 24
    seq_len: int = 512
    steps: int = 6
    accumulation: int = 4
    blocks: tuple[int, ...] = (1, 4)


QUICK = Sizes(hidden=128, mlp=256, heads=4, layers=4, seq_len=64, steps=2, blocks=(1, 2))


def _write_model(folder: Path, sizes: Sizes) -> float:
    """A random Llama in float32 with the embedded model's tokenizer; bytes of its layers."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    return 4.0 * sum(p.numel() for p in model.model.layers.parameters())


def _overrides(folder: Path, run: str, sizes: Sizes, *more: str) -> list[str]:
    return [
        f"model.path={folder / 'model'}", "model.device=cpu", "data.path=embedded", f"data.seq_len={sizes.seq_len}",
        f"student.window={min(64, sizes.seq_len // 4)}", "student.mix_init=0.1",
        "student.feature_map.name=hedgehog", "student.feature_map.feature_dim=64", "student.feature_map.init=identity",
        f"transfer.max_steps={sizes.steps}", f"transfer.accumulation={sizes.accumulation}", "transfer.eval_batches=1",
        "transfer.eval_every=1000", "transfer.save_every=1000", "transfer.schedule=constant",
        "run.progress=off", f"run.dir={folder / run}", *more,
    ]  # fmt: skip


def _held() -> int:
    """Bytes of memory that this process has held at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _measured(found: dict[str, float]) -> Iterator[None]:
    found["held_before"] = _held()
    began, processor = time.perf_counter(), time.process_time()
    yield
    found |= {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor}
    found["held"] = _held()


def child(kind: str, overrides: list[str]) -> dict[str, float]:
    """One run, in the process that calls it."""
    recipe: Recipe = load_recipe("demo", overrides)
    found: dict[str, float] = {}
    with _measured(found):
        if kind == "joint":
            with open_variants(recipe, [TRANSFER]) as variants:
                variants.train(TRANSFER)
        else:
            with blockstages.open_blocks(recipe) as work:
                blockstages.stream_blocks(work)
    return found


def _in_a_process(kind: str, overrides: list[str], threads: int) -> dict[str, float]:
    code = "import json, sys; from trenchcoat.bench.blocks import child; "
    code += "print(json.dumps(child(sys.argv[1], json.loads(sys.argv[2]))))"
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", code, kind, json.dumps(overrides)], env=variables, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the {kind} run failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(
    *, threads: int | None = None, quick: bool = False, repeats: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Run everything ``repeats`` times (1), joint and block-wise in turn; the quickest of each counts. JSON-ready."""
    if device != "cpu":
        raise ValueError(f"device={device!r}: this benchmark reads the memory of the host's process; use --device cpu")
    sizes, count = QUICK if quick else Sizes(), threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = _write_model(folder / "model", sizes)
        ways = {"joint": ("joint", ())} | {
            f"blocks of {k}": ("blocks", (f"blocks.size={k}", "blocks.pass_tokens=all", "blocks.hidden=memory"))
            for k in sizes.blocks
        }
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for turn in range(repeats or 1):
            for way, (kind, more) in ways.items():
                runs[way].append(_in_a_process(kind, _overrides(folder, f"{way}-{turn}", sizes, *more), count))
    best = {way: min(found, key=lambda one: one["seconds"]) for way, found in runs.items()}
    tokens = sizes.steps * sizes.accumulation * sizes.seq_len
    states = 2.0 * 4 * sizes.hidden * (tokens + sizes.seq_len)
    students = 4.0 * 4 * sizes.heads * 2 * (sizes.hidden // sizes.heads) * 64 * sizes.layers
    bound = {f"blocks of {k}": 2 * k * weights / sizes.layers + states + students + ALLOWANCE for k in sizes.blocks}
    return {
        "benchmark": "blocks",
        "model": {"layers": sizes.layers, "hidden": sizes.hidden, "dtype": "float32", "layer_bytes": weights},
        "tokens": tokens,
        "states_bytes": states,
        "runs": best,
        "bound_bytes": bound,
        "memory_over_bound": {way: best[way]["held"] / bytes_ for way, bytes_ in bound.items()},
        "throughput_ratio": {way: best["joint"]["seconds"] / best[way]["seconds"] for way in bound},
        "processor_ratio": {way: best["joint"]["processor_seconds"] / best[way]["processor_seconds"] for way in bound},
        "targets": None if quick else TARGETS,
        "environment": environment(implementation="chunkwise", threads=count),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    model = result["model"]
    lines = [
        f"Attention transfer, {model['layers']} layers of {model['layer_bytes'] / model['layers'] / 1e6:.0f} MB, "
        f"{result['tokens']} tokens, {result['environment']['threads']} threads",
        f"{'':14} {'seconds':>8} {'CPU s':>8} {'peak MB':>8} {'bound MB':>9} {'held/bound':>11} {'throughput':>11}",
    ]
    for way, run in result["runs"].items():
        bound = result["bound_bytes"].get(way)
        limits = "" if bound is None else (
            f" {bound / 1e6:>9.0f} {result['memory_over_bound'][way]:>11.2f} {result['throughput_ratio'][way]:>10.2f}x"
        )  # fmt: skip
        lines.append(
            f"{way:14} {run['seconds']:>8.1f} {run['processor_seconds']:>8.1f} {run['held'] / 1e6:>8.0f}{limits}"
        )
    started = result["runs"]["joint"]["held_before"] / 1e6
    lines.append(f"of each peak, {started:.0f} MB were there before the run began (interpreter and libraries)")
    return "\n".join(lines)

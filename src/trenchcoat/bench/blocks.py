"""Blockwise transfer against the joint run: memory of the process and throughput, on a random model of 2 GB.

Each run is a separate process, because a process's peak memory cannot be reset. The bound on memory is that of the
design: weights of two blocks (one in use, one being read), the pass's hidden states (inputs and outputs), students with
gradients and optimizer state, and a fixed allowance for the interpreter, the libraries and activations.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from trenchcoat.bench.benchmark import Benchmark, Settings, at_least, at_most, grid, listed
from trenchcoat.bench.llama import LlamaShape
from trenchcoat.config import Recipe
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.variants import open_variants
from trenchcoat.models.embedded import teacher_dir
from trenchcoat.runtime.runfolder import TRANSFER

ALLOWANCE = 400e6
"""Bytes besides weights, hidden states and students."""


LLAMA_2GB = LlamaShape(heads=22, kv_heads=2, dim=64, hidden=1408, inner=3840)


@dataclass(frozen=True)
class BlocksSizes:
    """What is measured."""

    shape: LlamaShape = LLAMA_2GB
    layers: int = 24
    seq_len: int = 512
    steps: int = 6
    accumulation: int = 4
    blocks: tuple[int, ...] = (1, 4)
    repeats: int = 1
    """The fastest run counts."""


def _write_model(folder: Path, sizes: BlocksSizes) -> float:
    """Write a random Llama in float32 with the embedded model's tokenizer; returns the bytes of its layers."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir())
    shape = replace(sizes.shape, vocab=len(tokenizer))
    model = LlamaForCausalLM(shape.config(sizes.layers, max_position_embeddings=4096, tie_word_embeddings=True))
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    return 4.0 * sum(p.numel() for p in model.model.layers.parameters())


def _overrides(folder: Path, run: str, sizes: BlocksSizes, *more: str) -> list[str]:
    return [
        f"model.path={folder / 'model'}", "model.device=cpu", "data.path=embedded", f"data.seq_len={sizes.seq_len}",
        f"student.window={min(64, sizes.seq_len // 4)}", "student.mix_init=0.1", "student.keep=none", "student.sinks=0",
        "student.feature_map.name=hedgehog", "student.feature_map.feature_dim=64", "student.feature_map.init=identity",
        f"transfer.max_steps={sizes.steps}", f"transfer.accumulation={sizes.accumulation}", "transfer.eval_batches=1",
        "transfer.eval_every=1000", "transfer.save_every=1000", "transfer.schedule=constant",
        "run.progress=off", f"run.dir={folder / run}", *more,
    ]  # fmt: skip


def _held() -> int:
    """Peak memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(kind: str, overrides: list[str], threads: int) -> dict[str, float]:
    """One run, in the calling process."""
    torch.set_num_threads(threads)
    recipe: Recipe = load_recipe("demo", overrides)
    before, began, processor = _held(), time.perf_counter(), time.process_time()
    if kind == "joint":
        with open_variants(recipe, [TRANSFER]) as variants:
            variants.train(TRANSFER)
    else:
        with blockstages.open_blocks(recipe) as work:
            blockstages.stream_blocks(work)
    taken = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor}
    return {"held_before": before, **taken, "held": _held()}


def _in_a_process(kind: str, overrides: list[str]) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(child, kind, overrides, torch.get_num_threads()).result()


def _worst(choose: Callable[..., float], name: str) -> Callable[[dict[str, Any]], float]:
    return lambda found: choose(run[name] for run in found["runs"].values() if name in run)


class BlocksBenchmark(Benchmark[BlocksSizes]):
    """``bench blocks``."""

    full = BlocksSizes()
    quick = BlocksSizes(
        LlamaShape(heads=4, kv_heads=2, dim=32, hidden=128, inner=256), layers=4, seq_len=64, steps=2, blocks=(1, 2)
    )
    only_on = "cpu"  # it reads the memory of the process
    targets = (
        at_least(0.9, "throughput of the slowest over the joint run", _worst(min, "throughput_ratio")),
        at_most(1.0, "largest memory over its bound", _worst(max, "memory_over_bound")),
    )

    def run(self, sizes: BlocksSizes, settings: Settings) -> dict[str, Any]:
        """Joint and block-wise runs in turn, each `repeats` times."""
        ways = {"joint": ("joint", ())} | {
            f"blocks of {k}": ("blocks", (f"blocks.size={k}", "blocks.pass_tokens=all", "blocks.hidden=memory"))
            for k in sizes.blocks
        }
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            weights = _write_model(folder / "model", sizes)
            for turn in range(sizes.repeats):
                for way, (kind, more) in ways.items():
                    runs[way].append(_in_a_process(kind, _overrides(folder, f"{way}-{turn}", sizes, *more)))
        best = {way: min(found, key=lambda one: one["seconds"]) for way, found in runs.items()}
        tokens = sizes.steps * sizes.accumulation * sizes.seq_len
        states = 2.0 * 4 * sizes.shape.hidden * (tokens + sizes.seq_len)
        students = 4.0 * 4 * sizes.shape.heads * 2 * sizes.shape.dim * 64 * sizes.layers
        for k in sizes.blocks:
            run, bound = best[f"blocks of {k}"], 2 * k * weights / sizes.layers + states + students + ALLOWANCE
            run |= {"bound_bytes": bound, "memory_over_bound": run["held"] / bound}
            run["throughput_ratio"] = best["joint"]["seconds"] / run["seconds"]
        model = {"layers": sizes.layers, "hidden": sizes.shape.hidden, "dtype": "float32", "layer_bytes": weights}
        return {"model": model, "tokens": tokens, "states_bytes": states, "runs": best}

    def table(self, record: dict[str, Any]) -> list[str]:
        """A row for each run."""
        return [
            f"attention transfer, {record['tokens']} tokens: {listed(record['model'])}",
            "held: peak bytes of the process; held_before: those of the interpreter and libraries before the run",
            *grid("", record["runs"]),
        ]

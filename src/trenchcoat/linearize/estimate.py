"""How long a run will take on this machine, from one timed forward pass of the teacher."""

from __future__ import annotations

import math
import time

import torch

from trenchcoat.config import LoraConfig, StageConfig
from trenchcoat.data.batches import Batches
from trenchcoat.linearize.variants import ModelVariants
from trenchcoat.runtime import distributed
from trenchcoat.runtime.runfolder import TRANSFER
from trenchcoat.runtime.sharding import compute_device

TRANSFER_COST, LORA_COST, SCORING_COST = 1.6, 3.5, 1.2
"""Time per token of a training step (and of scoring) in teacher forward passes; measured on the demo, on two cores."""


def stage_tokens(cfg: StageConfig, batches: Batches, seq_len: int) -> tuple[int, int]:
    """(tokens trained, tokens evaluated) by a whole stage."""
    micro = cfg.max_steps * cfg.accumulation if cfg.max_steps is not None else math.ceil(cfg.epochs * len(batches))
    evaluations = 1 + math.ceil(micro / cfg.accumulation / cfg.eval_every)
    rows = batches.rows("validation")
    if cfg.eval_batches is not None:
        rows = min(rows, cfg.eval_batches * cfg.batch_size)
    return micro * cfg.batch_size * seq_len, evaluations * rows * seq_len


def seconds_per_token(variants: ModelVariants, batches: Batches, repeats: int = 2) -> float:
    """Time of a teacher forward pass, per token; the fastest of ``repeats`` after one to warm up."""
    model = variants.assemble_teacher()
    device = compute_device(model)
    ids = batches.train_batch(0)["input_ids"].to(device)
    times = []
    with torch.no_grad():
        for _ in range(1 + repeats):
            began = time.perf_counter()
            logits = model(input_ids=ids, use_cache=False).logits
            float(logits[0, -1, 0])  # waits for the device
            times.append(time.perf_counter() - began)
    return distributed.largest(min(times[1:])) / ids.numel() / distributed.size()


def estimate(variants: ModelVariants, stages: list[str], rows: int) -> float:
    """Seconds that the unfinished ``stages`` and the scoring of ``rows`` rows of the table will take, roughly."""
    recipe = variants.recipe
    left = [stage for stage in stages if variants.folder.result(stage) is None]
    seq_len = recipe.data.seq_len
    total, unit = 0.0, 0.0
    for stage in left:
        cfg = recipe.transfer if stage == TRANSFER else recipe.lora
        if cfg is None:
            continue
        batches = variants.batches(cfg.batch_size)
        unit = unit or seconds_per_token(variants, batches)
        trained, evaluated = stage_tokens(cfg, batches, seq_len)
        total += unit * (trained * (LORA_COST if isinstance(cfg, LoraConfig) else TRANSFER_COST) + evaluated * 1.5)
    return total + unit * SCORING_COST * rows * recipe.eval.rows * (recipe.eval.seq_len or seq_len)

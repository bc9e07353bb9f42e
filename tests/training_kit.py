"""A tiny model, tiny random data and a small training run, shared by the training tests and ``resume_worker.py``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trenchcoat.config import FeatureMapConfig, LoraConfig, StageConfig, StudentConfig, TransferConfig
from trenchcoat.models.attach import attach_students, freeze_for_transfer, set_mode
from trenchcoat.models.hub import adapter_state
from trenchcoat.models.identity import fingerprint
from trenchcoat.models.lora import add_lora
from trenchcoat.runtime.runlog import RunLog, read_metrics
from trenchcoat.training.loop import FitOptions, FitResult, fit
from trenchcoat.training.objectives import Objective, next_token_objective, transfer_objective

VOCABULARY = 61
STUDENT = StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=8))


def tiny_llama(*, layers: int = 2, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama: hidden 32, 4 query and 2 key/value heads of 8."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


class RandomBatches:
    """Random tokens, deterministic by index; the second row of every batch ends in padding."""

    fingerprint = "random tokens"

    def __init__(self, *, epoch: int = 8, rows: int = 2, tokens: int = 24, delay: float = 0.0) -> None:
        self.epoch, self.rows, self.tokens, self.delay = epoch, rows, tokens, delay
        self.served: list[int] = []

    def __len__(self) -> int:
        return self.epoch

    def _make(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (self.rows, self.tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, -3:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def train_batch(self, index: int) -> dict[str, Tensor]:
        """Micro-batch ``index`` over epochs."""
        self.served.append(index)
        time.sleep(self.delay)
        return self._make(index % self.epoch)

    def validation_batches(self) -> int:
        """Two."""
        return 2

    def validation_batch(self, index: int) -> dict[str, Tensor]:
        """One of the two."""
        return self._make(10_000 + index)


def transfer_model(*, layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """The tiny Llama with students, in transfer mode, students trainable."""
    model = tiny_llama(layers=layers, **changes)
    torch.manual_seed(1)
    attach_students(model, STUDENT)
    freeze_for_transfer(model)
    set_mode(model, "transfer")
    return model


def transfer_settings(**changes: Any) -> TransferConfig:
    """Twelve steps of two micro-batches, evaluated and saved every four steps."""
    settings: dict[str, Any] = {
        "max_steps": 12, "batch_size": 2, "accumulation": 2, "eval_every": 4, "save_every": 4, "plateau_patience": 0,
    }  # fmt: skip
    return TransferConfig(**{**settings, **changes})


def lora_settings(**changes: Any) -> LoraConfig:
    """The same for stage 2, with dropout, so that the random state matters."""
    settings: dict[str, Any] = {
        "max_steps": 12, "batch_size": 2, "accumulation": 2, "eval_every": 4, "save_every": 4, "lr": 1e-2, "rank": 2,
        "dropout": 0.2, "schedule": "cosine", "warmup_steps": 2,
    }  # fmt: skip
    return LoraConfig(**{**settings, **changes})


def fit_transfer(
    model: nn.Module,
    run_dir: Path,
    cfg: TransferConfig,
    batches: RandomBatches,
    *,
    objective: Objective | None = None,
    until: int | None = None,
) -> FitResult:
    """Stage 1 in ``run_dir``."""
    with RunLog(run_dir, progress="off") as run:
        options = FitOptions(base=fingerprint(model), until=until)
        return fit(model, batches, objective or transfer_objective(cfg), cfg, run, stage="transfer", options=options)


def start_lora(model: nn.Module, cfg: LoraConfig) -> None:
    """The model in student mode with LoRA."""
    set_mode(model, "student")
    add_lora(model, cfg)


def fit_lora(model: nn.Module, run_dir: Path, cfg: StageConfig, batches: RandomBatches) -> FitResult:
    """Stage 2 in ``run_dir``."""
    with RunLog(run_dir, progress="off") as run:
        options = FitOptions(base=fingerprint(model))
        return fit(model, batches, next_token_objective(), cfg, run, stage="lora", options=options)


def two_stages(run_dir: Path, *, delay: float = 0.0) -> dict[str, Any]:
    """Run or resume both stages in ``run_dir``; returns ``{"stopped": bool, "weights": {name: values}}``."""
    batches = RandomBatches(delay=delay)
    model = transfer_model()
    first = fit_transfer(model, run_dir, transfer_settings(), batches)
    if first.stopped:
        return {"stopped": True}
    cfg = lora_settings()
    start_lora(model, cfg)
    second = fit_lora(model, run_dir, cfg, batches)
    weights = {name: p.detach().flatten().tolist() for name, p in adapter_state(model).items()}
    return {"stopped": second.stopped, "weights": weights, "best": [first.best_loss, second.best_loss]}


def numbers_of(run_dir: Path) -> list[dict[str, Any]]:
    """The log's train and eval lines without times."""
    clocks = ("time", "seconds")
    return [
        {key: value for key, value in line.items() if key not in clocks and not key.startswith("speed/")}
        for line in read_metrics(run_dir)
        if line["kind"] in ("train", "eval")
    ]


def damage(path: Path) -> None:
    """Flip the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)

"""Whole models on the Triton kernels: logits, a transfer run and greedy decoding match the chunkwise implementation.

A tiny Llama in the interpreter (compiled on a GPU); with a GPU also four layers of 8B widths.

Budgets come from the other implementation: the exact result is the same model in float64 (float32 for training runs and
for the large model, where rounding to bfloat16 is far coarser), and the chunkwise run in bfloat16 shows the error of
that dtype. Every product, norm and sum of the model rounds the same way in both runs; the kernels also round features,
weights and dnum, a few roundings among the dozen of a layer, so twice that error (root mean square) is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_kit import DEVICE
from trenchcoat.bench.llama import LlamaShape, random_llama
from trenchcoat.config import TransferConfig
from trenchcoat.models.attach import freeze_for_transfer, set_mode, students_of
from trenchcoat.ops.triton import check
from trenchcoat.runtime.runlog import RunLog, read_metrics
from trenchcoat.training.loop import fit
from trenchcoat.training.objectives import transfer_objective

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
ALLOWED = 2.0


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its run."""

    shape: LlamaShape
    layers: int
    tokens: int
    rows: int
    steps: int
    exact: torch.dtype

    def model(self, impl: str, dtype: torch.dtype) -> Any:
        """The random Llama of this size; the same bfloat16 weights in any dtype."""
        shape = LlamaShape(**{**self.shape.__dict__, "impl": impl})
        model = random_llama(shape, self.layers, DEVICE)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dtype == torch.bfloat16 and parameter.ndim == 2:
                    parameter.mul_(self.spread)
        return model if dtype == torch.bfloat16 else model.to(dtype)

    @property
    def spread(self) -> float:
        """Factor on the weights that gives queries, keys and values of about unit size at any width."""
        return max(1.0, 50.0 * self.shape.hidden**-0.5)

    def ids(self, seed: int, times: int = 1) -> Tensor:
        """Random tokens [rows, times * tokens]."""
        make = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.shape.vocab, (self.rows, times * self.tokens), generator=make)


TINY = Size(
    LlamaShape(hidden=16, heads=2, kv_heads=1, dim=8, inner=24, vocab=31, window=3, columns=4),
    layers=2, tokens=9, rows=1, steps=6, exact=torch.float64,
)  # fmt: skip
LARGE = Size(LlamaShape(), layers=4, tokens=1024, rows=2, steps=50, exact=torch.float32)
SIZES = [pytest.param(TINY, id="tiny"), pytest.param(LARGE, id="8B widths", marks=NEEDS_GPU)]


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # the self-check takes seconds in the interpreter and has its own test
        monkeypatch.setattr(check, "check", lambda device: None)


def _logits(size: Size, impl: str, dtype: torch.dtype) -> Tensor:
    model = size.model(impl, dtype)
    set_mode(model, "student")
    with torch.no_grad():
        return model(input_ids=size.ids(0, times=4).to(DEVICE), use_cache=False).logits.double()


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("size", SIZES)
def test_logits(size: Size) -> None:
    exact = _logits(size, "chunkwise", size.exact)
    budget = ALLOWED * _rms(_logits(size, "chunkwise", torch.bfloat16) - exact)
    assert 0 < budget < 0.1 * _rms(exact)
    assert _rms(_logits(size, "triton", torch.bfloat16) - exact) <= budget


class _Batches:
    """Random tokens by index; the second of two rows ends in padding."""

    fingerprint = "random tokens"

    def __init__(self, size: Size) -> None:
        self.size = size

    def __len__(self) -> int:
        return 4

    def train_batch(self, index: int) -> dict[str, Tensor]:
        ids = self.size.ids(index % 4)
        mask = torch.ones_like(ids)
        mask[1:, -3:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def validation_batches(self) -> int:
        return 1

    def validation_batch(self, index: int) -> dict[str, Tensor]:
        return self.train_batch(3)


def _curve(size: Size, impl: str, dtype: torch.dtype, folder: Path) -> Tensor:
    """Losses of a stage 1 run, one row per step, one column per layer."""
    model = size.model(impl, dtype)
    for student in students_of(model).values():
        student.float()
    freeze_for_transfer(model)
    set_mode(model, "transfer")
    cfg = TransferConfig(max_steps=size.steps, accumulation=1, eval_every=size.steps, save_every=size.steps, lr=1e-2)
    with RunLog(folder, progress="off") as run:
        fit(model, _Batches(size), transfer_objective(cfg), cfg, run, stage="transfer")
    lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
    assert len(lines) == size.steps
    names = sorted(name for name in lines[0] if name.startswith("loss/layer_"))
    assert len(names) == size.layers
    return torch.tensor([[line[name] for name in names] for line in lines], dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_a_transfer_run_has_the_same_losses(size: Size, tmp_path: Path) -> None:
    runs = [("chunkwise", torch.float32), ("chunkwise", torch.bfloat16), ("triton", torch.bfloat16)]
    exact, independent, found = (_curve(size, *run, tmp_path / str(i)) for i, run in enumerate(runs))
    assert exact[-4:].mean() < exact[:4].mean(), "the run did not learn, so it shows nothing"
    budget = ALLOWED * _rms(independent / exact - 1)
    assert 0 < budget < 0.1
    assert _rms(found / exact - 1) <= budget


def test_greedy_tokens() -> None:
    """In float32, for more than two windows, so that keys become far during generation."""
    found = {}
    ids = torch.cat([TINY.ids(0), TINY.ids(1)])[:, :5].to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for impl in ("chunkwise", "triton"):
        model = TINY.model(impl, torch.float32)
        set_mode(model, "student")
        found[impl] = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    assert torch.equal(found["triton"], found["chunkwise"])
    assert len(found["triton"][0].unique()) > 3

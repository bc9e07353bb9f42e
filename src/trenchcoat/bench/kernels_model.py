"""Whole-model figures on a GPU: an 8B-shaped Llama with students on the kernels, against itself with softmax attention.

Llama 3.1 8B's widths, random bfloat16 weights created on the device. Prefill is measured on a few layers (time is
proportional to their number; the vocabulary head runs on the last token only), training steps on all 32 with gradient
checkpointing in stage 2, as in the shipped recipe. Softmax attention is PyTorch's, with its default backend.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trenchcoat.bench.benchmark import Target, at_least, at_most
from trenchcoat.bench.kernel_part import KernelPart, Measurement
from trenchcoat.bench.layer import Layer
from trenchcoat.bench.llama import LLAMA_8B, TINY_LLAMA, TOY_LLAMA, LlamaShape, TimedTrainingStep, random_llama
from trenchcoat.bench.timing import Ceilings, Timer
from trenchcoat.bench.transfer import TransferStep
from trenchcoat.config import LoraConfig
from trenchcoat.models.attach import set_mode
from trenchcoat.models.cache import new_cache
from trenchcoat.models.lora import add_lora
from trenchcoat.students import Mode
from trenchcoat.training.objectives import next_token_objective


@dataclass(frozen=True)
class ModelSizes:
    """What is measured."""

    shape: LlamaShape = LLAMA_8B
    prefill_layers: int = 4
    step_layers: int = 32
    transfer: tuple[int, int] = (8, 1024)
    """(rows, tokens) of the stage 1 step."""
    steps: tuple[tuple[int, int], ...] = ((8, 1024), (1, 8192))
    """(rows, tokens) of the stage 2 steps."""
    prompts: tuple[int, ...] = (8192, 32768, 131072)


def _compared(name: str, other: float, ours: float, **sizes: int) -> dict[str, Any]:
    """A measurement against `name`; `ratio` is our time over the other's."""
    return {**sizes, name: other, "ours": ours, "ratio": ours / other}


def _layer(sizes: ModelSizes, timer: Timer) -> dict[str, Any]:
    """Transfer of one layer (y_hat, loss, gradients) against that layer's softmax attention with its projections."""
    shape, (rows, tokens) = sizes.shape, sizes.transfer
    model = random_llama(shape, 1, timer.device)
    hidden = torch.randn(rows, tokens, shape.hidden, device=timer.device, dtype=torch.bfloat16)
    place = torch.arange(tokens, device=timer.device)[None]
    rotation = model.model.rotary_emb(hidden, place)
    attend = partial(model.model.layers[0].self_attn, hidden, position_embeddings=rotation, attention_mask=None)
    learn = Layer(shape, shape.impl, tokens, timer.device, rows).transfer
    with torch.no_grad():
        return _compared("teacher", timer(attend), timer(learn), rows=rows, tokens=tokens)


def _transfer(sizes: ModelSizes, timer: Timer) -> dict[str, Any]:
    """A stage 1 step (losses, gradients, clipping, AdamW) against the plain teacher's forward, both without the
    head."""
    rows, tokens = sizes.transfer
    work = TransferStep(random_llama(sizes.shape, sizes.step_layers, timer.device), tokens, rows=rows)
    return _compared(
        "teacher", timer(work.teacher), timer(work.step), rows=rows, tokens=tokens, layers=sizes.step_layers
    )


class LoraStep(TimedTrainingStep):
    """A stage 2 step of a model: next-token loss, gradients of LoRA, clipping, AdamW; students or softmax attention."""

    def __init__(self, model: Any, rows: int, tokens: int) -> None:
        cfg = LoraConfig(gradient_checkpointing=True, train_feature_maps=False)
        add_lora(model, cfg)
        super().__init__(model, cfg, next_token_objective(), rows, tokens)

    def step(self, mode: Mode) -> float:
        """One step; returns the loss before it."""
        set_mode(self.model, mode)
        loss = self.objective(self.model, self.batch)["loss"]
        self.update()
        return loss


def _lora(sizes: ModelSizes, timer: Timer, rows: int, tokens: int) -> dict[str, Any]:
    work = LoraStep(random_llama(sizes.shape, sizes.step_layers, timer.device), rows, tokens)
    softmax, ours = (timer(partial(work.step, mode)) for mode in ("teacher", "student"))
    return _compared("softmax", softmax, ours, rows=rows, tokens=tokens, layers=sizes.step_layers)


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, mode: Mode) -> torch.Tensor:
    """Prefill a new cache with tokens [B, T]; returns logits [B, 1, vocabulary] of the last."""
    set_mode(model, mode)
    cache = new_cache(model)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits


def _prefill(sizes: ModelSizes, timer: Timer, tokens: int) -> dict[str, Any]:
    """The ratio is the speedup."""
    model = random_llama(sizes.shape, sizes.prefill_layers, timer.device)
    ids = torch.randint(0, sizes.shape.vocab, (1, tokens), device=timer.device)
    softmax, ours = (timer(partial(prefill, model, ids, mode)) for mode in ("teacher", "student"))
    row = _compared("softmax", softmax, ours, tokens=tokens, layers=sizes.prefill_layers)
    return {**row, "ratio": softmax / ours}


def _ratio(row: dict[str, Any]) -> float:
    return float(row["ratio"])


def _lora_target(tokens: int, limit: float) -> Target:
    return at_most(limit, f"stage 2 step at T = {tokens} over the softmax model's", _ratio, f"lora {tokens}")


def _prefill_target(tokens: int, factor: float) -> Target:
    return at_least(factor, f"prefill at {tokens}: times as fast as the softmax model", _ratio, f"prefill {tokens}")


class LayerPart(KernelPart[ModelSizes]):
    """``bench kernels --only layer``: seconds, where ``model`` takes minutes."""

    full = ModelSizes()
    quick = ModelSizes(TINY_LLAMA, transfer=(1, 256))
    toy = ModelSizes(TOY_LLAMA, transfer=(1, 5))
    targets = (at_most(1.0, "one layer's transfer over its attention and projections", _ratio, "layer"),)

    def memory(self, sizes: ModelSizes) -> float:
        """Weights of the layer, and q, k, v and outputs of the student and the teacher."""
        shape, (rows, tokens) = sizes.shape, sizes.transfer
        return shape.bytes(1) + 2.0 * rows * tokens * (2 * shape.hidden + 8 * shape.heads * shape.dim)

    def measurements(self, sizes: ModelSizes, timer: Timer, limits: Ceilings) -> Iterator[Measurement]:
        """The one."""
        yield "layer", partial(_layer, sizes, timer)


class ModelPart(KernelPart[ModelSizes]):
    """``bench kernels --only model``."""

    full = ModelSizes()
    quick = ModelSizes(
        TINY_LLAMA, prefill_layers=2, step_layers=2, transfer=(1, 256), steps=((1, 256),), prompts=(512,)
    )
    toy = ModelSizes(TOY_LLAMA, prefill_layers=1, step_layers=1, transfer=(1, 5), steps=((1, 5),), prompts=(7,))
    depths = ("prefill_layers", "step_layers")
    targets = (
        at_most(1.25, "stage 1 step over the bare teacher forward", _ratio, "transfer"),
        _lora_target(1024, 1.1), _lora_target(8192, 1.0),
        _prefill_target(8192, 1.1), _prefill_target(32768, 1.5), _prefill_target(131072, 3.0),
    )  # fmt: skip

    def memory(self, sizes: ModelSizes) -> float:
        """For a stage 2 step or the longest prefill."""
        shape = sizes.shape
        tokens = max(rows * length for rows, length in sizes.steps)
        kept = sizes.step_layers * 2.0 * shape.hidden + 14.0 * shape.vocab
        widths = 10 * shape.hidden + 4 * shape.inner + 4 * shape.heads * shape.dim
        step = shape.bytes(sizes.step_layers) + tokens * (kept + 2.0 * widths)
        return max(step, shape.bytes(sizes.prefill_layers) + max(sizes.prompts) * 2.0 * widths)

    def measurements(self, sizes: ModelSizes, timer: Timer, limits: Ceilings) -> Iterator[Measurement]:
        """Stage 1, stage 2, prefill."""
        yield "transfer", partial(_transfer, sizes, timer)
        for rows, tokens in sizes.steps:
            yield f"lora {tokens}", partial(_lora, sizes, timer, rows, tokens)
        for tokens in sizes.prompts:
            yield f"prefill {tokens}", partial(_prefill, sizes, timer, tokens)

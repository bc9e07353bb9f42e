"""Whole-model figures on a GPU: an 8B-shaped Llama with students on the kernels, against itself with softmax attention.

Llama 3.1 8B's widths, random bfloat16 weights made on the device. Prefill is measured on a few layers (time is
proportional to them; of the vocabulary head only the last token's logits are computed), training steps on all 32 with
gradient checkpointing in stage 2, as the shipped recipe has it. Softmax attention is PyTorch's, by its own choice of
backend.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import trenchcoat.bench.kernels_operator as operator
from trenchcoat.bench.gpu import Ceilings, Timer, judge, least, most
from trenchcoat.bench.transfer import Bench as TransferBench
from trenchcoat.config import FeatureMapConfig, LoraConfig, StudentConfig
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.lora import add_lora
from trenchcoat.students import Mode
from trenchcoat.training.gradients import average_and_clip, clip_groups
from trenchcoat.training.objectives import next_token_objective

Measurement = tuple[str, Callable[[], dict[str, Any]]]
"""Name of a measurement, and what makes it."""


@dataclass(frozen=True)
class Shape:
    """Widths of a Llama and its students."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    inner: int = 14336
    vocab: int = 128256
    window: int = 64
    columns: int = 64
    impl: str = "triton"

    def config(self, layers: int) -> LlamaConfig:
        """The model's."""
        return LlamaConfig(
            hidden_size=self.hidden, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.dim, intermediate_size=self.inner, vocab_size=self.vocab, num_hidden_layers=layers,
            max_position_embeddings=1 << 18, rope_theta=500000.0, tie_word_embeddings=False,
        )  # fmt: skip

    def student(self, key_maps: str = "per_query_head") -> StudentConfig:
        """The students'."""
        return StudentConfig(
            window=self.window,
            feature_map=FeatureMapConfig(feature_dim=self.columns),
            key_maps=key_maps,  # type: ignore[arg-type]
            impl=self.impl,  # type: ignore[arg-type]
        )

    def operator(self) -> operator.Sizes:
        """One layer's attention."""
        return operator.Sizes(self.heads, self.kv_heads, self.dim, self.columns, self.window)

    def layer_bytes(self) -> float:
        """Weights of a layer in bfloat16."""
        attention = self.hidden * self.dim * (2 * self.heads + 2 * self.kv_heads)
        return 2.0 * (attention + 3 * self.hidden * self.inner)

    def bytes(self, layers: int) -> float:
        """Weights in bfloat16, embedding and head included."""
        return layers * self.layer_bytes() + 4.0 * self.vocab * self.hidden


LLAMA_8B = Shape()


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shape: Shape = LLAMA_8B
    prefill_layers: int = 4
    step_layers: int = 32
    transfer: tuple[int, int] = (8, 1024)
    """(rows, tokens) of the stage 1 step."""
    steps: tuple[tuple[int, int], ...] = ((8, 1024), (1, 8192))
    """(rows, tokens) of the stage 2 steps."""
    prompts: tuple[int, ...] = (8192, 32768, 131072)

    def of_layers(self, layers: int | None) -> Sizes:
        """With another depth everywhere."""
        return self if layers is None else replace(self, prefill_layers=layers, step_layers=layers)


FULL = Sizes()
QUICK = Sizes(
    Shape(hidden=256, heads=4, kv_heads=2, dim=64, inner=512, vocab=1024), prefill_layers=2, step_layers=2,
    transfer=(1, 256), steps=((1, 256),), prompts=(512,),
)  # fmt: skip

TRANSFER_AT_MOST, LAYER_AT_MOST = 1.25, 1.0
LORA_AT_MOST = {1024: 1.1, 8192: 1.0}
"""Tokens a row -> stage 2 step over the same step of the softmax model, at most."""
PREFILL_FASTER = {8192: 1.1, 32768: 1.5, 131072: 3.0}
"""Tokens -> times as fast as the softmax model's prefill, at least."""


def random_llama(shape: Shape, layers: int, device: str, key_maps: str = "per_query_head") -> Any:
    """A random Llama with students, in mode `teacher`; bfloat16 (students float32), frozen, made on `device`."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(
            shape.config(layers), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    attach_students(model.eval(), shape.student(key_maps))
    return model.requires_grad_(False)


def memory(sizes: Sizes) -> float:
    """Bytes of device memory that the largest measurement takes, roughly."""
    shape = sizes.shape
    tokens = max(rows * length for rows, length in sizes.steps)
    kept = sizes.step_layers * 2.0 * shape.hidden + 14.0 * shape.vocab
    widths = 10 * shape.hidden + 4 * shape.inner + 4 * shape.heads * shape.dim
    step = shape.bytes(sizes.step_layers) + tokens * (kept + 2.0 * widths)
    return max(step, shape.bytes(sizes.prefill_layers) + max(sizes.prompts) * 2.0 * widths)


def measurements(sizes: Sizes, timer: Timer, limits: Ceilings) -> Iterator[Measurement]:
    """Every measurement of the model."""
    yield "layer", partial(_layer, sizes, timer)
    yield "transfer", partial(_transfer, sizes, timer)
    for rows, tokens in sizes.steps:
        yield f"lora {tokens}", partial(_lora, sizes, timer, rows, tokens)
    for tokens in sizes.prompts:
        yield f"prefill {tokens}", partial(_prefill, sizes, timer, tokens)


def _layer(sizes: Sizes, timer: Timer) -> dict[str, Any]:
    """Transfer of one layer (y_hat, loss, gradients) against that layer's softmax attention with its projections."""
    shape, (rows, tokens) = sizes.shape, sizes.transfer
    model = random_llama(shape, 1, timer.device)
    hidden = torch.randn(rows, tokens, shape.hidden, device=timer.device, dtype=torch.bfloat16)
    place = torch.arange(tokens, device=timer.device)[None]
    rotation = model.model.rotary_emb(hidden, place)
    attend = partial(model.model.layers[0].self_attn, hidden, position_embeddings=rotation, attention_mask=None)
    learn = operator.Bench(shape.operator(), shape.impl, tokens, timer.device, rows).transfer
    with torch.no_grad():
        teacher, ours = timer(attend), timer(learn)
    return {"rows": rows, "tokens": tokens, "teacher": teacher, "ours": ours, "ratio": ours / teacher}


def _transfer(sizes: Sizes, timer: Timer) -> dict[str, Any]:
    """A stage 1 step (losses, gradients, clipping, AdamW) over the bare teacher's forward, both without the head."""
    rows, tokens = sizes.transfer
    bench = TransferBench(random_llama(sizes.shape, sizes.step_layers, timer.device), tokens, rows=rows)
    teacher, ours = timer(bench.teacher), timer(bench.step)
    result = {"rows": rows, "tokens": tokens, "layers": sizes.step_layers}
    return {**result, "teacher": teacher, "ours": ours, "ratio": ours / teacher}


class LoraStep:
    """A stage 2 step of a model: next-token loss, gradients of LoRA, clipping, AdamW; students or softmax attention."""

    def __init__(self, model: Any, rows: int, tokens: int) -> None:
        self.model, cfg = model, LoraConfig(gradient_checkpointing=True)
        add_lora(model, cfg)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.groups, self.clip = clip_groups(model, named, cfg.clip_scope), cfg.clip
        self.optimizer = torch.optim.AdamW(list(named.values()), lr=cfg.lr)
        self.objective = next_token_objective()
        device = next(iter(named.values())).device
        ids = torch.randint(0, model.config.vocab_size, (rows, tokens), device=device)
        self.batch = {"input_ids": ids, "labels": ids}

    def step(self, mode: Mode) -> float:
        """One step; the loss before it."""
        set_mode(self.model, mode)
        loss = self.objective(self.model, self.batch)["loss"]
        average_and_clip(self.groups, 1, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def _lora(sizes: Sizes, timer: Timer, rows: int, tokens: int) -> dict[str, Any]:
    bench = LoraStep(random_llama(sizes.shape, sizes.step_layers, timer.device), rows, tokens)
    softmax, ours = timer(partial(bench.step, "teacher")), timer(partial(bench.step, "student"))
    result = {"rows": rows, "tokens": tokens, "layers": sizes.step_layers}
    return {**result, "softmax": softmax, "ours": ours, "ratio": ours / softmax}


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, mode: Mode) -> torch.Tensor:
    """Prefill into a new cache: logits [B, 1, vocabulary] of the last token."""
    set_mode(model, mode)
    cache = DynamicCache(config=model.config)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits


def _prefill(sizes: Sizes, timer: Timer, tokens: int) -> dict[str, Any]:
    model = random_llama(sizes.shape, sizes.prefill_layers, timer.device)
    ids = torch.randint(0, sizes.shape.vocab, (1, tokens), device=timer.device)
    softmax, ours = timer(partial(read, model, ids, "teacher")), timer(partial(read, model, ids, "student"))
    result = {"tokens": tokens, "layers": sizes.prefill_layers}
    return {**result, "softmax": softmax, "ours": ours, "ratio": softmax / ours}


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured against wanted."""

    def ratio(row: dict[str, Any]) -> float:
        return float(row["ratio"])

    target = most("one layer's transfer over its attention and projections", LAYER_AT_MOST)
    rows = [judge(target, found, "layer", ratio)]
    rows.append(judge(most("stage 1 step over the bare teacher forward", TRANSFER_AT_MOST), found, "transfer", ratio))
    for tokens, limit in LORA_AT_MOST.items():
        target = most(f"stage 2 step at T = {tokens} over the softmax model's", limit)
        rows.append(judge(target, found, f"lora {tokens}", ratio))
    for tokens, factor in PREFILL_FASTER.items():
        target = least(f"prefill at {tokens}: times as fast as the softmax model", factor)
        rows.append(judge(target, found, f"prefill {tokens}", ratio))
    return rows


def table(found: dict[str, Any]) -> list[str]:
    """The measurements as text."""
    lines = [f"{'':<16} {'rows':>5} {'tokens':>8} {'layers':>7} {'softmax ms':>11} {'ours ms':>10} {'ratio':>7}"]
    for name, row in found.items():
        if "out_of_memory" in row:
            lines.append(f"{name}: out of memory ({row['out_of_memory']})")
            continue
        other = row["softmax"] if "softmax" in row else row["teacher"]
        lines.append(
            f"{name:<16} {row.get('rows', 1):>5} {row['tokens']:>8} {row.get('layers', 1):>7} {1e3 * other:>11.2f} "
            f"{1e3 * row['ours']:>10.2f} {row['ratio']:>6.2f}x"
        )
    return lines

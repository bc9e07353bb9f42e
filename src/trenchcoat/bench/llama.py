"""Random Llamas with students for whole-model benchmarks, and a training step.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trenchcoat.bench.layer import LayerSizes
from trenchcoat.config import FeatureMapConfig, LoraConfig, StudentConfig, TransferConfig
from trenchcoat.models.attach import attach_students
from trenchcoat.training.gradients import average_and_clip, clip_groups
from trenchcoat.training.objectives import Objective


@dataclass(frozen=True)
class LlamaShape(LayerSizes):
    """Widths of a Llama and its students."""

    hidden: int = 4096
    inner: int = 14336
    vocab: int = 128256
    impl: str = "triton"

    def config(self, layers: int, **more: Any) -> LlamaConfig:
        """The model's config; `more` sets other fields of it."""
        return LlamaConfig(
            hidden_size=self.hidden, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.dim, intermediate_size=self.inner, vocab_size=self.vocab, num_hidden_layers=layers,
            **{"max_position_embeddings": 1 << 18, "rope_theta": 500000.0, "tie_word_embeddings": False, **more},
        )  # fmt: skip

    def student(self, key_maps: str = "per_query_head", keep: tuple[str, ...] = ()) -> StudentConfig:
        """The students', with the groups and layers of `keep` (`student.keep`) left to softmax attention."""
        return StudentConfig(
            window=self.window,
            feature_map=FeatureMapConfig(feature_dim=self.columns),
            key_maps=key_maps,  # type: ignore[arg-type]
            impl=self.impl,  # type: ignore[arg-type]
            keep=keep,
        )

    def bytes(self, layers: int) -> float:
        """Bytes of the weights in bfloat16, including embedding and head."""
        attention = self.hidden * self.dim * (2 * self.heads + 2 * self.kv_heads)
        return 2.0 * layers * (attention + 3 * self.hidden * self.inner) + 4.0 * self.vocab * self.hidden


LLAMA_8B = LlamaShape()
TINY_LLAMA = LlamaShape(hidden=256, heads=4, kv_heads=2, dim=64, inner=512, vocab=1024)
"""For quick runs of benchmarks of :data:`LLAMA_8B`."""
TOY_LLAMA = LlamaShape(hidden=16, heads=2, kv_heads=1, dim=8, inner=16, vocab=31, window=3, columns=4)
"""For Triton's interpreter."""
SMALL_LLAMA = LlamaShape(hidden=512, heads=8, kv_heads=4, dim=64, inner=1408, vocab=4096, impl="auto")
"""For CPUs."""


def random_llama(
    shape: LlamaShape,
    layers: int,
    device: str,
    key_maps: str = "per_query_head",
    dtype: torch.dtype = torch.bfloat16,
    *,
    keep: tuple[str, ...] = (),
) -> Any:
    """A random Llama with float32 students, in mode `teacher`; frozen, created on `device`. `keep`: `student.keep`."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(shape.config(layers), dtype=dtype, attn_implementation="sdpa")
    attach_students(model.eval(), shape.student(key_maps, keep))
    return model.requires_grad_(False)


class TimedTrainingStep:
    """A batch of random tokens for a model, and the update of a training step: clipping and AdamW."""

    def __init__(
        self, model: Any, cfg: TransferConfig | LoraConfig, objective: Objective, rows: int, tokens: int
    ) -> None:
        self.model, self.objective, self.clip = model, objective, cfg.clip
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.groups = clip_groups(model, named, cfg.clip_scope)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=cfg.lr)
        ids = torch.randint(0, model.config.vocab_size, (rows, tokens), device=self.parameters[0].device)
        self.batch = {"input_ids": ids, "labels": ids}

    def update(self) -> None:
        """Clip and step the optimizer."""
        average_and_clip(self.groups, 1, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

"""Tiny random models of many families, for the tests of attaching, cache, families and hub: no download."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.models import interface
from trenchcoat.models.attach import attach_students, set_mode

VOCABULARY = 97
WINDOW = 4
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 2, "eos_token_id": None}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE, "attn_implementation": "sdpa"}),
    "mistral": ("Mistral", {"sliding_window": 9, "attn_implementation": "sdpa"}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "attn_implementation": "sdpa"}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"sliding_window": 9, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {**EXPERTS, "attn_implementation": "sdpa"}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "cohere2": ("Cohere2", {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "attn_implementation": "sdpa"}),
    "gpt_oss": ("GptOss", {**EXPERTS, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
}
"""Family -> (class prefix in transformers, settings in addition to BASE)."""


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, evaluation mode, with logits far from flat."""
    prefix, settings = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**BASE, **settings, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.25 if "embed" not in name else 0.5)
            elif "sinks" in name:
                parameter.normal_(0.0, 1.0)
    return model


def tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Random token ids [rows, length], none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits [rows, tokens, vocabulary], without gradients."""
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **{"use_cache": False, **options}).logits
    return result


def make(family: str = "llama", student: str = "terrace", keep: tuple[int | str, ...] = (), **changes: Any) -> Any:
    """A tiny model with students attached; in `keep`, 1 is a layer and "0.1" a group."""
    model = tiny_model(family, **changes)
    config = StudentConfig(
        name=student,
        window=WINDOW,
        keep_softmax=tuple(each for each in keep if isinstance(each, int)),
        keep=tuple(each for each in keep if isinstance(each, str)),
        feature_map=FeatureMapConfig(name="exp", feature_dim=6),
    )
    attach_students(model, config)
    set_mode(model, "student")
    return model


def decoded_together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step of a layer with kept groups from now on, whether the student and they were decoded in one call."""
    together: list[bool] = []
    original = interface._in_one_call

    def counted(*given: Any) -> Tensor | None:
        y = original(*given)
        together.append(y is not None)
        return y

    monkeypatch.setattr(interface, "_in_one_call", counted)
    return together

"""Merged folders of small models whose heads vLLM's attention accepts, and what Transformers generates with them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from conftest import byte_tokenizer
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students, set_mode

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 100, 331, 900)
NEW = 20

TERRACE = StudentConfig(window=16, feature_map=FeatureMapConfig(feature_dim=16))
STUDENTS = {
    "terrace": TERRACE,
    "sliding": replace(TERRACE, name="sliding", affine=True),
    "linear": replace(TERRACE, name="linear"),
    "sinks": replace(TERRACE, sinks=4),
    "window_sinks": replace(TERRACE, name="window_sinks", sinks=4),
    "per_kv_head": replace(TERRACE, key_maps="per_kv_head"),
    "layers": replace(TERRACE, keep_softmax=(1,)),
    "groups": replace(TERRACE, keep=("0.1", "2.0", "2.3")),
    "mixed": replace(TERRACE, keep=("0.1", "0.2", "1")),
    "gated": replace(TERRACE, name="terrace_gated", sinks=4),
    "gated_groups": replace(TERRACE, name="terrace_gated", sinks=4, keep=("0.1", "2.0", "2.3")),
    "gdn": replace(TERRACE, name="gdn"),
    "kda": replace(TERRACE, name="kda"),
    "lightning": replace(TERRACE, name="lightning", sinks=4),
}


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"hidden_size": 512}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "gemma": ("Gemma", {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 50,
            "sliding_window": 1024,
        },
    ),
    "granite": ("Granite", {"attention_multiplier": 0.1, "residual_multiplier": 0.5}),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "moe_intermediate_size": 64}),
}
"""Family -> prefix of its classes in Transformers, settings."""


def base_model(family: str) -> Any:
    """A random model, in float32, whose logits are far from flat."""
    torch.manual_seed(0)
    prefix, settings = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **settings})
    model: Any = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.5 if "embed" in name else 0.06)
    return model.eval()


def save_merged(folder: Path, student: str, family: str = "llama") -> Path:
    """A merged folder with a tokenizer; the students' parameters are random."""
    model = base_model(family)
    attach_students(model, STUDENTS[student])
    set_mode(model, "student")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".student." in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    hub.save_merged(model, folder, byte_tokenizer())
    return folder


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]


def expected(folder: Path, asked: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """(tokens, their log-probabilities) that Transformers generates after each prompt."""
    model, _ = hub.load(folder, device="cpu", dtype="float32")
    found = []
    for prompt in asked:
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        output = model.generate(
            torch.tensor([prompt]), **settings, output_logits=True, return_dict_in_generate=True
        )  # fmt: skip
        tokens = output.sequences[0, len(prompt) :].tolist()
        scores = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(output.logits, tokens, strict=True)]
        found.append((tokens, scores))
    return found

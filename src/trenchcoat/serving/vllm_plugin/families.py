"""The families that vLLM serves linearized."""

from __future__ import annotations

FAMILIES = {
    "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Phi3": "phi3", "Gemma": "gemma",
    "Gemma2": "gemma2", "Granite": "granite", "Mixtral": "mixtral", "Qwen3Moe": "qwen3_moe",
}  # fmt: skip
"""Families whose classes in vLLM take students: name in Transformers' classes -> module of vLLM."""

BASES = {f"Linearized{name}ForCausalLM": (module, f"{name}ForCausalLM") for name, module in FAMILIES.items()}
"""`architectures` of a merged folder's config -> module and class of vLLM that the class derives from."""

MODELS = {name: f"trenchcoat.serving.vllm_plugin.models:{name}" for name in BASES}
"""`architectures` of a merged folder's config -> class path, imported by vLLM on demand."""

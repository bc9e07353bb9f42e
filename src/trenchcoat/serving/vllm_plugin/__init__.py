"""The vLLM plugin: linearized Llama and Mistral models, as vLLM 0.33.0 loads them (entry point `vllm.general_plugins`).

`pages` is the tensor code, tested without vLLM; `models` connects it to vLLM, which imports it. `docs/SERVE.md`
says what has been run and what has not.
"""

from __future__ import annotations

VLLM_VERSION = "0.33.0"
"""The version whose sources `models` was written against."""

MODELS = {
    "LinearizedLlamaForCausalLM": "trenchcoat.serving.vllm_plugin.models:LinearizedLlamaForCausalLM",
    "LinearizedMistralForCausalLM": "trenchcoat.serving.vllm_plugin.models:LinearizedMistralForCausalLM",
}
"""`architectures` of a merged folder's config -> class path, imported by vLLM on demand."""


def register() -> None:
    """Register the model classes with vLLM; their caches are configured like those of its Mamba models.

    vLLM calls this in every process, possibly more than once. Importing trenchcoat has already registered the config
    classes with Transformers.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)
        MODELS_CONFIG_MAP[architecture] = MambaModelConfig

"""The vLLM plugin: linearized Llama and Mistral models, as vLLM 0.33.0 loads them (entry point `vllm.general_plugins`).

`pages` is the tensor code, tested without vLLM; `models` connects it to vLLM, which imports it. What has been run and
what has not is in `docs/SERVE.md`.
"""

from __future__ import annotations

VLLM_VERSION = "0.33.0"
"""The version whose sources `models` was written against."""

MODELS = {
    "LinearizedLlamaForCausalLM": "trenchcoat.serving.vllm_plugin.models:LinearizedLlamaForCausalLM",
    "LinearizedMistralForCausalLM": "trenchcoat.serving.vllm_plugin.models:LinearizedMistralForCausalLM",
}
"""`architectures` of a merged folder's config -> where vLLM finds the class, imported when it is needed."""


def register() -> None:
    """Register the model classes with vLLM; their caches are set up like those of its Mamba models.

    vLLM calls it in every process, perhaps more than once. Importing trenchcoat has registered the config classes with
    Transformers by then.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)
        MODELS_CONFIG_MAP[architecture] = MambaModelConfig

"""The vLLM plugin: linearized models in vLLM (entry point `vllm.general_plugins`).

`families` names the classes, `shares` says which process computes which heads, `pages` is the tensor code, `checks`
refuses options; these are tested without vLLM. `layers` and `models` connect them to vLLM, which imports these.
`docs/SERVE.md` says what has been run.
"""

from __future__ import annotations

from typing import Any

from trenchcoat.serving.vllm_plugin.families import MODELS

VLLM_VERSION = "0.32.0"
"""The version that the comparison in `tests/in_vllm` was run with."""

WITHOUT_CLASS = "trenchcoat.serving.vllm_plugin.models:WithoutClass"
"""What vLLM is given for the other families, since it looks at a class before it lets anybody refuse a model."""

OPERATOR = "vllm::trenchcoat_student"
"""The operator that a compiled model is split at."""


def register() -> None:
    """Register the model classes with vLLM; their caches are configured like those of its Mamba models.

    vLLM calls this in every process, possibly more than once. Importing trenchcoat has already registered the config
    classes with Transformers.
    """
    from vllm.config import CompilationConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    from trenchcoat.serving.vllm_plugin.checks import check_model, check_options, settle_state_dtype
    from trenchcoat.serving.vllm_plugin.shares import settle_heads

    class LinearizedConfig(MambaModelConfig):
        """Refuses families and options, then prepares the cache as for vLLM's Mamba models."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            """Called by vLLM once it has read the folder's configuration."""
            check_model(model_config.hf_config, MODELS)

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            """Called by vLLM once its own configuration is complete."""
            check_options(vllm_config)
            settle_state_dtype(vllm_config)
            settle_heads(vllm_config)
            super().verify_and_update_config(vllm_config)

    for architecture, place in {**dict.fromkeys(_other_families(), WITHOUT_CLASS), **MODELS}.items():
        ModelRegistry.register_model(architecture, place)
        MODELS_CONFIG_MAP[architecture] = LinearizedConfig
    if OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATOR)


def _other_families() -> list[str]:
    """The architectures of all known families: what has no class here is refused with a sentence of ours."""
    from trenchcoat.models.families import KNOWN_FAMILIES
    from trenchcoat.models.transformers_internals import causal_lm_names

    names = causal_lm_names()
    return [f"Linearized{names[family]}" for family in KNOWN_FAMILIES if family in names]

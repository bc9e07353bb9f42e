"""Model classes for vLLM: its Llama and Mistral with students in place of attention. Imported by vLLM only.

vLLM's classes do everything else (weights, projections, RoPE, sampling, scheduling). A layer's state is a page of
vLLM's Mamba cache; kept groups and layers are attention layers of vLLM, so every model is one of its hybrids.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM

from trenchcoat.serving.vllm_plugin.layers import insert_student, page_bytes


class _WithStudent:
    """Mixin that puts a student into a vLLM layer, the next class in the MRO."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config)  # type: ignore[call-arg]
        attention: Any = self.self_attn  # type: ignore[attr-defined]
        insert_student(attention, vllm_config, f"{prefix}.self_attn")


class LinearizedLlamaDecoderLayer(_WithStudent, LlamaDecoderLayer):
    """vLLM's layer with a student."""


class LinearizedMistralDecoderLayer(_WithStudent, MistralDecoderLayer):
    """vLLM's layer with a student."""


class _Linearized(HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """Class methods that tell vLLM the size of the state before a model exists."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """A page is bytes to vLLM."""
        return ((page_bytes(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """See `get_mamba_state_shape_from_config`."""
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How a cached prefix's page is copied for a request that goes on from it."""
        return (get_temporal_copy_spec,)


class LinearizedLlamaForCausalLM(LlamaForCausalLM, _Linearized):
    """A merged folder of family `linearized_llama`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LinearizedLlamaDecoderLayer)


class LinearizedMistralForCausalLM(MistralForCausalLM, _Linearized):
    """A merged folder of family `linearized_mistral`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LinearizedMistralDecoderLayer)


class WithoutClass(LlamaForCausalLM):
    """Registered for families without a class; `checks.check_model` refuses them before it is built."""

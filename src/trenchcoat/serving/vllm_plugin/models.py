"""Model classes for vLLM: its own classes with students in place of attention. Imported by vLLM only.

vLLM's classes do everything else (weights, projections, norms, RoPE, sampling, scheduling). A layer's state is in pages
of vLLM's Mamba cache; kept groups and layers are attention layers of vLLM, so every model is one of its hybrids.

`Linearized<Family>ForCausalLM` is an attribute of this module for every family of `families.BASES`, made on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.llama import LlamaForCausalLM

from trenchcoat.serving.vllm_plugin.families import BASES
from trenchcoat.serving.vllm_plugin.layers import insert_students, page_bytes


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


def __getattr__(name: str) -> type:
    """The class of a merged folder's `architectures`."""
    if name not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, kind = BASES[name]
    base = getattr(import_module(f"vllm.model_executor.models.{module}"), kind)
    made = globals()[name] = _linearized(name, base)
    return made


def _linearized(name: str, base: Any) -> type:
    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        """vLLM's model, then students in its layers."""
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        insert_students(self, vllm_config)

    members = {"__init__": __init__, "__module__": __name__, "__doc__": f"vLLM's {base.__name__} with students."}
    return type(name, (base, _Linearized), members)


class WithoutClass(LlamaForCausalLM):
    """Registered for families without a class; `checks.check_model` refuses them before it is built."""

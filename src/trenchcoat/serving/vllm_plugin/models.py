"""Model classes for vLLM 0.33.0: its Llama and Mistral with a student in place of the attention of every layer.

vLLM's classes do everything else (weights, projections, RoPE, sampling, scheduling). A layer's state is a page of
vLLM's Mamba cache (`MambaBase.get_state_shape`). The tests run it against fakes, since vLLM's requirements
conflict with the versions that they pin. Imported by vLLM only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from trenchcoat.models.auto import student_settings
from trenchcoat.serving.vllm_plugin.pages import PageLayout, StepRequests, attend_pages, heads_of_rank
from trenchcoat.students import StudentAttention, build_student


def check_settings(vllm_config: Any) -> None:
    """Raise ValueError for what this plugin does not support, naming the option to change."""
    if not vllm_config.model_config.enforce_eager:
        raise ValueError("linearized models do not support CUDA graphs or torch.compile in vLLM: give --enforce-eager")
    if vllm_config.cache_config.enable_prefix_caching:
        raise ValueError("linearized models do not support prefix caching in vLLM: give --no-enable-prefix-caching")
    ours = vllm_config.model_config.hf_config.trenchcoat
    if ours.get("lora") is not None:
        raise ValueError("the folder's LoRA is not merged; write a merged one with `trenchcoat export DIR --merge`")
    settings = ours["student"]
    if settings.get("keep_softmax") or settings.get("keep"):
        raise ValueError(
            "models that keep softmax attention (student.keep, student.keep_softmax) cannot be served through vLLM; "
            "use `trenchcoat serve`"
        )


def student_for(vllm_config: Any, *, num_heads: int, num_kv_heads: int, head_dim: int) -> StudentAttention:
    """The student of one layer with this process's share of the heads."""
    cfg = student_settings(vllm_config.model_config.hf_config.trenchcoat["student"])
    return build_student(cfg, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


class StudentLayer(nn.Module, MambaBase):
    """Replaces vLLM's `Attention`: q, k, v of a step's tokens in, outputs before `o_proj` out."""

    student: StudentAttention
    kv_cache: tuple[Tensor, ...]

    def __init__(self, student: StudentAttention, scale: float, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        self.__dict__["student"] = student  # its parameters belong to `self_attn.student`, as in the checkpoint
        self.scale, self.prefix = scale, prefix
        self.layout = PageLayout.of(student, vllm_config.model_config.dtype)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> Any:
        """vLLM's linear attention, whose metadata is sufficient."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of a page's tensors."""
        return self.layout.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return self.layout.dtypes

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, H * D], [T, G * D], [T, G * D] -> [T, H * D]."""
        every = get_forward_context().attn_metadata
        if every is None:  # vLLM profiles memory before there is a cache
            return torch.zeros_like(query)
        meta = every[self.prefix]
        tokens = meta.num_decode_tokens + meta.num_prefill_tokens
        requests = meta.num_decodes + meta.num_prefills
        y = torch.zeros_like(query)
        step = StepRequests(
            starts=meta.query_start_loc[: requests + 1].tolist(),
            lengths=meta.seq_lens[:requests].tolist(),
            slots=meta.state_indices_tensor[:requests],
            decodes=meta.num_decodes,
        )
        qkv = (query[:tokens], key[:tokens], value[:tokens])
        y[:tokens] = attend_pages(self.student, self.layout, self.kv_cache, qkv, step, scale=self.scale)
        return y


def insert_student(attn: Any, vllm_config: Any, prefix: str) -> None:
    """Replace `attn.attn` by a student; its parameters load by their names in a merged folder."""
    check_settings(vllm_config)
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    student = student_for(vllm_config, num_heads=attn.num_heads, num_kv_heads=attn.num_kv_heads, head_dim=attn.head_dim)

    def load_share(parameter: nn.Parameter, whole: Tensor) -> None:
        """Called by vLLM with a tensor from the folder."""
        parameter.data.copy_(heads_of_rank(whole, rank, ranks))

    for parameter in student.parameters():
        parameter.weight_loader = load_share  # type: ignore[attr-defined]
    del vllm_config.compilation_config.static_forward_context[f"{prefix}.attn"]
    attn.student = student.eval().requires_grad_(False)
    attn.attn = StudentLayer(student, attn.scaling, vllm_config, f"{prefix}.attn")


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


class _Linearized(HasInnerState, IsAttentionFree):
    """Class methods that tell vLLM the size of the state before a model exists."""

    @classmethod
    def _layout(cls, vllm_config: Any) -> PageLayout:
        config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        heads = config.num_attention_heads
        with torch.device("meta"):
            student = student_for(
                vllm_config,
                num_heads=heads // ranks,
                num_kv_heads=max(1, config.num_key_value_heads // ranks),
                head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            )
        return PageLayout.of(student, vllm_config.model_config.dtype)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of a page's tensors, on one of the tensor-parallel processes."""
        return cls._layout(vllm_config).shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return cls._layout(vllm_config).dtypes


class LinearizedLlamaForCausalLM(LlamaForCausalLM, _Linearized):
    """A merged folder of family `linearized_llama`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LinearizedLlamaDecoderLayer)


class LinearizedMistralForCausalLM(MistralForCausalLM, _Linearized):
    """A merged folder of family `linearized_mistral`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LinearizedMistralDecoderLayer)

"""What takes the place of vLLM's `Attention` in a layer: a student over pages, beside it attention for kept groups.

Imported by vLLM only. Shape legend: T tokens of a step, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from trenchcoat.models.auto import student_settings
from trenchcoat.serving.vllm_plugin.checks import state_dtype
from trenchcoat.serving.vllm_plugin.pages import PageLayout, Pages, StepRequests
from trenchcoat.serving.vllm_plugin.shares import Share, every_share_of, free_at_once, kept_at_once, share_of
from trenchcoat.students import StudentAttention, build_student


class StudentMetadataBuilder(LinearAttentionMetadataBuilder):
    """Reads a step's requests once for all layers."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """vLLM's metadata with a :class:`StepRequests` as `step`."""
        meta = super().build(common_prefix_len, common_attn_metadata, fast_build)
        requests = meta.num_decodes + meta.num_prefills
        lengths, slots = torch.stack((meta.seq_lens[:requests], meta.state_indices_tensor[:requests])).tolist()
        starts = common_attn_metadata.query_start_loc_cpu[: requests + 1].tolist()
        meta.step = StepRequests(starts, lengths, slots, meta.num_decodes)
        return meta


class StudentBackend(LinearAttentionBackend):
    """vLLM's linear attention, with our metadata."""

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's log."""
        return "TRENCHCOAT"

    @staticmethod
    def get_builder_cls() -> type[StudentMetadataBuilder]:
        """The builder of a step's metadata."""
        return StudentMetadataBuilder


class StateCache(nn.Module, MambaBase):
    """Pages for the states of some of a layer's groups."""

    kv_cache: tuple[Tensor, ...] | None = None

    def __init__(self, page_bytes: int, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        self.prefix, self.page_bytes = prefix, page_bytes
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> Any:
        """vLLM's linear attention."""
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[StudentBackend]:
        """The backend whose metadata `forward` reads."""
        return StudentBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """A page is bytes to vLLM."""
        return ((self.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """See `get_state_shape`."""
        return (torch.int8,)


class StudentLayer(nn.Module):
    """A student: q, k, v of a step's tokens in, its outputs out."""

    student: StudentAttention
    pages: Pages | None = None
    x_TM: Tensor | None = None
    """The input of the layer's attention, from its call to that of this module; for students that read it."""

    def __init__(
        self, student: StudentAttention, scores: dict[str, Any], parts: int, vllm_config: Any, prefix: str
    ) -> None:
        """`scores` are `scale` and `softcap` of the layer's attention; `parts` is the number of pages of a state."""
        super().__init__()
        self.__dict__["student"] = student  # its parameters belong to `self_attn.student`, as in the checkpoint
        self.scores, self.prefix = scores, prefix
        self.dtype = vllm_config.model_config.dtype
        self.layout = PageLayout.of(student, self.dtype, parts)
        size = self.layout.nbytes
        self.caches = nn.ModuleList(StateCache(size, vllm_config, f"{prefix}_state{part}") for part in range(parts))
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def _pages(self) -> Pages | None:
        """Of the caches that vLLM has allocated; None as long as it has not."""
        caches: list[Any] = list(self.caches)
        if any(cache.kv_cache is None for cache in caches):
            return None
        raw = tuple(cache.kv_cache[0] for cache in caches)
        if self.pages is None or self.pages.caches[0] is not raw[0]:
            self.pages = Pages(self.student, self.layout, raw, self.dtype, in_place=raw[0].is_cpu)
        return self.pages

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, H * D], [T, G * D], [T, G * D] -> [T, H * D]."""
        output = torch.empty_like(query)
        x_TM, self.x_TM = self.x_TM, None
        torch.ops.vllm.trenchcoat_student(query, key, value, x_TM, output, self.prefix)
        return output

    def take_input(self, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before the layer's attention with its arguments: positions, x [T, M]."""
        self.x_TM = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], x_TM: Tensor | None, output: Tensor) -> None:
        """Write the outputs of a step's tokens into `output` [T, H * D]."""
        every = get_forward_context().attn_metadata
        pages = None if every is None else self._pages()
        if pages is None:  # vLLM measures the memory of a step before there is a cache
            rows = (x.unflatten(-1, (-1, self.student.head_dim)).transpose(0, 1)[None] for x in qkv)
            given = self.scores if x_TM is None else {**self.scores, "x_BTM": x_TM[None]}
            y, _ = self.student(*rows, **given)
            output.copy_(y[0].transpose(0, 1).flatten(1))
            return
        steps: list[StepRequests] = [every[cache.prefix].step for cache in self.caches]
        tokens = steps[0].starts[-1]
        q, k, v = (x[:tokens] for x in qkv)
        x_TM = None if x_TM is None else x_TM[:tokens]
        output[:tokens] = pages.attend((q, k, v), steps, x_TM, **self.scores)
        output[tokens:] = 0


def _student(query: Tensor, key: Tensor, value: Tensor, x_TM: Tensor | None, output: Tensor, layer_name: str) -> None:
    layer: StudentLayer = get_forward_context().no_compile_layers[layer_name]
    layer.attend((query, key, value), x_TM, output)


def _student_fake(
    query: Tensor, key: Tensor, value: Tensor, x_TM: Tensor | None, output: Tensor, layer_name: str
) -> None:
    """Nothing but the output changes."""


direct_register_custom_op("trenchcoat_student", _student, mutates_args=["output"], fake_impl=_student_fake)


class MixedAttention(nn.Module):
    """A layer of which some groups keep softmax attention: attentions of vLLM for them, a student for the others."""

    order: Tensor

    def __init__(self, parts: list[tuple[nn.Module, list[int], list[int]]], head_dim: int) -> None:
        """`parts` are (module, its query heads, its groups)."""
        super().__init__()
        self.parts, self.head_dim = nn.ModuleList(part for part, _, _ in parts), head_dim
        order = torch.tensor([head for _, heads, _ in parts for head in heads]).argsort()
        self.register_buffer("order", order, persistent=False)
        for number, (_, heads, groups) in enumerate(parts):
            self.register_buffer(f"heads_{number}", torch.tensor(heads), persistent=False)
            self.register_buffer(f"groups_{number}", torch.tensor(groups), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, H * D], [T, G * D], [T, G * D] -> [T, H * D]."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))
        outputs = []
        for number, part in enumerate(self.parts):
            heads, groups = getattr(self, f"heads_{number}"), getattr(self, f"groups_{number}")
            own = (x.index_select(1, index).flatten(1) for x, index in ((q, heads), (k, groups), (v, groups)))
            y = part(*own)
            outputs.append(y.unflatten(-1, (-1, self.head_dim)))
        return torch.cat(outputs, 1).index_select(1, self.order).flatten(1)


def student_for(vllm_config: Any, share: Share, head_dim: int) -> StudentAttention:
    """The student of one layer with this process's share of the heads."""
    config, groups = vllm_config.model_config.hf_config, len(share.free)
    sizes = {"num_kv_heads": groups, "head_dim": head_dim, "hidden_size": config.hidden_size}
    cfg = student_settings(config.trenchcoat["student"])
    student = build_student(cfg, num_heads=groups * share.heads, **sizes)
    student.state_dtype = state_dtype(vllm_config)
    return student.eval().requires_grad_(False)


def page_bytes(vllm_config: Any) -> int:
    """Size of a page, the same in all layers and processes."""
    config, shares = vllm_config.model_config.hf_config, every_share_of(vllm_config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = max(shares, key=lambda share: len(share.free))
    with torch.device("meta"):
        student = student_for(vllm_config, share, head_dim)
    return PageLayout.of(student, vllm_config.model_config.dtype, len(share.free) // free_at_once(shares)).nbytes


def insert_students(model: nn.Module, vllm_config: Any) -> None:
    """Replace every attention of a model's layers by what computes a process's share of it; the students' parameters
    load by their names in a merged folder."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "attn", None), Attention):
            _insert_student(module, vllm_config)


def _insert_student(attn: Any, vllm_config: Any) -> None:
    """Replace `attn.attn`, which gets q, k and v after norms and RoPE in every class of vLLM."""
    own, config = attn.attn, vllm_config.model_config.hf_config
    prefix = own.layer_name.removesuffix(".attn")
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    cfg = student_settings(config.trenchcoat["student"])
    sizes = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
    share = share_of(cfg, extract_layer_index(prefix), rank=rank, ranks=ranks, **sizes)
    shares = every_share_of(vllm_config)
    at_once = kept_at_once(shares)
    if len(share.kept) == at_once == len(share.groups):
        return
    del vllm_config.compilation_config.static_forward_context[own.layer_name]
    parts: list[tuple[nn.Module, list[int], list[int]]] = []
    if len(share.kept_all) < share.num_kv_heads:
        attn.student = _loaded(student_for(vllm_config, share, own.head_size), share)
    scores = {"scale": own.impl.scale, "softcap": own.impl.logits_soft_cap or None}
    if share.free:
        parts_of_state = len(share.free) // free_at_once(shares)
        layer = StudentLayer(attn.student, scores, parts_of_state, vllm_config, f"{prefix}.attn")
        if attn.student.uses_input:
            attn.register_forward_pre_hook(layer.take_input, with_kwargs=True)
        parts.append((layer, share.query_heads(share.free), list(share.free)))
    for number in range(0, len(share.kept), at_once or 1):
        groups = list(share.kept[number : number + at_once])
        kept = _kept(own, scores, share, groups, vllm_config, f"{prefix}.attn_kept{share.groups[groups[0]]}")
        parts.append((kept, share.query_heads(groups), groups))
    attn.attn = parts[0][0] if len(parts) == 1 else MixedAttention(parts, own.head_size)


def _loaded(student: StudentAttention, share: Share) -> StudentAttention:
    """The student, with the process's share of each parameter loaded from the folder's."""

    def load_share(parameter: nn.Parameter, whole: Tensor) -> None:
        """Called by vLLM with a tensor from the folder."""
        parameter.data.copy_(share.of_student(whole))

    for parameter in student.parameters():
        parameter.weight_loader = load_share  # type: ignore[attr-defined]
    return student


def _kept(
    own: Any, scores: dict[str, Any], share: Share, groups: list[int], vllm_config: Any, prefix: str
) -> nn.Module:
    """vLLM's attention for some groups of a layer whose whole attention was `own`."""
    made: nn.Module = Attention(
        len(groups) * share.heads,
        own.head_size,
        scores["scale"],
        num_kv_heads=len(groups),
        cache_config=vllm_config.cache_config,
        logits_soft_cap=scores["softcap"],
        per_layer_sliding_window=own.sliding_window,
        prefix=prefix,
    )
    return made

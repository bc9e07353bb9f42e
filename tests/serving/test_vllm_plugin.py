"""The vLLM plugin without vLLM: pages against whole sequences, heads per process, weight names, the classes.

`vllm_plugin/layers.py` and `models.py` run here against fakes of the few names that they import from vLLM.
`tests/vllm` runs them in vLLM, in an environment of its own (`make test-vllm`).
"""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tiny_families import tiny_model
from trenchcoat.config import FeatureMapConfig, StudentConfig, UserError
from trenchcoat.models import auto, hub
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.families import KNOWN_FAMILIES
from trenchcoat.serving.vllm_plugin import OPERATOR, register
from trenchcoat.serving.vllm_plugin.checks import check_model, check_options, settle_state_dtype, state_dtype
from trenchcoat.serving.vllm_plugin.families import BASES, MODELS
from trenchcoat.serving.vllm_plugin.pages import PageLayout, Pages, StepRequests
from trenchcoat.serving.vllm_plugin.shares import Share, every_share, free_at_once, kept_at_once, settle_heads
from trenchcoat.students import StudentAttention, build_student

HEADS, GROUPS, DIM, WIDTH = 4, 2, 8, 32
SMALL = FeatureMapConfig(feature_dim=6)
STUDENTS = {
    "terrace": StudentConfig(window=4, feature_map=SMALL),
    "sliding": StudentConfig(name="sliding", window=5, feature_map=SMALL, affine=True),
    "linear": StudentConfig(name="linear", feature_map=SMALL),
    "sinks": StudentConfig(window=4, sinks=2, feature_map=SMALL),
    "window_sinks": StudentConfig(name="window_sinks", window=4, sinks=2),
    "per_kv_head": StudentConfig(window=4, feature_map=SMALL, key_maps="per_kv_head"),
    "hedgehog": StudentConfig(window=4, sinks=2, feature_map=FeatureMapConfig(name="hedgehog", feature_dim=6)),
    "terrace_gated": StudentConfig(name="terrace_gated", window=4, sinks=2, feature_map=SMALL),
    "gdn": StudentConfig(name="gdn", window=4, sinks=2),
    "kda": StudentConfig(name="kda", window=4, sinks=2),
    "lightning": StudentConfig(name="lightning", window=4, sinks=2),
}


def random_student(cfg: StudentConfig, heads: int = HEADS, groups: int = GROUPS) -> StudentAttention:
    sizes = {"num_heads": heads, "num_kv_heads": groups, "head_dim": DIM, "hidden_size": WIDTH}
    student = build_student(cfg, **sizes).eval().requires_grad_(False)
    for parameter in student.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return student


def raw_pages(nbytes: int, count: int, padding: int = 0) -> Tensor:
    """Pages with random content, as vLLM allocates them."""
    return torch.randint(-128, 127, (count, nbytes + padding), dtype=torch.int8)


class Engine:
    """Requests of several lengths that arrive, prefill in chunks, decode together and finish, as in a server."""

    def __init__(self, lengths: list[int], pieces: list[list[int]], dtype: torch.dtype = torch.float32) -> None:
        self.q, self.k, self.v, self.x = (
            [torch.randn(length, width).to(dtype) for length in lengths]
            for width in (HEADS * DIM, GROUPS * DIM, GROUPS * DIM, WIDTH)
        )
        self.pieces, self.done = pieces, [0] * len(lengths)
        self.lengths = lengths

    def steps(self) -> Iterator[tuple[list[int], list[int]]]:
        """(requests, tokens of each) of each step: a step of one token is decoding, and comes first."""
        for plan in self.pieces:
            now = [(request, count) for request, count in enumerate(plan) if count]
            now.sort(key=lambda item: item[1] > 1)
            yield [request for request, _ in now], [count for _, count in now]

    def run(self, step: Any) -> list[Tensor]:
        """Every request's outputs, by `step(q, k, v, x, requests, starts, lengths, decodes)`."""
        outputs: list[list[Tensor]] = [[] for _ in self.lengths]
        for requests, counts in self.steps():
            spans = [slice(self.done[r], self.done[r] + n) for r, n in zip(requests, counts, strict=True)]
            streams = (
                torch.cat([stream[r][span] for r, span in zip(requests, spans, strict=True)])
                for stream in (self.q, self.k, self.v, self.x)
            )
            starts = [0]
            for request, count in zip(requests, counts, strict=True):
                starts.append(starts[-1] + count)
                self.done[request] += count
            lengths = [self.done[r] for r in requests]
            y = step(*streams, requests, starts, lengths, sum(n == 1 for n in counts))
            for request, begin, end in zip(requests, starts, starts[1:], strict=False):
                outputs[request].append(y[begin:end])
        assert self.done == self.lengths
        return [torch.cat(parts) for parts in outputs]


def plan() -> Engine:
    """Three requests: one chunk, then token by token; several chunks; one that starts with a single token. The same
    tokens at each call."""
    torch.manual_seed(4)
    pieces = [[9, 0, 0], [1, 6, 0], [1, 7, 0], [1, 1, 1], [1, 1, 1], [1, 1, 4], [0, 1, 1], [0, 1, 1], [0, 0, 7]]
    return Engine([14, 18, 15], pieces)


def whole(student: StudentAttention, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **scores: Any) -> Tensor:
    heads = [each.unflatten(-1, (-1, DIM)).transpose(0, 1)[None] for each in (q, k, v)]
    y, _ = student(*heads, **scores, **({"x_BTM": x[None]} if student.uses_input else {}))
    return y[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_steps_over_pages_give_what_whole_sequences_give(name: str, in_place: bool, parts: int) -> None:
    """Also where a state is in a page of each of two caches."""
    student = random_student(STUDENTS[name])
    raw, slots = raws(student, parts), ([3, 1, 4], [0, 4, 2])[:parts]
    found = page_outputs(student, raw, slots, in_place)
    engine = plan()
    for request, y in enumerate(found):
        streams = (stream[request] for stream in (engine.q, engine.k, engine.v, engine.x))
        expected = whole(student, *streams, scale=0.3)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["hedgehog", "terrace_gated"])
@torch.no_grad()
def test_kernels_decode_states_of_half_the_size_in_pages(name: str) -> None:
    """As PyTorch does, whose sums are rounded by the same thresholds."""
    found = {}
    for impl in ("chunkwise", "compiled"):
        for parts in (1, 2):
            torch.manual_seed(5)
            student = random_student(dataclasses.replace(STUDENTS[name], impl=impl))
            student.state_dtype = torch.bfloat16
            found[impl, parts] = page_outputs(student, raws(student, parts), ([3, 1, 4], [0, 4, 2])[:parts], True)
    for others in (("compiled", 1), ("compiled", 2), ("chunkwise", 2)):
        for y, want in zip(found[others], found["chunkwise", 1], strict=True):
            torch.testing.assert_close(y, want, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps)
    assert all(map(torch.equal, found["compiled", 1], found["compiled", 2]))


def raws(student: StudentAttention, parts: int) -> list[Tensor]:
    nbytes = PageLayout.of(student, torch.float32, parts).nbytes
    return [raw_pages(nbytes, 5, padding=16) for _ in range(parts)]


def page_outputs(student: StudentAttention, raw: list[Tensor], slots: Any, in_place: bool) -> list[Tensor]:
    """The outputs of the requests of `plan`, whose states are in the pages `slots` of each cache."""
    layout, engine = PageLayout.of(student, torch.float32, len(raw)), plan()
    pages = Pages(student, layout, tuple(raw), torch.float32, in_place)

    def step(
        q: Tensor, k: Tensor, v: Tensor, x: Tensor, requests: list[int], starts: Any, lengths: Any, decodes: int
    ) -> Tensor:
        steps = [StepRequests(starts, lengths, [slot[r] for r in requests], decodes) for slot in slots]
        return pages.attend((q, k, v), steps, x if student.uses_input else None, scale=0.3)

    others = [[page for page in range(5) if page not in slot] for slot in slots]
    untouched = [each[other].clone() for each, other in zip(raw, others, strict=True)]
    outputs = engine.run(step)
    for each, other, before in zip(raw, others, untouched, strict=True):
        assert each[other].equal(before), "another request's page was written"
    return outputs


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_aligned_and_as_large_as_the_state(name: str, dtype: torch.dtype) -> None:
    student = random_student(STUDENTS[name])
    layout = PageLayout.of(student, dtype)
    offset = 0
    for shape, kind in zip(layout.shapes, layout.dtypes, strict=True):
        assert offset % kind.itemsize == 0
        assert prod(shape) > 0
        offset += prod(shape) * kind.itemsize
    assert offset == student.empty_state(1, dtype=dtype).nbytes() - 8, "the server knows the tokens seen"
    assert 0 <= layout.nbytes - offset < 16
    assert layout.nbytes % 16 == 0
    assert set(layout.dtypes) <= {torch.float32, dtype}


def test_the_state_of_llama_3_1_8b() -> None:
    """The sizes given in docs/SERVE.md."""
    with torch.device("meta"):
        sizes = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "hidden_size": 4096}
        student = build_student(StudentConfig(name="terrace_gated"), **sizes)
    layout = PageLayout.of(student, torch.bfloat16)
    assert dict(zip(layout.names, layout.shapes, strict=True)) == {
        "far_s_BKFE": (32, 128, 128), "far_z_BKF": (32, 128), "log_forget_BKN1": (32, 128, 1),
        "log_input_BKN1": (32, 128, 1), "k_BGND": (8, 128, 128), "v_BGNE": (8, 128, 128),
    }  # fmt: skip
    assert layout.dtypes == (*[torch.float32] * 4, torch.bfloat16, torch.bfloat16)
    assert layout.nbytes == 2670592


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kept", [(), (1,), (0, 3)])
@pytest.mark.parametrize("name", ["terrace", "per_kv_head", "linear", "terrace_gated"])
@torch.no_grad()
def test_each_process_computes_its_share_of_the_heads(name: str, kept: tuple[int, ...], ranks: int) -> None:
    """With fewer processes than key/value heads, as many, and more, where neighbours share one."""
    groups, each = 4, 2
    free = [group for group in range(groups) if group not in kept]
    full = random_student(STUDENTS[name], heads=len(free) * each, groups=len(free))
    q, k, v = (torch.randn(1, heads, 13, DIM) for heads in (groups * each, groups, groups))
    heads = [group * each + head for group in free for head in range(each)]
    expected = torch.zeros_like(q)
    given: dict[str, Any] = {"scale": 0.3, **({"x_BTM": torch.randn(1, 13, WIDTH)} if full.uses_input else {})}
    expected[:, heads], _ = full(q[:, heads], k[:, free], v[:, free], **given)
    found = torch.zeros_like(q)
    for rank in range(ranks):
        share = Share(kept, groups * each, groups, rank, ranks)
        assert [share.groups[i] for i in share.kept] == [group for group in share.groups if group in kept]
        if not share.free:
            continue
        mine = random_student(STUDENTS[name], heads=len(share.free) * share.heads, groups=len(share.free))
        for (_, own), (_, parameter) in zip(mine.named_parameters(), full.named_parameters(), strict=True):
            own.copy_(share.of_student(parameter))
        first = rank * (groups * each // ranks)
        query = [first + head for head in share.query_heads(share.free)]
        keys = [share.groups[group] for group in share.free]
        found[:, query], _ = mine(q[:, query], k[:, keys], v[:, keys], **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("keep", "ranks", "at_once", "free"),
    [((), 1, 0, 4), (("1",), 1, 4, 4), (("0.1", "2"), 1, 1, 1), (("0.0", "0.1", "1.2", "1.3"), 1, 2, 2),
     (("1",), 2, 2, 2), (("0.0", "0.3"), 2, 1, 1), (("0.0", "1.0", "2.0"), 1, 1, 3)],
)  # fmt: skip
def test_pages_and_attentions_for_kept_groups_are_of_one_size(
    keep: tuple[str, ...], ranks: int, at_once: int, free: int
) -> None:
    shares = every_share(StudentConfig(keep=keep), 3, num_heads=8, num_kv_heads=4, ranks=ranks)
    assert len(shares) == 3 * ranks
    assert kept_at_once(shares) == at_once
    assert free_at_once(shares) == free


# The classes for vLLM, with fakes


class FakeKept(nn.Module):
    """In place of vLLM's `Attention`: returns its queries, which shows where its heads end up."""

    sliding_window = None

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, **options: Any) -> None:
        super().__init__()
        self.sizes, self.options = (num_heads, head_size, num_kv_heads), options
        self.head_size, self.layer_name = head_size, options["prefix"]
        self.impl = SimpleNamespace(scale=scale, logits_soft_cap=options.get("logits_soft_cap") or 0)
        CONTEXT.no_compile_layers[options["prefix"]] = self

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert (query.shape[1], key.shape[1]) == (self.sizes[0] * self.sizes[1], self.sizes[2] * self.sizes[1])
        return query


class FakeAttention(nn.Module):
    """The attribute of vLLM's attention modules that is used."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        sizes = (config.num_attention_heads, config.head_dim, config.head_dim**-0.5, config.num_key_value_heads)
        softcap = getattr(config, "attn_logit_softcapping", None)
        self.attn: Any = FakeKept(*sizes, logits_soft_cap=softcap, prefix=f"{prefix}.attn")

    def forward(self, qkv: tuple[Tensor, ...], hidden_states: Tensor) -> Tensor:
        """`qkv` in place of positions: what the projections would make of the input."""
        assert hidden_states.shape == (qkv[0].shape[0], WIDTH)
        return self.attn(*qkv)


class FakeLayer(nn.Module):
    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.self_attn = FakeAttention(config, f"{prefix}.self_attn")


class FakeModel(nn.Module):
    """A model of a pipeline's process that computes the layers of `PRESENT`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        CONTEXT.no_compile_layers = vllm_config.compilation_config.static_forward_context
        config = vllm_config.model_config.hf_config
        layers = [
            FakeLayer(config, f"model.layers.{index}") if index in PRESENT else nn.Identity()
            for index in range(config.num_hidden_layers)
        ]
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layers)


class FakeMambaBase:
    """Only the part that is used: the pages as bytes."""

    def bind_kv_cache(self, pages: Tensor) -> None:
        self.kv_cache = (pages,)


class FakeBuilder:
    """What vLLM's builder of metadata does with the metadata that all backends share."""

    def build(self, common_prefix_len: int, common: Any, fast_build: bool) -> Any:
        return SimpleNamespace(
            num_decodes=common.decodes, num_prefills=len(common.lengths) - common.decodes,
            seq_lens=torch.tensor([*common.lengths, 0], dtype=torch.int32),
            state_indices_tensor=torch.tensor([*common.slots, 0], dtype=torch.int32),
        )  # fmt: skip


class FakeMambaConfig:
    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        vllm_config.prepared = True


CONTEXT = SimpleNamespace(attn_metadata=None, no_compile_layers={})
PRESENT: set[int] = {0, 1}
REGISTERED: dict[str, Any] = {}
CONFIGS: dict[str, Any] = {}
OPERATORS: list[str] = []


@pytest.fixture
def glue(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`trenchcoat.serving.vllm_plugin.models`, imported with fakes for vLLM."""
    operators = SimpleNamespace()

    def register_operator(name: str, function: Any, *, mutates_args: list[str], fake_impl: Any) -> None:
        assert mutates_args == ["output"]
        setattr(operators, name, function)

    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"CompilationConfig": SimpleNamespace(_attention_ops=OPERATORS)},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 0,
                             "get_tensor_model_parallel_world_size": lambda: 1},
        "vllm.forward_context": {"get_forward_context": lambda: CONTEXT},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention": {"Attention": FakeKept},
        "vllm.model_executor.layers.mamba": {},
        "vllm.model_executor.layers.mamba.abstract": {"MambaBase": FakeMambaBase},
        "vllm.model_executor.layers.mamba.mamba_utils": {"get_temporal_copy_spec": "whole pages"},
        "vllm.model_executor.models": {
            "ModelRegistry": SimpleNamespace(register_model=lambda name, place: REGISTERED.update({name: place}))
        },
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": CONFIGS, "MambaModelConfig": FakeMambaConfig},
        "vllm.model_executor.models.interfaces": {
            "HasInnerState": type("A", (), {"has_inner_state": True}), "IsHybrid": type("B", (), {"is_hybrid": True}),
            "SupportsMambaPrefixCaching": type("C", (), {"supports_mamba_prefix_caching": True}),
        },
        **{f"vllm.model_executor.models.{module}": {name: FakeModel} for module, name in BASES.values()},
        "vllm.model_executor.models.utils": {"extract_layer_index": lambda prefix: int(prefix.split(".")[2])},
        "vllm.utils": {}, "vllm.utils.torch_utils": {"direct_register_custom_op": register_operator},
        "vllm.v1": {}, "vllm.v1.attention": {}, "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backend": {"AttentionCGSupport": SimpleNamespace(NEVER=0)},
        "vllm.v1.attention.backends.linear_attn": {"LinearAttentionBackend": object,
                                                   "LinearAttentionMetadataBuilder": FakeBuilder},
        "vllm.v1.attention.backends.registry": {"MambaAttentionBackendEnum": SimpleNamespace(LINEAR="linear")},
    }  # fmt: skip
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    ours = [f"trenchcoat.serving.vllm_plugin.{name}" for name in ("layers", "models")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.ops, "vllm", operators, raising=False)
    yield import_module("trenchcoat.serving.vllm_plugin.models")
    for name in ours:
        sys.modules.pop(name, None)


def merged(family: str, folder: Path, cfg: StudentConfig) -> tuple[Any, Path]:
    model = tiny_model(family)
    attach_students(model, cfg)
    set_mode(model, "student")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".student." in name:
                parameter.copy_(torch.randn_like(parameter))
    hub.save_merged(model, folder)
    return model, folder


def vllm_config(config: Any, **changes: Any) -> Any:
    """vLLM's configuration: `changes` are options of any of its sections."""
    sections: dict[str, dict[str, Any]] = {
        "model_config": {
            "hf_config": config,
            "dtype": torch.float32,
            "quantization": None,
            "model_arch_config": SimpleNamespace(total_num_kv_heads=GROUPS),
        },
        "cache_config": {"cache_dtype": "auto", "mamba_cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto"},
        "parallel_config": {"tensor_parallel_size": 1, "decode_context_parallel_size": 1},
        "compilation_config": {"static_forward_context": {}},
    }
    whole = {"speculative_config": None, "lora_config": None, "kv_transfer_config": None}
    for name, value in changes.items():
        next(section for section in (*sections.values(), whole) if name in section)[name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**section) for name, section in sections.items()}, **whole)


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "terrace"), ("gemma2", "terrace"), ("llama", "terrace_gated"), ("llama", "gdn")]
)
@torch.no_grad()
def test_a_merged_folder_in_the_vllm_classes(family: str, name: str, glue: Any, tmp_path: Path) -> None:
    """Weights load by their names in the folder, and each layer computes the same as in our own model."""
    ours, folder = merged(family, tmp_path / "merged", STUDENTS[name])
    settings = vllm_config(auto.linearized_config(ours.config, STUDENTS[name]))
    kind = getattr(glue, MODELS[f"Linearized{family.title()}ForCausalLM"].split(":")[1])
    model = kind(vllm_config=settings)
    assert (model.has_inner_state, model.is_hybrid, model.supports_mamba_prefix_caching) == (True, True, True)
    assert kind.get_mamba_state_copy_func() == ("whole pages",)

    stored = {name: t for name, t in load_file(folder / "model.safetensors").items() if ".student." in name}
    load(model, stored)
    context = settings.compilation_config.static_forward_context
    names = [f"model.layers.{index}.self_attn.attn" for index in range(2)]
    assert sorted(context) == sorted([*names, *(f"{name}_state0" for name in names)])
    layer = model.model.layers[1].self_attn.attn
    assert kind.get_mamba_state_shape_from_config(settings) == layer.caches[0].get_state_shape()
    assert kind.get_mamba_state_dtype_from_config(settings) == layer.caches[0].get_state_dtype()
    assert layer.scores == {"scale": DIM**-0.5, "softcap": 3.0 if family == "gemma2" else None}
    check_layer(model.model.layers[1].self_attn, layer, ours.model.layers[1].self_attn.student, slice(None))


def load(model: nn.Module, stored: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    for name, tensor in stored.items():
        parameters[name].weight_loader(parameters[name], tensor)
        assert parameters[name].dtype == torch.float32


def check_layer(attention: Any, layer: Any, student: StudentAttention, heads: Any) -> None:
    """Several requests over pages in `attention`, a layer's `self_attn` whose `heads` are those of `layer`, a
    `StudentLayer`."""
    engine, free, groups = plan(), range(HEADS)[heads], range(GROUPS)
    if student.kept is not None:
        groups = [group for group in range(GROUPS) if group not in student.kept.groups]
    for cache in layer.caches:
        cache.bind_kv_cache(raw_pages(cache.get_state_shape()[0][0], 8))
    builder = layer.caches[0].get_attn_backend().get_builder_cls()()

    def step(
        q: Tensor, k: Tensor, v: Tensor, x: Tensor, requests: list[int], starts: Any, lengths: Any, decodes: int
    ) -> Tensor:
        CONTEXT.attn_metadata = {}
        for number, cache in enumerate(layer.caches):
            common = SimpleNamespace(
                decodes=decodes, lengths=lengths, slots=[(request + 1) * (number + 1) for request in requests],
                query_start_loc_cpu=torch.tensor([*starts, starts[-1]]),
            )  # fmt: skip
            CONTEXT.attn_metadata[cache.prefix] = builder.build(0, common)
        *qkv, x = (torch.cat([stream, stream.new_ones(3, stream.shape[1])]) for stream in (q, k, v, x))
        return attention(qkv, hidden_states=x)[: q.shape[0]]

    found = engine.run(step)
    CONTEXT.attn_metadata = None
    found.append(attention((engine.q[0], engine.k[0], engine.v[0]), engine.x[0]))  # before there is a cache
    for request, y in zip((0, 1, 2, 0), found, strict=True):
        q, k, v = (x[request].unflatten(-1, (-1, DIM)) for x in (engine.q, engine.k, engine.v))
        expected = q.clone()
        inputs = (q[:, list(free)], k[:, list(groups)], v[:, list(groups)])
        flat = (each.flatten(1) for each in inputs)
        y_free = whole(student, *flat, engine.x[request], **layer.scores)
        expected[:, list(free)] = y_free.unflatten(-1, (-1, DIM))
        torch.testing.assert_close(y, expected.flatten(1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["terrace", "terrace_gated"])
@torch.no_grad()
def test_kept_groups_and_layers_are_attentions_of_vllm(name: str, glue: Any, tmp_path: Path) -> None:
    cfg = dataclasses.replace(STUDENTS[name], keep=("0.0",))
    ours, folder = merged("llama", tmp_path / "groups", cfg)
    settings = vllm_config(auto.linearized_config(ours.config, cfg))
    model = glue.LinearizedLlamaForCausalLM(vllm_config=settings)
    load(model, {name: t for name, t in load_file(folder / "model.safetensors").items() if ".student." in name})
    context = settings.compilation_config.static_forward_context
    first, second = "model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"
    states = [f"{first}_state0", f"{second}_state0", f"{second}_state1"]
    assert sorted(context) == sorted([first, f"{first}_kept0", second, *states])
    assert context[f"{first}_kept0"].sizes == (2, DIM, 1)
    assert len({context[name].get_state_shape() for name in states}) == 1, "pages of one size"
    attentions, students = ([layer.self_attn for layer in m.model.layers] for m in (model, ours))
    check_layer(attentions[0], context[first], students[0].student, slice(2, 4))
    check_layer(attentions[1], context[second], students[1].student, slice(None))
    settle_heads(settings)
    assert settings.model_config.model_arch_config.total_num_kv_heads == 1

    whole_layer = StudentConfig(window=4, feature_map=SMALL, keep_softmax=(1,))
    settings = vllm_config(auto.linearized_config(ours.config, whole_layer))
    model = glue.LinearizedLlamaForCausalLM(vllm_config=settings)
    assert model.model.layers[1].self_attn.attn.sizes == (HEADS, DIM, GROUPS)


def test_a_process_of_a_pipeline_has_the_states_of_its_layers(glue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And pages of the size that all processes agree on, also where its own layers keep nothing."""
    config = auto.linearized_config(tiny_model().config, StudentConfig(window=4, feature_map=SMALL, keep=("0.0",)))
    found = {}
    for layer in (0, 1):
        monkeypatch.setitem(globals(), "PRESENT", {layer})
        settings = vllm_config(config)
        model = glue.LinearizedLlamaForCausalLM(vllm_config=settings)
        assert {name.split(".")[2] for name, _ in model.named_parameters() if ".student." in name} == {str(layer)}
        found[layer] = settings.compilation_config.static_forward_context
        assert {name.split(".")[2] for name in found[layer]} == {str(layer)}
        assert glue.LinearizedLlamaForCausalLM.get_mamba_state_shape_from_config(settings) == next(
            cache.get_state_shape() for name, cache in found[layer].items() if "state" in name
        )
    assert len(found[0]) == len(found[1]) == 3, "a student, with a state and a kept group or with two states"


REFUSED = {
    "--speculative-config": {"speculative_config": object()},
    "--enable-lora": {"lora_config": object()},
    "--quantization fp8": {"quantization": "fp8"},
    "--kv-transfer-config": {"kv_transfer_config": object()},
    "--decode-context-parallel-size": {"decode_context_parallel_size": 2},
    "--kv-cache-dtype fp8": {"cache_dtype": "fp8"},
    "--mamba-ssm-cache-dtype float16": {"mamba_ssm_cache_dtype": "float16"},
    "--mamba-cache-dtype float16": {"mamba_cache_dtype": "float16"},
    "--dtype float32": {"mamba_cache_dtype": "float32", "dtype": torch.bfloat16},
    "needs --mamba-cache-dtype bfloat16": {"mamba_ssm_cache_dtype": "bfloat16"},
    "leave out --mamba-ssm-cache-dtype float32": {"mamba_cache_dtype": "bfloat16", "mamba_ssm_cache_dtype": "float32"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_without_effect_are_refused_by_name(option: str) -> None:
    check_options(vllm_config(None))
    with pytest.raises(UserError, match=option):
        check_options(vllm_config(None, **REFUSED[option]))


@pytest.mark.parametrize("name", ["gdn", "kda", "lightning"])
def test_heads_that_processes_cannot_share_are_refused(name: str) -> None:
    config = auto.linearized_config(tiny_model().config, STUDENTS[name])
    check_options(vllm_config(config))
    with pytest.raises(UserError, match=f"student.name={name} .*--tensor-parallel-size"):
        check_options(vllm_config(config, tensor_parallel_size=2))


def test_a_lora_that_is_not_merged_is_refused() -> None:
    config = auto.linearized_config(tiny_model().config, STUDENTS["terrace"])
    config.architectures = ["LinearizedLlamaForCausalLM"]
    check_model(config, MODELS)
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q_proj"]}
    with_lora = auto.linearized_config(config, STUDENTS["terrace"], lora=lora)
    with_lora.architectures = config.architectures
    with pytest.raises(UserError, match="LoRA is not merged"):
        check_model(with_lora, MODELS)


def test_students_in_place_of_whole_layers_are_refused() -> None:
    config = auto.linearized_config(tiny_model().config, StudentConfig(name="gated_delta_layer"))
    config.architectures = ["LinearizedLlamaForCausalLM"]
    with pytest.raises(UserError, match=r"gated_delta_layer takes the place of whole layers.*export FOLDER --native"):
        check_model(config, MODELS)


def test_a_scale_of_kept_groups_by_position_is_refused() -> None:
    config = auto.linearized_config(tiny_model().config, StudentConfig(keep=("0.1",), kept_log_scale=600.0))
    config.architectures = ["LinearizedLlamaForCausalLM"]
    with pytest.raises(UserError, match=r"student\.kept_log_scale=600: vLLM's own attention .*--engine embedded"):
        check_model(config, MODELS)


def test_states_of_half_the_size(glue: Any) -> None:
    """The options act, also where vLLM resets one of them afterwards."""
    config = auto.linearized_config(tiny_model().config, STUDENTS["terrace"])
    bytes_of = glue.LinearizedLlamaForCausalLM.get_mamba_state_shape_from_config
    plain = vllm_config(config)
    half = vllm_config(config, mamba_ssm_cache_dtype="bfloat16", dtype=torch.bfloat16)
    check_options(half)
    settle_state_dtype(half)
    half.cache_config.mamba_ssm_cache_dtype = "float32"
    assert (state_dtype(plain), state_dtype(half)) == (torch.float32, torch.bfloat16)
    assert bytes_of(half)[0][0] < 0.6 * bytes_of(plain)[0][0]


def test_the_entry_point_registers_every_model(glue: Any) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"trenchcoat": "trenchcoat.serving.vllm_plugin:register"}
    REGISTERED.clear()
    register()
    register()
    assert MODELS.items() <= REGISTERED.items()
    assert OPERATORS == [OPERATOR]
    assert CONFIGS.keys() == REGISTERED.keys()
    assert MODELS.keys() <= {auto.model_class(family).__name__ for family in KNOWN_FAMILIES}
    config = auto.linearized_config(tiny_model().config, STUDENTS["terrace"])
    for architecture, place in MODELS.items():
        module, name = place.split(":")
        assert getattr(import_module(module), name)
        settings = vllm_config(config)
        CONFIGS[architecture].verify_and_update_model_config(
            SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
        )
        CONFIGS[architecture].verify_and_update_config(settings)
        assert settings.prepared
        with pytest.raises(UserError, match="speculative"):
            CONFIGS[architecture].verify_and_update_config(vllm_config(None, speculative_config=object()))


def test_a_family_without_a_class_is_refused_with_what_to_do(glue: Any) -> None:
    register()
    config = auto.linearized_config(tiny_model("olmo2").config, STUDENTS["terrace"])
    config.architectures = ["LinearizedOlmo2ForCausalLM"]
    module, name = REGISTERED["LinearizedOlmo2ForCausalLM"].split(":")
    assert getattr(import_module(module), name)
    with pytest.raises(UserError, match=r"linearized_olmo2.*no class for vLLM.*--engine embedded"):
        CONFIGS["LinearizedOlmo2ForCausalLM"].verify_and_update_model_config(SimpleNamespace(hf_config=config))

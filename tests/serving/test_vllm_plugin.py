"""The vLLM plugin without vLLM: pages against whole sequences, heads per process, weight names, the classes.

`vllm_plugin/models.py` runs here against fakes of the few names that it imports from vLLM, modelled on the sources
of 0.33.0; this shows that it is valid Python with the right arithmetic, not that vLLM accepts it.
"""

from __future__ import annotations

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
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.models import auto, hub
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.serving.vllm_plugin import MODELS, register
from trenchcoat.serving.vllm_plugin.pages import PageLayout, StepRequests, attend_pages, heads_of_rank
from trenchcoat.students import StudentAttention, build_student

HEADS, GROUPS, DIM = 4, 2, 8
SMALL = FeatureMapConfig(feature_dim=6)
STUDENTS = {
    "terrace": StudentConfig(window=4, feature_map=SMALL),
    "sliding": StudentConfig(name="sliding", window=5, feature_map=SMALL, affine=True),
    "linear": StudentConfig(name="linear", feature_map=SMALL),
    "sinks": StudentConfig(window=4, sinks=2, feature_map=SMALL),
    "window_sinks": StudentConfig(name="window_sinks", window=4, sinks=2),
    "per_kv_head": StudentConfig(window=4, feature_map=SMALL, key_maps="per_kv_head"),
}


def random_student(cfg: StudentConfig, heads: int = HEADS, groups: int = GROUPS) -> StudentAttention:
    student = build_student(cfg, num_heads=heads, num_kv_heads=groups, head_dim=DIM).eval().requires_grad_(False)
    for parameter in student.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return student


def bound(layout: PageLayout, count: int, padding: int = 0) -> tuple[Tensor, ...]:
    """Pages as vLLM's `MambaBase.bind_kv_cache` cuts them out of raw bytes, with random content."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)]
    raw = torch.randint(-128, 127, (count, sum(sizes) + padding), dtype=torch.int8)
    pages, offset = [], 0
    for shape, dtype, size in zip(layout.shapes, layout.dtypes, sizes, strict=True):
        pages.append(raw[:, offset : offset + size].view(dtype).view(-1, *shape))
        offset += size
    return tuple(pages)


class Engine:
    """Requests of several lengths that arrive, prefill in chunks, decode together and finish, as in a server."""

    def __init__(self, lengths: list[int], pieces: list[list[int]], dtype: torch.dtype = torch.float32) -> None:
        self.q, self.k, self.v = (
            [torch.randn(length, heads * DIM).to(dtype) for length in lengths] for heads in (HEADS, GROUPS, GROUPS)
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
        """Every request's outputs, by `step(q, k, v, requests, starts, lengths, decodes)`."""
        outputs: list[list[Tensor]] = [[] for _ in self.lengths]
        for requests, counts in self.steps():
            spans = [slice(self.done[r], self.done[r] + n) for r, n in zip(requests, counts, strict=True)]
            q, k, v = (
                torch.cat([x[r][span] for r, span in zip(requests, spans, strict=True)])
                for x in (self.q, self.k, self.v)
            )
            starts = [0]
            for request, count in zip(requests, counts, strict=True):
                starts.append(starts[-1] + count)
                self.done[request] += count
            lengths = [self.done[r] for r in requests]
            y = step(q, k, v, requests, starts, lengths, sum(n == 1 for n in counts))
            for request, begin, end in zip(requests, starts, starts[1:], strict=False):
                outputs[request].append(y[begin:end])
        assert self.done == self.lengths
        return [torch.cat(parts) for parts in outputs]


def plan() -> Engine:
    """Three requests: one chunk, then token by token; several chunks; one that starts with a single token."""
    pieces = [[9, 0, 0], [1, 6, 0], [1, 7, 0], [1, 1, 1], [1, 1, 1], [1, 1, 4], [0, 1, 1], [0, 1, 1], [0, 0, 7]]
    return Engine([14, 18, 15], pieces)


def whole(student: StudentAttention, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    heads = [x.unflatten(-1, (-1, DIM)).transpose(0, 1)[None] for x in (q, k, v)]
    y, _ = student(*heads, scale=scale)
    return y[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_steps_over_pages_give_what_whole_sequences_give(name: str) -> None:
    student = random_student(STUDENTS[name])
    layout = PageLayout.of(student, torch.float32)
    pages, engine = bound(layout, 5, padding=4), plan()
    slot = [3, 1, 4]

    def step(q: Tensor, k: Tensor, v: Tensor, requests: list[int], starts: Any, lengths: Any, decodes: int) -> Tensor:
        slots = torch.tensor([slot[r] for r in requests], dtype=torch.int32)
        return attend_pages(student, layout, pages, (q, k, v), StepRequests(starts, lengths, slots, decodes), scale=0.3)

    untouched = [page[[0, 2]].clone() for page in pages]
    outputs = engine.run(step)
    for request, y in enumerate(outputs):
        expected = whole(student, engine.q[request], engine.k[request], engine.v[request], 0.3)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-5)
    for page, before in zip(pages, untouched, strict=True):
        assert page[[0, 2]].view(torch.uint8).equal(before.view(torch.uint8)), "another request's page was written"


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
    assert offset % 4 == 0
    assert offset == student.empty_state(1, dtype=dtype).nbytes() - 4, "tokens seen take four bytes, not eight"
    assert set(layout.dtypes) <= {torch.int32, torch.float32, dtype}


def test_the_state_of_llama_3_1_8b() -> None:
    """The sizes given in docs/SERVE.md."""
    cfg = StudentConfig()
    with torch.device("meta"):
        student = build_student(cfg, num_heads=32, num_kv_heads=8, head_dim=128)
    layout = PageLayout.of(student, torch.bfloat16)
    assert dict(zip(layout.names, layout.shapes, strict=True)) == {
        "seen_B": (1,), "far_s_BKFE": (32, 128, 128), "far_z_BKF": (32, 128),
        "k_BGND": (8, 128, 128), "v_BGNE": (8, 128, 128),
    }  # fmt: skip
    assert layout.dtypes == (torch.int32, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["terrace", "per_kv_head", "linear"])
@torch.no_grad()
def test_each_process_computes_its_share_of_the_heads(name: str, ranks: int) -> None:
    """With as many processes as key/value heads, and with more, where neighbours share one."""
    full = random_student(STUDENTS[name])
    q, k, v = torch.randn(1, HEADS, 13, DIM), torch.randn(1, GROUPS, 13, DIM), torch.randn(1, GROUPS, 13, DIM)
    expected, _ = full(q, k, v, scale=0.3)
    parts = []
    for rank in range(ranks):
        share = random_student(STUDENTS[name], heads=HEADS // ranks, groups=max(1, GROUPS // ranks))
        for (_, own), (_, given) in zip(share.named_parameters(), full.named_parameters(), strict=True):
            own.copy_(heads_of_rank(given, rank, ranks))
        mine = [heads_of_rank(x[0], rank, ranks)[None] for x in (q, k, v)]
        parts.append(share(*mine, scale=0.3)[0])
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-6)


# The classes for vLLM, with fakes


class FakeAttention(nn.Module):
    """The attributes of `LlamaAttention` that are used."""

    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.attn: Any = nn.Identity()
        vllm_config.compilation_config.static_forward_context[f"{prefix}.attn"] = self.attn


class FakeLayer(nn.Module):
    def __init__(self, *, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__()
        self.self_attn = FakeAttention(vllm_config.model_config.hf_config, vllm_config, f"{prefix}.self_attn")


class FakeModel(nn.Module):
    def __init__(self, *, vllm_config: Any, prefix: str = "", layer_type: Any = FakeLayer) -> None:
        super().__init__()
        self.model = nn.Module()
        layers = vllm_config.model_config.hf_config.num_hidden_layers
        made = [layer_type(vllm_config=vllm_config, prefix=f"model.layers.{index}") for index in range(layers)]
        self.model.layers = nn.ModuleList(made)


class FakeMambaBase:
    """Only the part that is used: binding views of raw pages."""

    kv_cache: tuple[Tensor, ...]

    def bind_kv_cache(self, pages: tuple[Tensor, ...]) -> None:
        self.kv_cache = pages


CONTEXT = SimpleNamespace(attn_metadata=None)
REGISTERED: dict[str, Any] = {}


@pytest.fixture
def glue(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`trenchcoat.serving.vllm_plugin.models`, imported with fakes for vLLM."""
    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 0,
                             "get_tensor_model_parallel_world_size": lambda: 1},
        "vllm.forward_context": {"get_forward_context": lambda: CONTEXT},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.mamba": {},
        "vllm.model_executor.layers.mamba.abstract": {"MambaBase": FakeMambaBase},
        "vllm.model_executor.models": {
            "ModelRegistry": SimpleNamespace(register_model=lambda name, place: REGISTERED.update({name: place}))
        },
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": {}, "MambaModelConfig": object()},
        "vllm.model_executor.models.interfaces": {"HasInnerState": type("A", (), {"has_inner_state": True}),
                                                  "IsAttentionFree": type("B", (), {"is_attention_free": True})},
        "vllm.model_executor.models.llama": {"LlamaDecoderLayer": FakeLayer, "LlamaForCausalLM": FakeModel},
        "vllm.model_executor.models.mistral": {"MistralDecoderLayer": FakeLayer,
                                               "MistralForCausalLM": FakeModel},
        "vllm.v1": {}, "vllm.v1.attention": {}, "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": {"MambaAttentionBackendEnum": SimpleNamespace(LINEAR="linear")},
    }  # fmt: skip
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "trenchcoat.serving.vllm_plugin.models", raising=False)
    yield import_module("trenchcoat.serving.vllm_plugin.models")
    sys.modules.pop("trenchcoat.serving.vllm_plugin.models", None)


def merged(family: str, folder: Path) -> tuple[Any, Path]:
    model = tiny_model(family)
    attach_students(model, STUDENTS["terrace"])
    set_mode(model, "student")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".student." in name:
                parameter.copy_(torch.randn_like(parameter))
    hub.save_merged(model, folder)
    return model, folder


def vllm_config(config: Any, **changes: Any) -> Any:
    given = {"enforce_eager": True, "enable_prefix_caching": False, **changes}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, dtype=torch.float32, enforce_eager=given["enforce_eager"]),
        cache_config=SimpleNamespace(enable_prefix_caching=given["enable_prefix_caching"]),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_a_merged_folder_in_the_vllm_classes(family: str, glue: Any, tmp_path: Path) -> None:
    """Weights load by their names in the folder, and each layer computes the same as in our own model."""
    ours, folder = merged(family, tmp_path / "merged")
    config = ours.config
    linear = auto.linearized_config(config, STUDENTS["terrace"])
    settings = vllm_config(linear)
    kind = getattr(glue, MODELS[f"Linearized{family.title()}ForCausalLM"].split(":")[1])
    model = kind(vllm_config=settings)
    assert (model.has_inner_state, model.is_attention_free) == (True, True)

    stored = {name: t for name, t in load_file(folder / "model.safetensors").items() if ".student." in name}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    for name, tensor in stored.items():
        parameters[name].weight_loader(parameters[name], tensor)
        assert parameters[name].dtype == torch.float32

    context = settings.compilation_config.static_forward_context
    assert list(context) == [f"model.layers.{index}.self_attn.attn" for index in range(2)]
    assert (
        kind.get_mamba_state_shape_from_config(settings) == context["model.layers.0.self_attn.attn"].get_state_shape()
    )
    assert (
        kind.get_mamba_state_dtype_from_config(settings) == context["model.layers.0.self_attn.attn"].get_state_dtype()
    )
    student = ours.model.layers[1].self_attn.student
    layer, engine = model.model.layers[1].self_attn.attn, plan()
    layer.bind_kv_cache(bound(layer.layout, 5))

    def step(q: Tensor, k: Tensor, v: Tensor, requests: list[int], starts: Any, lengths: Any, decodes: int) -> Tensor:
        CONTEXT.attn_metadata = {layer.prefix: SimpleNamespace(
            num_decodes=decodes, num_decode_tokens=decodes, num_prefills=len(requests) - decodes,
            num_prefill_tokens=starts[-1] - decodes, query_start_loc=torch.tensor(starts),
            seq_lens=torch.tensor(lengths), state_indices_tensor=torch.tensor(requests, dtype=torch.int32) + 1,
        )}  # fmt: skip
        padded = [torch.cat([x, x.new_ones(3, x.shape[1])]) for x in (q, k, v)]
        return layer(*padded)[: q.shape[0]]

    for request, y in enumerate(engine.run(step)):
        expected = whole(student, engine.q[request], engine.k[request], engine.v[request], DIM**-0.5)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-5)
    CONTEXT.attn_metadata = None
    assert not layer(engine.q[0], engine.k[0], engine.v[0]).any()


def test_unsupported_settings_are_refused(glue: Any) -> None:
    config = auto.linearized_config(tiny_model().config, STUDENTS["terrace"])
    for changes, option in (({"enforce_eager": False}, "--enforce-eager"),
                            ({"enable_prefix_caching": True}, "--no-enable-prefix-caching")):  # fmt: skip
        with pytest.raises(ValueError, match=option):
            glue.LinearizedLlamaForCausalLM(vllm_config=vllm_config(config, **changes))
    settings: tuple[dict[str, Any], ...] = ({"keep_softmax": (0,)}, {"keep": ("0.1",)})
    for setting in settings:
        kept = auto.linearized_config(tiny_model().config, StudentConfig(window=4, feature_map=SMALL, **setting))
        with pytest.raises(ValueError, match="keep_softmax"):
            glue.LinearizedLlamaForCausalLM(vllm_config=vllm_config(kept))


def test_the_entry_point_registers_every_model(glue: Any) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"trenchcoat": "trenchcoat.serving.vllm_plugin:register"}
    REGISTERED.clear()
    register()
    register()
    assert REGISTERED == MODELS
    configured = sys.modules["vllm.model_executor.models.config"].MODELS_CONFIG_MAP
    assert configured.keys() == MODELS.keys()
    for architecture, place in MODELS.items():
        module, name = place.split(":")
        assert getattr(import_module(module), name)
        family = architecture.removeprefix("Linearized").removesuffix("ForCausalLM").lower()
        assert auto.model_class(family).__name__ == architecture

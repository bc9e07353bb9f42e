"""Memories in chunks against their definitions, over chunk edges; what is expected of Transformers' functions and of
flash-linear-attention's."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trenchcoat.ops import delta_rule, fla_kernels, recurrences
from trenchcoat.ops.chunked import decayed

HEADS, DIM, VALUES = 3, 5, 4
LENGTHS = (1, 4, 5, 63, 64, 65, 131)
FLOAT32 = {"rtol": 0.0, "atol": 5e-5}
"""Values of order 1 after up to 131 tokens, each with a few roundings of float32 (6e-8)."""


def _inputs(length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k (of length 1), v, log gates (`channels`: one a key channel), beta, a mask with gaps, an initial memory."""

    def random(*shape: int) -> Tensor:
        return torch.randn(2, HEADS, *shape, dtype=torch.float64)

    real = torch.rand(2, length) > 0.2
    there = real[:, None].to(dtype)
    shapes = {
        "q": (length, DIM), "k": (length, DIM), "v": (length, VALUES), "forget": (length,), "beta": (length,),
        "channels": (length, DIM),
    }  # fmt: skip
    leaves = {name: random(*shape).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return {
        "q": leaves["q"], "k": normalize(leaves["k"], dim=-1) * there[..., None],
        "v": leaves["v"] * there[..., None], "forget": -leaves["forget"].square() * there,
        "channels": -leaves["channels"].square() * there[..., None],
        "beta": leaves["beta"].sigmoid() * there, "start": random(DIM, VALUES).to(dtype).requires_grad_(),
        "real": real, **{f"leaf {name}": leaf for name, leaf in leaves.items()},
    }  # fmt: skip


def _compared(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], x: dict[str, Tensor], **close: float
) -> None:
    """Outputs at tokens, the memory after them, and all gradients."""
    real, leaves = x["real"][:, None, :, None], [t for t in x.values() if t.requires_grad and t.is_leaf]
    weights = [torch.randn_like(part) for part in wanted]
    gradients = []
    for y, state in (found, wanted):
        loss = (y * real * weights[0]).sum() + (state * weights[1]).sum()
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        gradients.append(torch.autograd.grad(loss, list(dict.fromkeys(leaves)), **options))
    torch.testing.assert_close(found[0] * real, wanted[0] * real, **close)
    torch.testing.assert_close(found[1], wanted[1], **close)
    for grad, want in zip(*gradients, strict=True):
        size = want.abs().max().clamp_min(1.0)
        torch.testing.assert_close(grad / size, want / size, **close)


@pytest.mark.parametrize("length", LENGTHS)
def test_sums_with_a_forget_gate(length: int) -> None:
    x = _inputs(length, torch.float64)
    found = decayed.gated_sums(x["q"], x["k"], x["v"], x["forget"], x["start"])
    wanted = recurrences.gated_sums(x["q"], x["k"], x["v"], x["forget"], x["real"], x["start"])
    _compared(found, wanted, x, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("rule", "forget"), [("gated_delta", "forget"), ("kimi_delta", "channels")])
def test_the_delta_rules_of_transformers(rule: str, forget: str, length: int) -> None:
    x = _inputs(length, torch.float32)
    found = getattr(delta_rule, rule)(x["q"], x["k"], x["v"], x[forget], x["beta"], x["start"])
    wanted = getattr(recurrences, rule)(x["q"], x["k"], x["v"], x[forget], x["beta"], x["real"], x["start"])
    _compared(found, wanted, x, **FLOAT32)


@pytest.mark.parametrize(
    ("model", "name"),
    [(model, name) for model, *names in (delta_rule.GATED_DELTA, delta_rule.KIMI_DELTA) for name in names],
)
def test_transformers_functions_are_those_in_pytorch(model: str, name: str) -> None:
    """Not a kernel that Transformers would put in their place, whatever is installed."""
    function = delta_rule._function(model, name)
    assert function.__code__.co_name == name
    assert "transformers" in function.__code__.co_filename
    wanted = ["query", "key", "value", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"]
    given = inspect.signature(function).parameters
    assert [each for each in given if each in wanted] == wanted
    assert given["use_qk_l2norm_in_kernel"].default is False


# flash-linear-attention


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins with the signatures of fla-core 0.6.0, which compute by the definitions; the names of those called."""
    called: list[str] = []

    def first(x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return x.transpose(1, 2)

    def delta(name: str) -> Any:
        def run(
            q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
            initial_state: Tensor, output_final_state: bool,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            called.append(name)
            assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
            assert {x.dtype for x in (g, beta, initial_state)} == {torch.float32}
            assert output_final_state
            real = torch.ones(q.shape[:2], dtype=torch.bool)
            parts = [first(x).float() for x in (q, k, v, g, beta)]
            rule = recurrences.gated_delta if g.ndim == 3 else recurrences.kimi_delta
            y, state = rule(*parts, real, initial_state)
            return (y * scale * DIM**0.5).transpose(1, 2).to(v.dtype), state

        return run

    def sums(name: str) -> Any:
        def run(
            q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor, output_final_state: bool
        ) -> tuple[Tensor, Tensor]:
            called.append(name)
            assert (v.dtype, g.dtype, initial_state.dtype) == (torch.bfloat16, torch.float32, torch.float32)
            assert output_final_state
            real = torch.ones(q.shape[:2], dtype=torch.bool)
            y, state = recurrences.gated_sums(*(first(x).float() for x in (q, k, v, g)), real, initial_state)
            return (y * scale).transpose(1, 2).to(v.dtype), state

        return run

    kernels = {
        "fla.ops.gated_delta_rule": (delta, "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
        "fla.ops.kda": (delta, "chunk_kda", "fused_recurrent_kda"),
        "fla.ops.simple_gla": (sums, "chunk_simple_gla", "fused_recurrent_simple_gla"),
    }
    for path, (make, *names) in kernels.items():
        module = ModuleType(path)
        for each in names:
            setattr(module, each, make(each))
        monkeypatch.setitem(sys.modules, path, module)
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    return called


@pytest.mark.parametrize("length", [1, 16, 17, 70])
def test_kernels_get_their_arguments_as_they_expect_them(length: int, fla: list[str]) -> None:
    """Tokens before heads, float32 gates and memory, our scale; one token after the other only where nothing learns."""
    x = {name: t.detach() for name, t in _inputs(length, torch.float32).items()}
    q, k, v = (x[name].bfloat16() for name in ("q", "k", "v"))
    exact = [t.float() for t in (q, k, v)]
    pairs: Any = (
        (fla_kernels.gated_delta, (x["forget"], x["beta"]), recurrences.gated_delta),
        (fla_kernels.kimi_delta, (x["channels"], x["beta"]), recurrences.kimi_delta),
        (fla_kernels.gated_sums, (x["forget"],), recurrences.gated_sums),
    )
    for run, gates, definition in pairs:
        with torch.no_grad():
            y, state = run(q, k, v, *gates, x["start"])
        wanted, last = definition(*exact, *gates, torch.ones_like(x["real"]), x["start"])
        torch.testing.assert_close(y.float(), wanted, rtol=2**-8, atol=1e-6)  # one rounding to bfloat16
        torch.testing.assert_close(state, last)
        run(q, k, v, *gates, x["start"])
    few = ["fused_recurrent_gated_delta_rule", "fused_recurrent_kda", "fused_recurrent_simple_gla"]
    many = ["chunk_gated_delta_rule", "chunk_kda", "chunk_simple_gla"]
    assert fla[::2] == (few if length <= 16 else many)
    assert fla[1::2] == many


def test_why_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed; pip install triton")
    from trenchcoat.ops.triton import assembler

    cuda = torch.device("cuda", 0)
    assert "not a CUDA device" in str(fla_kernels.obstacle(torch.bfloat16, torch.device("cpu")))
    assert "not torch.float32" in str(fla_kernels.obstacle(torch.float32, cuda))
    monkeypatch.setattr(fla_kernels, "find_spec", lambda name: None)
    assert "pip install" in str(fla_kernels.obstacle(torch.bfloat16, cuda))
    monkeypatch.setattr(fla_kernels, "find_spec", lambda name: object())
    for capability, triton, said in (
        ((9, 0), "3.6.0+git12", "on Hopper the backward"), ((9, 0), "3.7.1", None), ((8, 0), "3.6.0", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=capability: is_)
        monkeypatch.setattr(assembler, "VERSION", triton)
        monkeypatch.setattr(assembler, "obstacle", lambda device: None)
        found = fla_kernels.obstacle(torch.bfloat16, cuda)
        assert found is None if said is None else said in str(found)
    monkeypatch.setattr(assembler, "obstacle", lambda device: "of the assembler")
    assert fla_kernels.obstacle(torch.bfloat16, cuda) == "of the assembler"

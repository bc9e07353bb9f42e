"""The Triton kernels at realistic sizes: against the float64 reference on the GPU, bitwise equal in twenty runs, on
poisoned memory, captured in a CUDA graph, and decoding many rows of different lengths.

Without a GPU the same tests run once at small sizes in Triton's interpreter, with ordinary instead of captured steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_kit import DEVICE, KernelCase, group, name_of, output_tolerances
from low_precision import DRAWS
from operator_kit import budget, error
from trenchcoat.bench.kernels_decode import Loop, student_cache
from trenchcoat.bench.llama import LlamaShape, random_llama
from trenchcoat.bench.timing import captured
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.models.attach import set_mode
from trenchcoat.ops import StateSizes, StudentState, Tokens
from trenchcoat.ops.triton import attention, check, decode
from trenchcoat.students import StudentAttention, build_student

GPU = DEVICE != "cpu"
pytestmark = [pytest.mark.gpu] if GPU else []
"""`-m gpu` selects this file if there is a GPU; otherwise its small sizes are part of the ordinary tests."""
RUNS = 20 if GPU else 2


@dataclass(frozen=True, kw_only=True)
class Sized(KernelCase):
    """A call with scores and features of unit size for any head dimension, as in a model."""

    @property
    def rule(self) -> Any:
        """Scores divided by sqrt(D)."""
        return replace(super().rule, scale=self.dim**-0.5)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The maps divided by sqrt(D)."""
        made = super().leaves(dtype)
        for name in ("query_matrix", "key_matrix"):
            made[name] = (made[name].detach() * self.dim**-0.5).to(torch.bfloat16).to(dtype).requires_grad_()
        return made


def _case(small: dict[str, Any], large: dict[str, Any], **both: Any) -> Sized:
    ours = {"heads": 8, "kv_heads": 2, "key_maps": 8, "window": 64}
    shape = ours if GPU else {"batch": 1, "heads": 1, "key_maps": 1, "window": 3}
    return Sized(**{**shape, **both, **(large if GPU else small)})


CASES = [
    _case({"tokens": 8, "dim": 4, "values": 4}, {"tokens": 1000, "dim": 64, "values": 64, "columns": 16}),
    _case(
        {"tokens": 9, "heads": 2, "groups": 2}, {"tokens": 4096, "dim": 128, "values": 128, "columns": 64, "batch": 1}
    ),
    _case(
        {"tokens": 7, "dim": 5, "values": 5},
        {"tokens": 1000, "dim": 96, "values": 96, "columns": 64, "window": 37, "key_maps": 2}, mask="left",
    ),
    _case({"tokens": 7, "columns": 5}, {"tokens": 1000, "dim": 128, "values": 128, "columns": 128}),
    _case(
        {"tokens": 7, "dim": 9, "values": 9},
        {"tokens": 1000, "dim": 256, "values": 256, "columns": 64, "window": 32, "kv_heads": 8},
    ),
    _case(
        {"tokens": 8, "groups": 2}, {"tokens": 4096, "dim": 64, "values": 64, "columns": 64, "window": 50, "batch": 1},
        kind="sliding", map="t2r", bias=True,
    ),
    _case(
        {"tokens": 7, "columns": 3}, {"tokens": 1000, "dim": 128, "values": 128, "columns": 32, "window": 17},
        kind="sliding", mask="odd", options={"sinks": 4}, sink_logit=True,
    ),
    _case(
        {"tokens": 8, "groups": 2}, {"tokens": 4096, "dim": 64, "values": 64, "columns": 128, "batch": 1},
        kind="linear", map="elu", bias=True,
    ),
    _case({"tokens": 7}, {"tokens": 1000, "dim": 96, "values": 96, "columns": 64}, kind="linear", mask="right"),
]  # fmt: skip


def _grouped(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the device's size determines the groups; elsewhere the case does."""
    if not GPU:
        group(monkeypatch, case.groups)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_and_gradients_in_bfloat16(case: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the tolerance of :func:`low_precision.tolerances`, for rows without padding; the large sizes use only two
    draws, as the largest of so many numbers hardly varies."""
    _grouped(case, monkeypatch)
    exact, found = case.reference(torch.float64), case.kernels(torch.bfloat16)
    allowed = output_tolerances(replace(case, mask=None), torch.bfloat16, draws=2 if GPU else DRAWS)
    for name, value in exact.items():
        assert float((found[name] - value).abs().max()) <= allowed[name], name


@pytest.mark.parametrize("case", CASES[1::3], ids=name_of)
def test_every_run_gives_the_same_bits(case: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    _grouped(case, monkeypatch)
    first = case.kernels(torch.bfloat16)
    for _ in range(RUNS - 1):
        again = case.kernels(torch.bfloat16)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def _transfer(case: Sized) -> list[Tensor]:
    """Summed squared error and its gradients."""
    leaves = {name: t.detach() for name, t in case.leaves(torch.float32).items()}
    tokens, make = case.qkv(leaves, torch.bfloat16), torch.Generator().manual_seed(3)
    y = torch.randn(*tokens.q_BHTD.shape[:3], case.values, generator=make).to(DEVICE, torch.bfloat16)
    total, grads = attention.transfer_error(tokens, y, case.maps(leaves), case.weights(leaves), case.rule)
    return [total, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[7]], ids=name_of)
def test_transfer_gives_the_same_bits(case: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    _grouped(case, monkeypatch)
    first = _transfer(case)
    assert len(first) >= 4
    for _ in range(RUNS - 1):
        assert all(torch.equal(a, b) for a, b in zip(_transfer(case), first, strict=True))


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[5]], ids=name_of)
def test_nothing_uninitialised_is_read(case: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN, which exposes reads before writes and missing writes."""
    _grouped(case, monkeypatch)
    wanted, learned = case.kernels(torch.bfloat16), None if case.mask else _transfer(case)
    with monkeypatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, partial(_poisoned, getattr(owner, name)) if owner is torch else _method(name))
        found, again = case.kernels(torch.bfloat16), None if case.mask else _transfer(case)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    for a, b in zip(again or [], learned or [], strict=True):
        assert torch.equal(a, b)


def _poisoned(make: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    x = make(*args, **options)
    return x.fill_(float("nan")) if x.is_floating_point() else x


def _method(name: str) -> Callable[..., Tensor]:
    make = getattr(torch.Tensor, name)
    return lambda self, *args, **options: _poisoned(make, self, *args, **options)


# Decoding


STEPS, WINDOW, DIM, COLUMNS, ROWS = (200, 64, 128, 64, 64) if GPU else (7, 2, 6, 4, 3)
HEADS = {"num_heads": 8 if GPU else 2, "num_kv_heads": 2 if GPU else 1, "head_dim": DIM}


@pytest.fixture
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:  # the self-check takes seconds in the interpreter and has its own test
        monkeypatch.setattr(check, "check", lambda device: None)


def _student(kind: str) -> StudentAttention:
    phi = FeatureMapConfig(feature_dim=COLUMNS, init="kaiming")
    cfg = StudentConfig(name=kind, window=WINDOW, feature_map=phi, impl="triton")
    return build_student(cfg, **HEADS).to(DEVICE).requires_grad_(False)


def _tokens(rows: int, count: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(5)
    heads = (HEADS["num_heads"], HEADS["num_kv_heads"], HEADS["num_kv_heads"])
    return [torch.randn(rows, h, count, DIM, generator=make).to(DEVICE, torch.bfloat16) for h in heads]


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_a_captured_step_is_the_ordinary_one(kind: str) -> None:
    """Bitwise equal over many tokens, folds included, starting from an empty state."""
    student, x = _student(kind), _tokens(2, STEPS)
    ordinary, graphed = (student.empty_state(2, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    given = [t[:, :, :1].clone() for t in x]
    held: list[Tensor] = [torch.empty_like(given[0])]

    def work() -> None:
        held[0].copy_(student.decode(*given, state=graphed, scale=DIM**-0.5))

    step = captured(work, DEVICE)
    graphed.zero_()
    for t in range(STEPS):
        for place, whole in zip(given, x, strict=True):
            place.copy_(whole[:, :, t : t + 1])
        step()
        wanted = student.decode(*given, state=ordinary, scale=DIM**-0.5)
        assert torch.equal(held[0], wanted), t
    for name, tensor in ordinary.tensors().items():
        assert torch.equal(graphed.tensors()[name], tensor), name


@pytest.mark.usefixtures("_checked")
def test_a_captured_model_generates_the_same_tokens() -> None:
    """The whole model's greedy loop, as the benchmark times it."""
    shape = (
        LlamaShape()
        if GPU
        else LlamaShape(hidden=16, heads=2, kv_heads=1, dim=8, inner=16, vocab=31, window=2, columns=4)
    )
    model = random_llama(shape, 2 if GPU else 1, DEVICE)
    set_mode(model, "student")
    context, written = 10 * shape.window + 1, []
    for wrap in (lambda work, device: work, captured):
        torch.manual_seed(1)
        cache = student_cache(model, 2, context)
        before = [layer.state.clone() for layer in cache.layers]
        loop = Loop(model, cache, 2, context, advance=True)
        step = wrap(loop.step, DEVICE)
        for layer, state in zip(cache.layers, before, strict=True):
            for name, tensor in layer.state.tensors().items():
                tensor.copy_(state.tensors()[name])
        loop.ids.zero_()
        loop.place.fill_(context)
        tokens = []
        for _ in range(STEPS):
            step()
            tokens.append(loop.ids.clone())
        written.append(torch.cat(tokens, 1))
    assert torch.equal(written[0], written[1])
    assert len(written[0].unique()) > 1


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_many_rows_of_different_lengths(kind: str) -> None:
    """Each row's next outputs are those of the float64 reference, independent of the other rows."""
    new, lengths = 3, [1 + b * (3 * WINDOW + 5) // ROWS for b in range(ROWS)]
    case = Sized(
        kind=kind, window=WINDOW, dim=DIM, values=DIM, columns=COLUMNS, batch=ROWS, tokens=max(lengths) + new,
        heads=HEADS["num_heads"], kv_heads=HEADS["num_kv_heads"], key_maps=HEADS["num_heads"],
    )  # fmt: skip
    whole, independent = (case.reference(dtype)["y"] for dtype in (torch.float64, torch.float32))
    leaves = {name: t.detach() for name, t in case.leaves(torch.float32).items()}
    maps, heads, rule = case.maps(leaves), case.weights(leaves), case.rule
    sizes = StateSizes(kv_heads=case.kv_heads, key_maps=case.key_maps, key_dim=DIM, value_dim=DIM, features=2 * COLUMNS)
    empty = StudentState.empty(1, rule, sizes, device=DEVICE)
    states = []
    for row, length in enumerate(lengths):
        before = Tokens(*(leaves[name][row : row + 1, :, :length] for name in "qkv"))
        _, state = attention.attend(before, maps, heads, rule, state=empty.clone())
        assert state is not None
        states.append(state.tensors())
    state = StudentState(**{name: torch.cat([one[name] for one in states]) for name in states[0]})
    for t in range(new):
        place = [length + t for length in lengths]
        now = [torch.stack([leaves[name][row, :, n] for row, n in enumerate(place)])[:, :, None] for name in "qkv"]
        y = decode.decode(Tokens(*now), maps, heads, state, rule)
        exact = torch.stack([whole[row, :, n] for row, n in enumerate(place)])[:, :, None]
        assert error(y, exact) <= budget(error(independent, whole), case.terms), t
    assert state.seen_B.tolist() == [length + new for length in lengths]

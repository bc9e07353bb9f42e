"""The Triton kernels equal the quadratic reference: outputs, every gradient, transfer; in the interpreter on CPUs
(small odd shapes), compiled on GPUs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

import low_precision
from kernel_kit import DEVICE, KernelCase, group, name_of, output_tolerances, poison, sum_errors, transfer_tolerances
from low_precision import DRAWS, FACTOR
from operator_kit import budget, error
from trenchcoat.ops import StateSizes, StudentState
from trenchcoat.ops.triton import attention, launch
from trenchcoat.ops.triton.launch import Call, Spans

CASES = [
    KernelCase(tokens=11, window=3, batch=1, groups=2, map="t2r", bias=True),
    KernelCase(tokens=9, window=4, key_maps=1, mask="left", groups=2),
    KernelCase(
        tokens=14, window=3, batch=1, sink_logit=True, map="hedgehog_half", groups=2, mask="odd",
        options={"softcap": 2.0, "affine": True, "sinks": 4},
    ),
    KernelCase(tokens=7, window=3, batch=1, sink_logit=True, options={"far": False, "sinks": 2}),
    KernelCase(kind="sliding", tokens=11, window=3, batch=1, key_maps=1, groups=2, map="exp"),
    KernelCase(kind="sliding", tokens=10, window=4, batch=1, kv_heads=2, options={"sinks": 3}, mask="right"),
    KernelCase(kind="linear", tokens=11, window=4, batch=1, groups=2, map="elu", mask="left"),
    KernelCase(kind="linear", tokens=9, window=4, batch=1, key_maps=1, map="exp_half"),
]  # fmt: skip


WIDE = KernelCase(
    tokens=8, window=3, batch=1, dim=200, values=70, columns=200, groups=2, sink_logit=True, options={"sinks": 2}
)  # fmt: skip
WIDE_CASES = [
    WIDE,
    replace(WIDE, kind="sliding", key_maps=1, map="exp", bias=True, sink_logit=False),
    replace(WIDE, kind="linear", map="t2r", values=200, sink_logit=False, options={}),
]
"""Maps are read in slices, values are split in two, gradients of maps are computed in two blocks of rows."""


def test_wide_heads_and_maps_are_split() -> None:
    for case in WIDE_CASES:
        leaves = case.leaves(torch.float32)
        qkv, ratio = [leaves[name] for name in "qkv"], leaves["mix"]
        maps = case.maps(leaves)
        assert maps is not None
        call = Call(case.rule, *qkv, *maps, ratio, None, None, None, None, Spans())
        c = call.constants
        assert c.piece.value > 0
        assert len(call.slices) == 2
        assert c.block_d.value * c.block_p.value > launch.LARGEST_SUM
        assert not replace(call, rule=replace(call.rule, far=False)).constants.piece.value


@pytest.mark.parametrize("case", CASES + WIDE_CASES, ids=name_of)
def test_outputs_and_gradients(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    group(monkeypatch, case.groups)
    exact, independent = case.reference(torch.float64), case.reference(torch.float32)
    found = case.kernels(torch.float32)
    for name, value in exact.items():
        assert error(found[name], value) <= budget(error(independent[name], value), case.terms), name


SHORT = KernelCase(
    tokens=36, window=8, batch=1, heads=2, kv_heads=1, key_maps=2, dim=16, values=16, columns=16, groups=2
)  # fmt: skip
SHORT_CASES = [
    replace(SHORT, sharp=4.0),
    *(replace(SHORT, kind=kind) for kind in ("sliding", "linear")),
    replace(
        SHORT, sink_logit=True, map="exp", bias=True, key_maps=1, options={"sinks": 3, "softcap": 2.0, "affine": True}
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in SHORT_CASES), *((case, torch.float16) for case in SHORT_CASES[:3])],
    ids=lambda x: name_of(x) if isinstance(x, KernelCase) else str(x),
)
def test_low_precision(case: KernelCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, all gradients, and transfer in 16 bits, to the tolerance of :func:`low_precision.tolerances`."""
    group(monkeypatch, case.groups)
    for found, exact, allowed in (
        (case.kernels(dtype), case.reference(torch.float64), output_tolerances(case, dtype)),
        (case.transfer_kernels(dtype), case.transferred(torch.float64), transfer_tolerances(case, dtype)),
    ):
        for name, value in exact.items():
            assert float((found[name] - value).abs().max()) <= allowed[name], name


@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_tiles_copied_by_hardware(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor descriptors, as on Hopper: chunks before the first token and after the last are filled with zeros."""
    monkeypatch.setattr(launch, "has_copy_engine", lambda device: True)
    monkeypatch.setattr(launch, "TensorDescriptor", mock.Mock(wraps=launch.TensorDescriptor))
    case = KernelCase(kind=kind, tokens=40, window=16, dim=16, values=16, batch=1, key_maps=1)
    group(monkeypatch, 2)
    exact, independent = case.reference(torch.float64), case.reference(torch.float32)
    found = case.kernels(torch.float32)
    assert launch.TensorDescriptor.called
    for name, value in exact.items():
        assert error(found[name], value) <= budget(error(independent[name], value), case.terms), name


def test_far_sums_keep_their_precision_over_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance is that of one product over all tokens; sums in 16 bits would lose precision at every chunk."""
    case = replace(SHORT, tokens=400, heads=1, key_maps=1)
    group(monkeypatch, 1)
    allowed = FACTOR * max(float(sum_errors(case, torch.bfloat16, 1 + i, kernels=False).max()) for i in range(DRAWS))
    assert float(sum_errors(case, torch.bfloat16, 0, kernels=True).max()) <= allowed


def test_the_independent_run_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding it equals the reference, so its deviations are due to rounding alone."""
    monkeypatch.setattr(low_precision, "near", lambda x, dtype: x)
    for case in (SHORT, *SHORT_CASES[1:]):
        for rounded, exact in (
            (case.low_precision(torch.bfloat16), case.reference(torch.float64)),
            (case.transferred(torch.float64, rounding=torch.bfloat16), case.transferred(torch.float64)),
        ):
            for name, value in exact.items():
                assert error(rounded[name], value) <= 1e-12, name


@triton.jit
def _rounds(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def _widens(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.float32))


def test_bfloat16_is_rounded_to_nearest() -> None:
    """On the device, and in the interpreter as the tests run it (see `trenchcoat.ops.triton.interpreter`)."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    _rounds[(1,)](x, y, N=4096)
    assert torch.equal(y, x.to(torch.bfloat16))
    y[:4] = torch.tensor([torch.inf, -torch.inf, -0.0, 1e-40])
    _widens[(1,)](y, back, N=4096)
    assert torch.equal(back, y.float())


@pytest.mark.parametrize(
    "case",
    [
        KernelCase(tokens=11, window=3, batch=1, groups=2, bias=True, key_maps=1),
        KernelCase(tokens=9, window=3, groups=2, mask="right", sink_logit=True, options={"sinks": 2}),
        KernelCase(kind="sliding", tokens=11, window=4, batch=1, map="exp", groups=2),
        KernelCase(kind="linear", tokens=11, window=4, batch=1, map="t2r", bias=True),
        *WIDE_CASES[:2],
    ],
    ids=name_of,
)
def test_transfer(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    group(monkeypatch, case.groups)
    exact, independent = case.transferred(torch.float64), case.transferred(torch.float32)
    found = case.transfer_kernels(torch.float32)
    for name, value in exact.items():
        assert error(found[name], value) <= budget(error(independent[name], value), 2 * case.terms), name


SPLIT = KernelCase(tokens=14, window=3, heads=1, key_maps=1, mask="left", groups=2, options={"sinks": 2})


@pytest.mark.parametrize(
    "case",
    [
        SPLIT,
        replace(SPLIT, kind="sliding"),
        replace(SPLIT, kind="linear", options={}),
        replace(SPLIT, dim=WIDE.dim, values=WIDE.values, columns=WIDE.columns),
    ],
    ids=name_of,
)
def test_any_split_gives_the_same(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row processed in parts, through the state, equals the whole row; left padding changes nothing."""
    group(monkeypatch, case.groups)
    leaves = {name: t.detach() for name, t in case.leaves(torch.float32).items()}
    mask = case.real()
    assert mask is not None
    whole = case.reference(torch.float64)["y"]
    independent = error(case.reference(torch.float32)["y"], whole)
    sizes = StateSizes(kv_heads=1, key_maps=1, key_dim=case.dim, value_dim=case.values, features=2 * case.columns)
    state: StudentState | None = StudentState.empty(case.batch, case.rule, sizes, device=DEVICE)
    for span in (slice(0, 5), slice(5, 13), slice(13, 14)):
        tokens = case.qkv(leaves)[span]
        y, state = attention.attend(tokens, case.maps(leaves), case.weights(leaves), case.rule, state=state)
        assert state is not None
        assert error(y, whole[:, :, span]) <= budget(independent, case.terms)


@pytest.mark.parametrize("kind", ["terrace", "linear"])
def test_packed_sequences_do_not_see_one_another(kind: str) -> None:
    case = KernelCase(kind=kind, tokens=13, window=3, batch=1, heads=1, key_maps=1)
    leaves = {name: t.detach() for name, t in case.leaves(torch.float32).items()}
    tokens, more = case.qkv(leaves), (case.maps(leaves), case.weights(leaves), case.rule)
    edges = [0, 5, 6, 13]
    packed, _ = attention.attend(tokens, *more, cu_seqlens=torch.tensor(edges, dtype=torch.int32, device=DEVICE))
    for start, stop in itertools.pairwise(edges):
        alone, _ = attention.attend(tokens[start:stop], *more)
        assert torch.equal(packed[:, :, start:stop], alone)


def test_nothing_uninitialised_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN, which exposes reads before writes and missing writes."""
    case = KernelCase(tokens=10, window=3, batch=1, heads=1, key_maps=1, groups=2, mask="left")
    group(monkeypatch, case.groups)
    wanted = case.kernels(torch.float32)
    with monkeypatch.context() as patch:
        poison(patch)
        found = case.kernels(torch.float32)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"window": 200}, "window is 200"),
        ({"dim": 300}, "the key dimension is 300"),
        ({"columns": 300}, "feature_dim is 300"),
        ({"columns": 64, "dim": 256, "values": 128, "window": 128}, "bytes of shared memory"),
    ],
)
def test_unsupported_calls_are_rejected(change: dict[str, object], message: str) -> None:
    dtype = change.pop("dtype", torch.float32)
    case = replace(KernelCase(tokens=3, batch=1), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        case.kernels(dtype)  # type: ignore[arg-type]

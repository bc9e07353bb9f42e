"""The Triton kernels mean what the quadratic reference means: outputs, every gradient, transfer; in the interpreter on
CPUs (small odd shapes), compiled where there is a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch

from kernel_kit import DEVICE, KernelCase, group, name_of
from operator_kit import budget, error
from trenchcoat.ops import StudentState, triton, triton_launch

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


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_and_gradients(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    group(monkeypatch, case.groups)
    exact, independent = case.reference(torch.float64), case.reference(torch.float32)
    found = case.kernels(torch.float32)
    for name, value in exact.items():
        assert error(found[name], value) <= budget(error(independent[name], value), case.terms), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_low_precision(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v are bfloat16 numbers in every run; the independent run rounds features and output. As for
    float32, eight times its error is allowed, and eight roundings where it happens to be nearly exact: the kernels also
    round weights, sums, dnum, ds and the y that dden is made of, once each, and the gradient itself."""
    case = KernelCase(kind=kind, tokens=9, window=4, batch=1, heads=1, key_maps=1)
    group(monkeypatch, case.groups)
    exact, found = case.reference(torch.float64), case.kernels(dtype)
    independent = case.reference(torch.float64, rounding=torch.bfloat16)
    for name in exact if dtype == torch.bfloat16 else ["y"]:
        allowed = 8 * max(error(independent[name], exact[name]), float(torch.finfo(torch.bfloat16).eps) / 2)
        assert error(found[name], exact[name]) <= allowed, name


@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_tiles_copied_by_hardware(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor descriptors, as on Hopper: chunks before the first token and past the last are filled with zeros."""
    monkeypatch.setattr(triton_launch, "has_copy_engine", lambda device: True)
    monkeypatch.setattr(triton_launch, "TensorDescriptor", mock.Mock(wraps=triton_launch.TensorDescriptor))
    case = KernelCase(kind=kind, tokens=40, window=16, dim=16, values=16, batch=1, key_maps=1)
    group(monkeypatch, 2)
    exact, independent = case.reference(torch.float64), case.reference(torch.float32)
    found = case.kernels(torch.float32)
    assert triton_launch.TensorDescriptor.called
    for name, value in exact.items():
        assert error(found[name], value) <= budget(error(independent[name], value), case.terms), name


def _transferred(case: KernelCase, teacher: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Summed squared error and its gradients, by autograd through the reference."""
    leaves = case.leaves(dtype)
    mask = case.real()
    with torch.enable_grad():
        y = case.run_reference(leaves)
        error_ = y - teacher.to(dtype)
        error_ = error_ if mask is None else error_ * mask[:, None, :, None]
        names = ["query_matrix", "query_bias", "key_matrix", "key_bias", "mix"]
        loss = error_.square().sum()
        grads = torch.autograd.grad(0.3 * loss, [leaves[n] for n in names], allow_unused=True)
    pairs = zip(names, grads, strict=True)
    return {"loss": loss.detach().double(), **{n: g.double() for n, g in pairs if g is not None}}


@pytest.mark.parametrize(
    "case",
    [
        KernelCase(tokens=11, window=3, batch=1, groups=2, bias=True, key_maps=1),
        KernelCase(tokens=9, window=3, groups=2, mask="right", sink_logit=True, options={"sinks": 2}),
        KernelCase(kind="sliding", tokens=11, window=4, batch=1, map="exp", groups=2),
        KernelCase(kind="linear", tokens=11, window=4, batch=1, map="t2r", bias=True),
    ],
    ids=name_of,
)
def test_transfer(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    group(monkeypatch, case.groups)
    shape = (case.batch, case.heads, case.tokens, case.values)
    teacher = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    exact, independent = (_transferred(case, teacher, dtype) for dtype in (torch.float64, torch.float32))
    leaves = case.leaves(torch.float32)
    mask = case.real()
    with torch.no_grad():
        total, grads = triton.transfer(
            leaves["q"], leaves["k"], leaves["v"], teacher, *case.maps(leaves), case.rule.log_ratio(leaves["mix"]),
            rule=case.rule, sink_logit_H=leaves["sink_logit"] if case.sink_logit else None,
            length_B=None if mask is None else mask.sum(1), error_scale=0.3,
        )  # fmt: skip
    found = dict(zip(["query_matrix", "query_bias", "key_matrix", "key_bias", "mix"], grads, strict=True))
    if case.kind != "linear":
        found["mix"] = found["mix"] * torch.sigmoid(-leaves["mix"].detach())
    found["loss"] = total
    for name, value in exact.items():
        assert error(found[name], value) <= budget(error(independent[name], value), 2 * case.terms), name


@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_any_split_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in pieces, through the state, equals the row in one piece; padding in front moves nothing."""
    options = {} if kind == "linear" else {"sinks": 2}
    case = KernelCase(kind=kind, tokens=14, window=3, heads=1, key_maps=1, mask="left", groups=2, options=options)
    group(monkeypatch, case.groups)
    leaves = {name: t.detach() for name, t in case.leaves(torch.float32).items()}
    mask = case.real()
    assert mask is not None
    whole = case.reference(torch.float64)["y"]
    independent = error(case.reference(torch.float32)["y"], whole)
    state = StudentState.empty(
        case.batch, rule=case.rule, kv_heads=1, key_map_heads=1, key_dim=case.dim, value_dim=case.values,
        features=2 * case.columns, device=DEVICE,
    )  # fmt: skip
    for span in (slice(0, 5), slice(5, 13), slice(13, 14)):
        q, k, v = (leaves[name][:, :, span] for name in "qkv")
        y, state = triton.attend(
            q, k, v, *case.maps(leaves), case.rule.log_ratio(leaves["mix"]), rule=case.rule, mask_BT=mask[:, span],
            state=state, return_state=True,
        )  # fmt: skip
        assert state is not None
        assert error(y, whole[:, :, span]) <= budget(independent, case.terms)


@pytest.mark.parametrize("kind", ["terrace", "linear"])
def test_packed_sequences_do_not_see_one_another(kind: str) -> None:
    case = KernelCase(kind=kind, tokens=13, window=3, batch=1, heads=1, key_maps=1)
    leaves = {name: t.detach() for name, t in case.leaves(torch.float32).items()}
    q, k, v = (leaves[name] for name in "qkv")
    ratio, maps = case.rule.log_ratio(leaves["mix"]), case.maps(leaves)
    edges = [0, 5, 6, 13]
    packed, _ = triton.attend(
        q, k, v, *maps, ratio, rule=case.rule, cu_seqlens=torch.tensor(edges, dtype=torch.int32, device=DEVICE)
    )
    for start, stop in itertools.pairwise(edges):
        alone, _ = triton.attend(*(x[:, :, start:stop] for x in (q, k, v)), *maps, ratio, rule=case.rule)
        assert torch.equal(packed[:, :, start:stop], alone)


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


def test_nothing_uninitialised_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN: whatever is read before it is written, or not written at all, shows."""
    case = KernelCase(tokens=10, window=3, batch=1, heads=1, key_maps=1, groups=2, mask="left")
    group(monkeypatch, case.groups)
    wanted = case.kernels(torch.float32)
    places = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    for owner, name in places:
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, make=make, **k: _poisoned(make(*a, **k)))
    found = case.kernels(torch.float32)
    monkeypatch.undo()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"window": 200}, "window is 200"),
        ({"dim": 300}, "300 key"),
        ({"columns": 256, "values": 256}, "feature_dim"),
        ({"columns": 64, "dim": 128, "values": 128, "window": 128}, "bytes of shared memory"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(change: dict[str, object], message: str) -> None:
    dtype = change.pop("dtype", torch.float32)
    case = replace(KernelCase(tokens=3, batch=1), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        case.kernels(dtype)  # type: ignore[arg-type]

"""The chunkwise operator equals the quadratic reference: outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from operator_kit import EXACT, Case, compare, error, label, variants
from trenchcoat.ops import Features, HeadWeights, Rule, Tokens, linear_window_attention
from trenchcoat.ops.chunked import chunkwise, layout

KINDS = ("terrace", "sliding", "linear")
ALL = [case for kind in KINDS for case in variants(kind)]
LENGTHS = (1, 3, 4, 5, 9, 40)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few chunks, so that short rows are split and their sums carried over."""
    monkeypatch.setattr(chunkwise, "TILE_TOKENS", 16)


@pytest.mark.parametrize("case", ALL, ids=label)
def test_outputs_and_gradients(case: Case) -> None:
    compare(case, "chunkwise")


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_lengths(kind: str, tokens: int) -> None:
    compare(Case(kind=kind, tokens=tokens), "chunkwise")


@pytest.mark.parametrize("case", ALL, ids=label)
@pytest.mark.usefixtures("small_tiles")
def test_rows_split_into_tiles(case: Case) -> None:
    compare(replace(case, tokens=40), "chunkwise", single=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_tokens(kind: str) -> None:
    case = Case(kind=kind, tokens=1000, window=64, batch=1, heads=2, kv_heads=1, key_maps=2, dim=16, values=16)
    compare(case, "chunkwise")


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_inputs_are_accumulated_in_float32(kind: str) -> None:
    case = Case(kind=kind, tokens=100)
    rounded = [t.to(torch.bfloat16) for t in case.tensors()[:3]] + [t.float() for t in case.tensors()[3:]]
    y, _ = case.call(rounded, impl="chunkwise")
    exact, _ = case.call([t.double() for t in rounded], impl="reference")
    assert y.dtype == torch.bfloat16
    assert error(y, exact) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_uninitialised_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN, which exposes reads before writes."""
    case = Case(kind=kind, tokens=37, mask="odd", options={} if kind == "linear" else {"sinks": 2})
    exact = case.results("reference", torch.float64)
    empty = torch.empty

    def poisoned(*args: object, **keywords: object) -> torch.Tensor:
        return empty(*args, **keywords).fill_(float("nan"))  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", poisoned)
    found = case.results("chunkwise", torch.float64)
    monkeypatch.undo()
    for name, value in exact.items():
        assert error(found[name], value) < 1e-10, name


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_does_not_see_what_follows(kind: str, impl: str) -> None:
    case = Case(kind=kind, tokens=41)
    tensors = case.tensors()
    whole, _ = case.call(tensors, impl=impl)
    for cut in (1, 3, 4, 7, 8, 9, 40):
        part, _ = case.call(tensors, impl=impl, span=slice(cut))
        torch.testing.assert_close(part, whole[:, :, :cut], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("mask", ["left", "right", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_invisible(kind: str, mask: str, impl: str) -> None:
    case = Case(kind=kind, mask=mask, batch=3, options={} if kind == "linear" else {"sinks": 3})
    tensors = case.tensors()
    y, _ = case.call(tensors, impl=impl)
    real = case.real()
    assert real is not None
    alone = replace(case, mask=None)
    for b in range(case.batch):
        row = [t[b : b + 1, :, real[b]] if t.ndim == 4 else t for t in tensors]
        want, _ = alone.call(row, impl=impl)
        torch.testing.assert_close(y[b : b + 1, :, real[b]], want, rtol=1e-10, atol=1e-12)
        assert bool((y[b, :, ~real[b]] == 0).all())


def test_a_row_of_padding_only() -> None:
    case = Case(mask="odd")
    tensors = case.tensors()
    mask = torch.ones(2, case.tokens, dtype=torch.bool)
    mask[1] = False
    tokens, features, heads = case.inputs(tensors)
    for rows in (mask, torch.zeros_like(mask)):
        y, _ = linear_window_attention(replace(tokens, mask_BT=rows), features, heads, case.rule)
        assert bool((y[1] == 0).all())
        assert bool(torch.isfinite(y).all())


def test_extreme_scores_stay_finite() -> None:
    case = Case(tokens=30)
    q, k, v, fq, fk, mix, _ = (t.float() for t in case.tensors())
    tensors = [1e4 * q, 1e4 * k, v, fq, fk, mix]
    leaves = [t.requires_grad_() for t in tensors]
    rule = Rule(kind="terrace", window=4, scale=1.0)
    y, _ = linear_window_attention(Tokens(*leaves[:3]), Features(*leaves[3:5]), HeadWeights(leaves[5]), rule)
    y.sum().backward()
    for t in (y, *(leaf.grad for leaf in leaves)):
        assert t is not None
        assert bool(torch.isfinite(t).all())


def test_only_requested_gradients_are_computed() -> None:
    case = Case(tokens=23)
    tensors = [
        t.requires_grad_(name in ("fq", "fk", "mix"))
        for t, name in zip(case.tensors(), ["q", "k", "v", "fq", "fk", "mix", "s"], strict=True)
    ]
    y, _ = case.call(tensors, impl="chunkwise")
    y.sum().backward()
    assert [t.grad is not None for t in tensors] == [False, False, False, True, True, True, False]


def test_parts_cover_everything_once() -> None:
    for batch, kv, shared, chunks, whole in (
        (1, 2, 2, 9, False),
        (3, 4, 1, 2, False),
        (5, 3, 1, 1, True),
        (1, 1, 1, 40, True),
    ):
        seen = torch.zeros(batch, kv, chunks)
        for part in layout.parts(batch, kv, shared, chunks, 4, 24, whole_rows=whole):
            seen[part.b, part.g, part.c0 : part.c1] += 1
            assert not whole or (part.c0, part.c1) == (0, chunks)
        assert bool((seen == 1).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl is 'cuda'"),
        ({"kind": "ring"}, "kind is 'ring'"),
        ({"window": 0}, "window is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"kind": "linear", "sinks": 1}, "no near part"),
        ({"fq_BHTF": None}, "fq and fk are missing"),
        ({"mask_BT": torch.ones(2, 3)}, "mask has shape"),
        ({"mix_H": torch.zeros(3)}, "mix has shape"),
        ({"fk_BKTF": torch.zeros(2, 3, 23, 8)}, "fk has shape"),
        ({"k_BGTD": torch.zeros(2, 3, 23, 6), "v_BGTE": torch.zeros(2, 3, 23, 5)}, "multiple of key/value heads"),
        ({"v_BGTE": torch.zeros(2, 2, 9, 5)}, "v \\[B, G, T, E\\]"),
    ],
)
def test_invalid_arguments_are_rejected(change: dict[str, object], message: str) -> None:
    q, k, v, fq, fk, mix, _ = Case().tensors()
    call: dict[str, Any] = {
        "q_BHTD": q, "k_BGTD": k, "v_BGTE": v, "mask_BT": None, "fq_BHTF": fq, "fk_BKTF": fk, "mix_H": mix,
        "kind": "terrace", "window": 4, "sinks": 0, "softcap": None, "impl": "chunkwise", **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_window_attention(
            Tokens(*(call[name] for name in ("q_BHTD", "k_BGTD", "v_BGTE", "mask_BT"))),
            None if call["fq_BHTF"] is None else Features(call["fq_BHTF"], call["fk_BKTF"]),
            HeadWeights(call["mix_H"]),
            Rule(scale=1.0, **{name: call[name] for name in ("kind", "window", "sinks", "softcap")}),
            impl=call["impl"],
        )

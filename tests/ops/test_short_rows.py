"""Rows that fit in the window: softmax attention itself, with gradients of exactly 0 for maps and mix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from operator_kit import Case, compare, error
from trenchcoat.ops import operator
from trenchcoat.ops.short import is_softmax


@pytest.mark.parametrize("mask", [None, "left", "odd"])
@pytest.mark.parametrize("tokens", [1, 7, 8])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_they_are_the_reference_and_what_cancels_has_no_gradient(tokens: int, mask: str | None, kv_heads: int) -> None:
    case = Case(tokens=tokens, mask=mask, kv_heads=kv_heads, options={"sinks": 2})
    compare(case, "chunkwise", single=False)
    for name in ("fq", "fk", "mix"):
        assert not case.results("chunkwise", torch.float64)[f"d{name}"].any(), name


def test_only_where_the_far_part_and_the_mix_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    original = operator.softmax_attention

    def counted(q: Tensor, *arguments: object) -> Tensor:
        used.append(q.shape[2])
        return original(q, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(operator, "softmax_attention", counted)
    short = Case(tokens=8)
    for case in (
        replace(short, tokens=9), replace(short, kind="sliding"), replace(short, sink_logit=True),
        replace(short, options={"softcap": 2.0}),
    ):  # fmt: skip
        case.call(case.tensors(), impl="chunkwise")
    assert not used
    short.call(short.tensors(), impl="chunkwise")
    assert used == [8]


def test_a_state_at_the_start_of_its_rows_is_no_hindrance() -> None:
    case = Case(tokens=20)
    tensors = case.tensors()
    whole, want = case.call(tensors, impl="reference", return_state=True)
    y, state = case.call(tensors, impl="chunkwise", span=slice(8), return_state=True)
    assert error(y, whole[:, :, :8]) < 1e-12
    y, state = case.call(tensors, impl="chunkwise", span=slice(8, 20), state=state)
    assert error(y, whole[:, :, 8:]) < 1e-10
    assert state is not None and want is not None  # noqa: PT018
    for name in ("far_s_BKFE", "far_z_BKF", "seen_B"):
        assert error(state.tensors()[name], want.tensors()[name]) < 1e-10
    _, heads = case.inputs(tensors)[1:]
    assert not is_softmax(8, case.rule, heads, state)

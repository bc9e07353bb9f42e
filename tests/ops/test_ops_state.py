"""Prefill equals decode: any split of a row, any rows in a batch, a state of constant size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from operator_kit import EXACT, Case, error, label
from trenchcoat.ops import Rule, StudentState
from trenchcoat.ops.decode import Places, decode, step

KINDS = ("terrace", "sliding", "linear")
TOLERANCE = 1e-10


def _cases() -> list[Case]:
    cases = []
    for kind in KINDS:
        base = Case(kind=kind, tokens=31, batch=3)
        cases += [base, replace(base, key_maps=2), replace(base, mask="odd"), replace(base, mask="left", window=3)]
        if kind != "linear":
            cases += [
                replace(base, options={"sinks": 3, "softcap": 2.0, "affine": True}, mask="odd", sink_logit=True),
                replace(base, options={"sinks": 9}),
                replace(base, options={"far": False, "sinks": 2}),
                replace(base, window=1, options={"sinks": 1}),
            ]
    return cases


def _decode(case: Case, tensors: list[Tensor], state: StudentState, span: slice) -> Tensor:
    with torch.no_grad():
        return decode(*case.inputs(tensors, span), state, case.rule)


def _visible(state: StudentState, case: Case) -> dict[str, Tensor]:
    """The state with zeros in buffer slots that no later query can read."""
    rule = Rule(kind=case.kind, window=case.window, scale=1.0)  # type: ignore[arg-type]
    tensors = state.tensors()
    held = state.slot_positions()
    live = (held >= rule.near_start(state.seen_B - 1)[:, None]) & (held >= 0)
    for name in ("k_BGND", "v_BGNE"):
        tensors[name] = tensors[name] * live[:, None, :, None]
    return tensors


@pytest.mark.parametrize("case", _cases(), ids=label)
@pytest.mark.parametrize("impl", EXACT)
def test_any_split_gives_the_same(case: Case, impl: str) -> None:
    tensors = case.tensors()
    whole, _ = case.call(tensors, impl=impl)
    cuts = (
        ((0, 1, 31), (0, 3, 4, 31), (0, 8, 17, 31), (0, 13, 30, 31), (0, 31)) if impl == "chunkwise" else ((0, 13, 31),)
    )
    for edges in cuts:
        state: StudentState | None = case.empty()
        for start, stop in itertools.pairwise(edges):
            y, state = case.call(tensors, impl=impl, span=slice(start, stop), state=state, return_state=True)
            assert error(y, whole[:, :, start:stop]) < TOLERANCE
    expected = None
    if impl == "chunkwise" and state is not None:
        _, expected = case.call(tensors, impl="reference", return_state=True, state=case.empty())
    if expected is not None and state is not None:
        found, want = _visible(state, case), _visible(expected, case)
        for name in found:
            assert error(found[name], want[name]) < TOLERANCE, name


@pytest.mark.parametrize("case", _cases(), ids=label)
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("prefill", [0, 7, 8, 21])
def test_decoding_continues_prefill(case: Case, step: int, prefill: int) -> None:
    tensors = case.tensors()
    whole, _ = case.call(tensors, impl="reference")
    state = case.empty()
    if prefill:
        _, after = case.call(tensors, impl="chunkwise", span=slice(prefill), state=state, return_state=True)
        assert after is not None
        state = after
    where = {name: t.data_ptr() for name, t in state.tensors().items()}
    for start in range(prefill, case.tokens, step):
        span = slice(start, min(start + step, case.tokens))
        assert error(_decode(case, tensors, state, span), whole[:, :, span]) < TOLERANCE
    assert where == {name: t.data_ptr() for name, t in state.tensors().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_the_new_tokens_only(kind: str) -> None:
    case = Case(kind=kind, tokens=31)
    found = {}
    for impl in EXACT:
        tensors = case.tensors()
        _, state = case.call(tensors, impl=impl, span=slice(13), return_state=True)
        leaves = [t[:, :, 13:].clone().requires_grad_() if t.ndim == 4 else t.requires_grad_() for t in tensors]
        y, _ = case.call(leaves, impl=impl, state=state)
        y.square().sum().backward()
        found[impl] = [y, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves[:5])]
    for a, b in zip(*found.values(), strict=True):
        assert error(a, b) < TOLERANCE


def test_the_incoming_state_is_not_modified() -> None:
    case = Case(tokens=30)
    tensors = case.tensors()
    _, state = case.call(tensors, impl="chunkwise", span=slice(11), return_state=True)
    assert state is not None
    before = state.clone()
    case.call(tensors, impl="chunkwise", span=slice(11, 30), state=state, return_state=True)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name])


def test_rows_of_a_state_can_be_selected_repeated_and_cleared() -> None:
    case = Case(tokens=30, batch=2)
    _, state = case.call(case.tensors(), impl="chunkwise", return_state=True)
    assert state is not None
    picked = state.index_select(torch.tensor([1, 1, 0]))
    twice = state.repeat_interleave(2)
    for name, tensor in state.tensors().items():
        assert torch.equal(picked.tensors()[name], tensor[[1, 1, 0]])
        assert torch.equal(twice.tensors()[name], tensor[[0, 0, 1, 1]])
    size = state.nbytes()
    fresh = state.clone().zero_()
    assert state.seen_B.tolist() == [30, 30]
    assert fresh.nbytes() == size == case.empty().nbytes()
    tensors = case.tensors()
    want = _decode(case, tensors, case.empty(), slice(0, 12))
    assert torch.equal(_decode(case, tensors, fresh, slice(0, 12)), want)


def test_a_buffer_needs_the_key_map() -> None:
    case = Case(tokens=30)
    tensors = case.tensors()
    _, state = case.call(tensors, impl="chunkwise", return_state=True)
    assert state is not None
    tokens, features, heads = case.inputs(tensors)
    with pytest.raises(ValueError, match="phi_k"):
        decode(tokens, replace(features, phi_k=None), heads, state, case.rule)


def test_low_precision_buffers_keep_float32_sums() -> None:
    case = Case(tokens=50)
    tensors = [t.to(torch.bfloat16) for t in case.tensors()[:3]] + [t.float() for t in case.tensors()[3:]]
    tensors[4] = case.phi(tensors[1].float())
    whole, _ = case.call(tensors, impl="chunkwise")
    state = case.empty(torch.bfloat16)
    assert state.far_s_BKFE.dtype == torch.float32
    steps = []
    for t in range(case.tokens):
        tokens, features, heads = case.inputs(tensors, slice(t, t + 1))
        features = replace(features, phi_k=lambda keys: case.phi(keys.float()))
        steps.append(decode(tokens, features, heads, state, case.rule))
    assert error(torch.cat(steps, 2), whole) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_step_is_one_graph_at_every_position(kind: str, masked: bool) -> None:
    """No graph break (no value is read on the host), and no recompilation at any position."""
    options = {} if kind == "linear" else {"sinks": 2, "softcap": 2.0}
    case = Case(kind=kind, tokens=31, batch=3, options=options, mask="odd" if masked else None)
    tensors, eager, compiled = case.tensors(), case.empty(), case.empty()
    counter = CompileCounterWithBackend("aot_eager")
    one = torch.compile(step, fullgraph=True, backend=counter)
    for t in range(case.tokens):
        inputs = case.inputs(tensors, slice(t, t + 1))
        real = None if inputs[0].mask_BT is None else inputs[0].mask_BT[:, 0]
        places = None if kind == "linear" else Places.of(compiled, case.rule, torch.float64)
        found = one(*inputs, compiled, places, case.rule)
        compiled.count(real)
        # the step alone does not fold, so the one below must not either
        wanted = step(*inputs, eager, places, case.rule)
        eager.count(real)
        assert error(found, wanted) < TOLERANCE
    assert counter.frame_count == 1


def test_rows_out_of_step_fold_when_their_own_chunk_is_full() -> None:
    """Rows 0 and 1 of a batch are half a chunk apart; each row's result is the same as alone."""
    case = Case(tokens=37, batch=2)
    tensors = case.tensors()
    late = torch.ones(2, 37, dtype=torch.bool)
    late[1, :2] = False
    state = case.empty()
    alone = [replace(case, batch=1), replace(case, batch=1).empty()]
    for t in range(37):
        tokens, features, heads = case.inputs(tensors, slice(t, t + 1))
        both = decode(replace(tokens, mask_BT=late[:, t : t + 1]), features, heads, state, case.rule)
        if t >= 2:
            one = _decode(alone[0], [x[1:] if x.ndim == 4 else x for x in tensors], alone[1], slice(t, t + 1))  # type: ignore[arg-type]
            assert error(both[1:], one) < TOLERANCE
    assert state.positions() == [37, 35]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    window=st.integers(1, 6),
    sinks=st.integers(0, 5),
    batch=st.integers(1, 3),
    mask=st.sampled_from([None, "left", "odd", "right"]),
    key_maps=st.sampled_from([2, 4]),
    pieces=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8),
)
def test_generation_in_any_chunks_equals_recomputation(
    kind: str, window: int, sinks: int, batch: int, mask: str | None, key_maps: int, pieces: list[tuple[int, bool]]
) -> None:
    """Chunks of any lengths, processed by the chunkwise operator or token by token, with any padding."""
    options = {"sinks": sinks} if kind != "linear" else {}
    tokens = sum(length for length, _ in pieces)
    case = Case(kind=kind, window=window, batch=batch, mask=mask, key_maps=key_maps, tokens=tokens, options=options)
    tensors, state, start = case.tensors(), case.empty(), 0
    whole, _ = case.call(tensors, impl="reference")
    for length, stepwise in pieces:
        span = slice(start, start + length)
        if stepwise:
            y = _decode(case, tensors, state, span)
        else:
            y, after = case.call(tensors, impl="chunkwise", span=span, state=state, return_state=True)
            assert after is not None
            state = after
        assert error(y, whole[:, :, span]) < TOLERANCE
        start += length

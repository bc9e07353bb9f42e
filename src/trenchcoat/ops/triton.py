"""The operator on GPUs: Triton kernels behind PyTorch functions, imported only when `impl: triton` asks for them.

What the kernels cannot do is refused with the reason (`impl: chunkwise` does it). The device's first use checks a small
case against the chunkwise implementation.

Shape legend: B batch rows, R rows, H query heads, G key/value heads, K key maps, T tokens, D key dim, E value dim, P
columns of a map, N groups of chunks, S sinks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trenchcoat.ops.rows import Rows, sink_pairs, state_after
from trenchcoat.ops.state import Rule, StudentState, round_to_bfloat16
from trenchcoat.ops.triton_backward import gradient_sums, key_gradients, query_gradients
from trenchcoat.ops.triton_launch import (
    Call,
    FusedMap,
    Spans,
    final_sums,
    group_starts,
    options,
    refusal,
    run_outputs,
    total,
)
from trenchcoat.ops.triton_transfer import transfer_outputs

Pair = tuple[Tensor, Tensor]


class _Attention(torch.autograd.Function):
    """y of a call's tensors; the differentiable ones come last."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, spans: Spans, names: tuple[str, str, float], *tensors: Tensor | None) -> Tensor:
        call = _call(rule, spans, names, *tensors)
        save = any(ctx.needs_input_grad)
        y, den, top, starts = run_outputs(call, save=save)
        if save:
            ctx.rule, ctx.spans, ctx.names = rule, spans, names
            ctx.save_for_backward(*tensors, y, den, top, *starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, y, den, top, s, z = ctx.saved_tensors
        call = _call(ctx.rule, ctx.spans, ctx.names, *tensors)
        grads = _backward(call, _inner(dy), y, den, top, (s, z), ctx.needs_input_grad[3:])
        out = [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
        return None, None, None, *out


def _call(rule: Rule, spans: Spans, names: tuple[str, str, float], *tensors: Tensor | None) -> Call:
    """Tensors in the order of :func:`_Attention.apply`."""
    q, k, v, q_matrix, q_bias, k_matrix, k_bias, log_ratio, logit, sink_k, sink_v, s0, z0 = tensors
    assert q is not None and k is not None and v is not None and log_ratio is not None  # noqa: PT018
    query = None if q_matrix is None else FusedMap(names[0], q_matrix, q_bias, names[2])
    key = None if k_matrix is None else FusedMap(names[1], k_matrix, k_bias, names[2])
    start = None if s0 is None or z0 is None else (s0, z0)
    ratio = log_ratio.detach().float().exp()
    return Call(
        rule, q, k, v, query, key, ratio, None if logit is None else logit.float(), sink_k, sink_v, start, spans
    )


def _inner(x: Tensor) -> Tensor:
    """With a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _backward(
    call: Call, dy: Tensor, y: Tensor, den: Tensor, top: Tensor, starts: tuple[Any, Any], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients in the order of the tensors of :func:`_call`."""
    rule, programs = call.rule, call.rows * call.heads * call.groups
    c = call.constants()
    chosen = options(c)
    grid = (call.rows * call.heads, call.groups)
    make: dict[str, Any] = {"device": call.q.device, "dtype": torch.float32}
    dq = torch.zeros(call.q.shape, **make)
    row = [torch.zeros(y.shape[:3], **make), torch.zeros(y.shape[:3], **make)]
    column = torch.zeros(y.shape[:3], device=y.device, dtype=torch.int32)
    result = (*(call.tensor(x) for x in row), call.tensor(column))
    query_share, key_share = _map_shares(call, programs), _map_shares(call, programs)
    head_share = torch.zeros(2, programs, **make)
    sinks = [torch.zeros(programs, rule.sinks, n, **make) for n in (call.q.shape[3], call.v.shape[3])]
    query_gradients[grid](
        call.tensor(call.q), call.tensor(call.k), call.tensor(call.v), call.tensor(y), call.tensor(dy),
        call.operands(call.query), call.operands(call.key), starts, call.tensor(den), result, call.tensor(dq),
        query_share, tuple(head_share), tuple(sinks), *call.tail(), *call.numbers(), c, **chosen,
    )  # fmt: skip
    ends = _group_ends(call, dy, call.tensor(den), result[0], given=False)
    inputs = needed[1] or needed[2]
    dk, dv = (torch.zeros(*y.shape[:3], n, **make) for n in (call.k.shape[3], call.v.shape[3]))
    key_gradients[grid](
        call.tensor(call.q), call.tensor(call.k), call.tensor(call.v), call.tensor(dy),
        call.operands(call.query), call.operands(call.key), ends, call.tensor(den), call.tensor(top), result,
        call.tensor(dk), call.tensor(dv), key_share, *call.tail(), *call.numbers(),
        c, INPUTS=inputs, GIVEN=False, **chosen,
    )  # fmt: skip
    shared = call.heads // call.kv_heads
    maps = [*_map_gradient(call, query_share, call.heads), *_map_gradient(call, key_share, call.maps)]
    dlog, dlogit = (x.view(call.rows, call.heads, -1).sum((0, 2)) for x in head_share)
    dsinks = [x.view(call.rows, call.kv_heads, -1, rule.sinks, x.shape[2]).sum(2) for x in sinks] if rule.sinks else []
    dlog = dlog if rule.far and rule.kind != "linear" else torch.zeros_like(dlog)
    grads: list[Tensor | None] = [dq, *(x.unflatten(1, (-1, shared)).sum(2) for x in (dk, dv)), *maps, dlog, dlogit]
    return [*grads, *(dsinks or (None, None)), None, None]


def _map_shares(call: Call, programs: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for each program's share of a map's gradients."""
    if call.query is None:
        return None, None
    shape = call.query.matrix.shape[1:]
    make: dict[str, Any] = {"device": call.q.device, "dtype": torch.float32}
    bias = None if call.query.bias is None else torch.empty(programs, shape[1], **make)
    return torch.empty(programs, *shape, **make), bias


def _map_gradient(
    call: Call, share: tuple[Tensor | None, Tensor | None], heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """Shares of (row, head, group) programs added up to [heads, ...]."""
    parts = (None if x is None else x.view(call.rows, heads, -1, *x.shape[1:]).sum((0, 2)) for x in share)
    matrix, bias = parts
    return matrix, bias


def _group_ends(
    call: Call, dy: Tensor, den: tuple[Any, ...], dden: tuple[Any, ...], *, given: bool
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Gradients of the far sums at the end of every group, [R H, N, F, E] and [R H, N, F]; None where all are 0."""
    if not call.rule.far or call.query is None or call.groups == 1:
        return None, None
    count, features = call.rows * call.heads, call.query.features
    s = dy.new_empty(count, call.groups, features, call.v.shape[3], dtype=torch.float32)
    z = dy.new_empty(count, call.groups, features, dtype=torch.float32)
    c = call.constants()
    gradient_sums[(count, call.groups)](
        call.tensor(call.q), call.tensor(dy), call.operands(call.query), den, dden, (s, z), call.place(),
        call.heads, call.span, call.lag - 1, c, GIVEN=given, **options(c),
    )  # fmt: skip
    total(s, None, backwards=True)
    total(z, None, backwards=True)
    return s, z


def _accept(call: Call) -> Call:
    reason = refusal(call)
    if reason is not None:
        raise ValueError(f"impl is 'triton', but {reason}; `impl: chunkwise` can do it")
    return call


def attend(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    query: FusedMap | None,
    key: FusedMap | None,
    log_ratio_H: Tensor,
    *,
    rule: Rule,
    sink_logit_H: Tensor | None = None,
    mask_BT: Tensor | None = None,
    state: StudentState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, StudentState | None]:
    """y [B, H, T, E] in q's dtype, differentiable in everything but the state, and the state after the tokens.

    Args:
        q_BHTD, k_BGTD, v_BGTE: after RoPE and norms; bfloat16, float16 or float32.
        query, key: feature maps; None with `rule.far` off.
        log_ratio_H: log(g / l).
        rule, sink_logit_H, mask_BT, state: as for :func:`trenchcoat.ops.linear_window_attention`.
        return_state: needs `state` (an empty one at the start of a row).
        cu_seqlens: int32 [R + 1], where the R sequences packed into the one batch row begin and end; then without
            mask and state.

    Raises:
        ValueError: what the kernels cannot do.
    """
    if cu_seqlens is not None and (mask_BT is not None or state is not None or q_BHTD.shape[0] != 1 or rule.sinks):
        raise ValueError("cu_seqlens packs sequences into one batch row, without mask, state or sinks")
    if rule.kind == "linear" and not rule.far:
        return q_BHTD.new_zeros(*q_BHTD.shape[:3], v_BGTE.shape[3]), state
    rows, spans = _lay_out(q_BHTD, rule, mask_BT, state, return_state, cu_seqlens)
    before = None if state is None or not rule.slots else state
    q = rows.align(q_BHTD, None if before is None else q_BHTD.new_zeros(*q_BHTD.shape[:2], rule.slots, q_BHTD.shape[3]))
    k = rows.align(k_BGTD, None if before is None else before.k_BGND)
    v = rows.align(v_BGTE, None if before is None else before.v_BGNE)
    q, k, v = (_inner(x) for x in (q, k, v))
    if spans is None:
        spans = _spans(rows, q.shape[2])
    sinks = (None, None) if not rule.sinks else tuple(_inner(x) for x in sink_pairs(k, v, rows, rule, state))
    start = (None, None) if state is None or not rule.far else (state.far_s_BKFE.float(), state.far_z_BKF)
    maps = [(None, None) if m is None or not rule.far else (m.matrix, m.bias) for m in (query, key)]
    tensors = (q, k, v, *maps[0], *maps[1], log_ratio_H, sink_logit_H, *sinks, *start)
    names = ("", "", 0.0) if query is None or key is None else (query.name, key.name, query.floor)
    call = _accept(_call(rule, spans, names, *tensors))
    y = rows.restore(_Attention.apply(rule, spans, names, *tensors))
    return y, _state_after(call, rows, state) if return_state and state is not None else None


def _lay_out(
    q: Tensor,
    rule: Rule,
    mask_BT: Tensor | None,
    state: StudentState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Rows, Spans | None]:
    """Rows to gather, or (in a packed batch, or where padding lies at the rows' ends) where they lie already."""
    plain = Rows.plan(q.shape[0], q.shape[2], rule, None, None)
    if cu_seqlens is not None:
        edges = cu_seqlens.to(q.device, torch.int32)
        return plain, Spans(edges[:-1].contiguous(), edges.diff(), torch.zeros_like(edges[:-1]), packed=True)
    if mask_BT is not None and state is None and not return_state and not rule.sinks:
        real = mask_BT.bool()
        length, start = real.sum(1), real.int().argmax(1)
        token = torch.arange(q.shape[2], device=real.device)
        if bool((real == ((token >= start[:, None]) & (token < (start + length)[:, None]))).all()):
            narrow = [x.to(q.device, torch.int32) for x in (start, length, torch.zeros_like(start))]
            return plain, Spans(narrow[0], narrow[1], narrow[2])
    return Rows.plan(q.shape[0], q.shape[2], rule, mask_BT, state), None


def _spans(rows: Rows, length: int) -> Spans:
    """Aligned rows as spans."""
    if rows.length_B is None and rows.source_BL is None:
        return Spans()
    first = rows.first_B.to(torch.int32)
    count = torch.full_like(first, length) if rows.length_B is None else rows.length_B.to(torch.int32)
    device = count.device
    return Spans(torch.zeros_like(count), count, first.to(device))


@torch.no_grad()
def _state_after(call: Call, rows: Rows, state: StudentState) -> StudentState:
    after = state_after(call.k.detach(), call.v.detach(), None, rows, call.rule, state)
    if call.rule.far:
        seen = after.seen_B
        old = seen if call.rule.kind == "linear" else torch.minimum(call.rule.near_start(seen - 1), seen)
        far = (old - rows.first_B.to(old.device)).clamp_min(0).to(torch.int32)
        s, after.far_z_BKF = final_sums(call, far)
        after.far_s_BKFE = round_to_bfloat16(s, seen) if state.far_s_BKFE.dtype == torch.bfloat16 else s
    return after


@torch.no_grad()
def transfer(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    y_BHTE: Tensor,
    query: FusedMap | None,
    key: FusedMap | None,
    log_ratio_H: Tensor,
    *,
    rule: Rule,
    sink_logit_H: Tensor | None = None,
    length_B: Tensor | None = None,
    error_scale: float = 1.0,
    learn: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """(sum of (y - y_hat)^2 over real tokens, gradients of `error_scale` times it).

    The gradients: query matrix, query bias, key matrix, key bias, log(g / l); all None without `learn`. Rows must be
    free of holes; `length_B` int64 gives their tokens (None: all T).
    """
    q, k, v, y = (_inner(x) for x in (q_BHTD, k_BGTD, v_BGTE, y_BHTE))
    spans = Spans()
    if length_B is not None:
        count = length_B.to(q.device, torch.int32)
        spans = Spans(torch.zeros_like(count), count, torch.zeros_like(count))
    sinks = [None, None] if not rule.sinks else [_first_tokens(x, rule.sinks) for x in (k, v)]
    maps = [(None, None) if m is None or not rule.far else (m.matrix, m.bias) for m in (query, key)]
    names = ("", "", 0.0) if query is None or key is None else (query.name, key.name, query.floor)
    call = _accept(
        _call(rule, spans, names, q, k, v, *maps[0], *maps[1], log_ratio_H, sink_logit_H, *sinks, None, None)
    )
    return _transfer(call, y, error_scale, learn and call.query is not None)


def _first_tokens(x_BGTD: Tensor, sinks: int) -> Tensor:
    """The first S tokens, zeros where the rows are shorter."""
    return torch.nn.functional.pad(x_BGTD[:, :, :sinks], (0, 0, 0, max(0, sinks - x_BGTD.shape[2]))).contiguous()


def _transfer(call: Call, y: Tensor, weight: float, learn: bool) -> tuple[Tensor, list[Tensor | None]]:
    programs = call.rows * call.heads * call.groups
    c = call.constants()
    chosen = options(c)
    grid = (call.rows * call.heads, call.groups)
    share = torch.zeros(2, programs, device=y.device, dtype=torch.float32)
    dnum = torch.empty_like(y, dtype=torch.float32 if y.dtype == torch.float16 else y.dtype)
    dden = y.new_zeros(y.shape[:3], dtype=torch.float32)
    query_share, key_share = (_map_shares(call, programs) if learn else (None, None) for _ in range(2))
    transfer_outputs[grid](
        call.tensor(call.q), call.tensor(call.k), call.tensor(call.v), call.tensor(y),
        call.operands(call.query), call.operands(call.key), group_starts(call), call.tensor(dnum),
        call.tensor(dden), tuple(share), query_share, *call.tail(), *call.numbers(), float(weight),
        c, LEARN=learn, **chosen,
    )  # fmt: skip
    if not learn:
        return share[0].sum(), [None] * 5
    none = (None, 0, 0, 0)
    ends = _group_ends(call, dnum, none, call.tensor(dden), given=True)
    key_gradients[grid](
        call.tensor(call.q), call.tensor(call.k), call.tensor(call.v), call.tensor(dnum),
        call.operands(call.query), call.operands(call.key), ends, none, none, (call.tensor(dden), none, none),
        none, none, key_share, *call.tail(), *call.numbers(), c, INPUTS=False, GIVEN=True, **chosen,
    )  # fmt: skip
    maps = [*_map_gradient(call, query_share, call.heads), *_map_gradient(call, key_share, call.maps)]
    dlog = share[1].view(call.rows, call.heads, -1).sum((0, 2))
    return share[0].sum(), [*maps, dlog if call.rule.kind != "linear" else torch.zeros_like(dlog)]

"""The operator on GPUs: Triton kernels behind PyTorch functions, imported only for `impl: triton`.

Calls the kernels cannot run raise an error with the reason (`impl: chunkwise` runs them). The first use of a device
checks a small case against the reference.

Shape legend: B batch rows, R rows, H query heads, G key/value heads, K key maps, T tokens, D key dim, E value dim, P
columns of a map, N groups of chunks, S sinks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trenchcoat.ops.chunked.rows import Rows, first_tokens, sink_pairs, state_after
from trenchcoat.ops.state import FusedMap, FusedMaps, HeadWeights, Rule, StudentState, Tokens, rounded
from trenchcoat.ops.triton.launch import Call, Spans, accepted, inner, launch_kernel
from trenchcoat.ops.triton.near import near_key_gradients, near_query_gradients
from trenchcoat.ops.triton.passes import FarGradients, Transfer, final_sums, run_outputs

Form = tuple[str, bool, float]
"""Activation of both maps, whether it is paired, and the lower clamp of the features."""
LOG2E = math.log2(math.e)


class _Attention(torch.autograd.Function):
    """y from a call's tensors; the differentiable ones come last."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, spans: Spans, form: Form, *tensors: Tensor | None) -> Tensor:
        """Outputs [B, H, T, E]."""
        call = _call(rule, spans, form, *tensors)
        save = any(ctx.needs_input_grad)
        y, den, top, starts = run_outputs(call, save=save)
        assert y is not None
        if save:
            ctx.rule, ctx.spans, ctx.form = rule, spans, form
            ctx.save_for_backward(*tensors, y, den, top, *starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors that require one."""
        *tensors, y, den, top, s, z = ctx.saved_tensors
        call = _call(ctx.rule, ctx.spans, ctx.form, *tensors)
        grads = _backward(call, inner(dy), y, den, top, (s, z), ctx.needs_input_grad[3:])
        out = [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
        return None, None, None, *out


def _call(rule: Rule, spans: Spans, form: Form, *tensors: Tensor | None) -> Call:
    """Tensors in the order of :func:`_Attention.apply`."""
    q, k, v, q_matrix, q_bias, k_matrix, k_bias, log_ratio, logit, sink_k, sink_v, s0, z0 = tensors
    assert q is not None and k is not None and v is not None and log_ratio is not None  # noqa: PT018
    query = None if q_matrix is None else FusedMap(*form[:2], q_matrix, q_bias, form[2])
    key = None if k_matrix is None else FusedMap(*form[:2], k_matrix, k_bias, form[2])
    start = None if s0 is None or z0 is None else (s0, z0)
    log2 = log_ratio.detach().float() * LOG2E
    return Call(rule, q, k, v, query, key, log2, None if logit is None else logit.float(), sink_k, sink_v, start, spans)


def _backward(
    call: Call, dy: Tensor, y: Tensor, den: Tensor, top: Tensor, starts: tuple[Any, Any], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients in the order of the tensors of :func:`_call`."""
    x, heads = call.tensor, call.heads
    dden = call.buffer(heads, dtype=torch.float32)
    inputs, keys = any(needed[:3]) or any(needed[8:11]), needed[1] or needed[2]
    far = FarGradients(call, dy, den, dden, given=False)
    dlog = far.queries(y, starts) if call.rule.far else torch.zeros_like(call.log_ratio)
    if call.rule.far and (keys or any(needed[5:7])):
        far.keys(values=keys)
    maps = [*far.maps(any(needed[3:5]), any(needed[5:7]))]
    if not inputs:
        return [None, None, None, *maps, dlog, None, None, None, None, None]
    max_grad, column = torch.empty_like(dden), torch.empty_like(dden, dtype=torch.int32)
    result = (x(dden), x(max_grad), x(column))
    dq = call.buffer(heads, call.q.shape[3], dtype=call.q.dtype)
    programs, sinks = call.rows * heads * call.groups, call.rule.sinks
    dlogit = call.log_ratio.new_empty(programs)
    dsinks = [dlogit.new_empty(programs, sinks, n) for n in (call.q.shape[3], call.v.shape[3])]
    launch_kernel(
        near_query_gradients, (call.rows * heads, call.groups), call,
        x(call.q), x(call.k), x(call.v), *call.boxes, x(y), x(dy), call.operands(call.query), x(far.du_query),
        x(den), result, x(dq), dlogit, tuple(dsinks), *call.tail(), *call.numbers(),
    )  # fmt: skip
    dk = dv = None
    if keys:
        dk, dv = (call.buffer(call.kv_heads, t.shape[3], dtype=t.dtype) for t in (call.k, call.v))
        launch_kernel(
            near_key_gradients, (call.rows * call.kv_heads * call.chunks,), call,
            x(call.q), x(call.k), x(call.v), x(dy), call.operands(call.key), x(far.du_key), x(den), x(top),
            result, x(far.dv), x(dk), x(dv), call.chunks, *call.tail(), *call.numbers(),
        )  # fmt: skip
    dlogit = dlogit.view(call.rows, heads, -1).sum((0, 2))
    pairs = [t.view(call.rows, call.kv_heads, -1, sinks, t.shape[2]).sum(2) for t in dsinks] if sinks else [None, None]
    return [dq, dk, dv, *maps, dlog, dlogit, *pairs, None, None]


def attend(
    tokens: Tokens,
    maps: FusedMaps | None,
    heads: HeadWeights,
    rule: Rule,
    *,
    state: StudentState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, StudentState | None]:
    """y [B, H, T, E] in q's dtype, differentiable in everything but the state; and the state after the tokens.

    Args:
        tokens: bfloat16, float16 or float32. maps: feature maps of queries and keys; may be None if the rule has no far
        part. heads, rule, state: as for :func:`trenchcoat.ops.linear_window_attention`. cu_seqlens: int32 [R + 1],
        boundaries of the R sequences packed into one batch row; requires no mask and no state.

    Raises:
        ValueError: the kernels do not support the call.
    """
    q, k, v, mask_BT = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE, tokens.mask_BT
    if cu_seqlens is not None and (mask_BT is not None or state is not None or q.shape[0] != 1 or rule.sinks):
        raise ValueError(
            "cu_seqlens packs sequences into one batch row; it cannot be combined with mask, state or sinks"
        )
    if rule.kind == "linear" and not rule.far:
        return q.new_zeros(*q.shape[:3], v.shape[3]), state
    rows, spans = _lay_out(q, rule, mask_BT, state, cu_seqlens)
    before = None if state is None or not rule.slots else state
    q = rows.align(q, None if before is None else q.new_zeros(*q.shape[:2], rule.slots, q.shape[3]))
    k = rows.align(k, None if before is None else before.k_BGND)
    v = rows.align(v, None if before is None else before.v_BGNE)
    q, k, v = (inner(x) for x in (q, k, v))
    if spans is None:
        spans = _spans(rows, q.shape[2])
    sinks = (None, None) if not rule.sinks else tuple(inner(x) for x in sink_pairs(k, v, rows, rule, state))
    start = (None, None) if state is None or not rule.far else (state.far_s_BKFE.float(), state.far_z_BKF)
    form, parameters = _opened(maps if rule.far else None)
    tensors = (q, k, v, *parameters, rule.log_ratio(heads.mix_H), heads.sink_logit_H, *sinks, *start)
    call = accepted(_call(rule, spans, form, *tensors))
    if len(call.slices) == 1:
        y = _Attention.apply(rule, spans, form, *tensors)
    else:
        parts = [_Attention.apply(rule, spans, form, *_columns(tensors, values)) for values in call.slices]
        y = torch.cat(parts, -1)
    return rows.restore(y), None if state is None else _state_after(call, rows, state)


def _opened(maps: FusedMaps | None) -> tuple[Form, tuple[Tensor | None, ...]]:
    """The maps' form, and their parameters in the order of :func:`_call`."""
    if maps is None:
        return ("softmax", False, 0.0), (None,) * 4
    query, key = maps
    return (query.act, query.paired, query.floor), (query.matrix, query.bias, key.matrix, key.bias)


def _columns(tensors: tuple[Tensor | None, ...], values: slice) -> list[Tensor | None]:
    """Tensors in the order of :func:`_call`, with only some columns of the values (v, sinks, far sums)."""
    return [x[..., values] if i in (2, 10, 11) and x is not None else x for i, x in enumerate(tensors)]


def _lay_out(
    q: Tensor,
    rule: Rule,
    mask_BT: Tensor | None,
    state: StudentState | None,
    cu_seqlens: Tensor | None,
) -> tuple[Rows, Spans | None]:
    """Rows to gather, or (packed batch, or padding only at the rows' ends) the rows in place."""
    plain = Rows.plan(q.shape[0], q.shape[2], rule, None, None)
    if cu_seqlens is not None:
        edges = cu_seqlens.to(q.device, torch.int32)
        return plain, Spans(edges[:-1].contiguous(), edges.diff(), torch.zeros_like(edges[:-1]), packed=True)
    if mask_BT is not None and state is None and not rule.sinks:
        real = mask_BT.bool()
        length, start = real.sum(1), real.int().argmax(1)
        token = torch.arange(q.shape[2], device=real.device)
        if bool((real == ((token >= start[:, None]) & (token < (start + length)[:, None]))).all()):
            narrow = [x.to(q.device, torch.int32) for x in (start, length, torch.zeros_like(start))]
            return plain, Spans(narrow[0], narrow[1], narrow[2])
    return Rows.plan(q.shape[0], q.shape[2], rule, mask_BT, state), None


def _spans(rows: Rows, length: int) -> Spans:
    """Aligned rows as spans."""
    if rows.length_B is None and rows.source_BL is None and rows.slots is None:
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
        after.far_s_BKFE = rounded(s, state.far_s_BKFE.dtype, seen)
    return after


@torch.no_grad()
def transfer_error(
    tokens: Tokens,
    y_BHTE: Tensor,
    maps: FusedMaps | None,
    heads: HeadWeights,
    rule: Rule,
    *,
    length_B: Tensor | None = None,
    error_scale: float = 1.0,
    learn: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """(sum of (y - y_hat)^2 over real tokens, gradients of `error_scale` times it).

    The gradients: query matrix, query bias, key matrix, key bias, log(g / l); all None without `learn`. Rows must have
    no padding between tokens; `length_B` int64 is their token count (None: all T).
    """
    q, k, v, y = (inner(x) for x in (tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE, y_BHTE))
    spans = Spans.of_lengths(length_B, q.device)
    sinks = [None if x is None else x.contiguous() for x in (first_tokens(k, rule), first_tokens(v, rule))]
    form, parameters = _opened(maps if rule.far else None)
    log_ratio_H, logit_H = rule.log_ratio(heads.mix_H), heads.sink_logit_H
    call = accepted(_call(rule, spans, form, q, k, v, *parameters, log_ratio_H, logit_H, *sinks, None, None))
    parts = [
        _transfer(call.sliced(values), y[..., values], error_scale, learn and call.query is not None)
        for values in call.slices
    ]
    total = parts[0][0] if len(parts) == 1 else torch.stack([error for error, _grads in parts]).sum()
    return total, [_added(found) for found in zip(*(grads for _error, grads in parts), strict=True)]


def _added(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    there = [t for t in tensors if t is not None]
    return None if not there else there[0] if len(there) == 1 else torch.stack(there).sum(0)


def _transfer(call: Call, y: Tensor, weight: float, learn: bool) -> tuple[Tensor, list[Tensor | None]]:
    squares = call.log_ratio.new_empty(call.rows * call.heads * call.groups)
    dtype = torch.float32 if y.dtype == torch.float16 else y.dtype
    dnum = call.buffer(call.heads, y.shape[3], dtype=dtype) if learn else y
    dden = call.buffer(call.heads, dtype=torch.float32) if learn else squares.view(1, 1, -1)
    starts = run_outputs(call, transfer=Transfer(y, dnum, dden, squares, weight), learn=learn)[3]
    if not learn:
        return squares.sum(), [None] * 5
    far = FarGradients(call, dnum, None, dden, given=True)
    dlog = far.queries(None, starts)
    far.keys(values=False)
    return squares.sum(), [*far.maps(True, True), dlog]

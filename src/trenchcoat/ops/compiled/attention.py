"""The operator on CPUs: the C++ kernels behind PyTorch functions.

Shape legend: B rows, H query heads, G key/value heads, K key maps (H or G), T tokens, L tokens of aligned rows, D key
dim, E value dim, F features, P columns of a map, S sinks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trenchcoat.ops.chunked.layout import Inputs
from trenchcoat.ops.chunked.rows import Rows, first_tokens, newest, sink_pairs, state_after
from trenchcoat.ops.compiled.call import Call, alike, inner
from trenchcoat.ops.short import is_softmax, softmax_attention
from trenchcoat.ops.state import FusedMap, FusedMaps, GatedState, HeadWeights, Rule, StudentState, Tokens, rounded

Fixed = dict[str, Tensor | None]
"""Tensors without gradients: first, length, start_s, start_z, end_s, end_z, target, log_forget, log_input, far_mix."""
DTYPES = (torch.float32, torch.bfloat16)
_GRADIENTS = ("dq", "dk", "dv", "dfq", "dfk", "", "", "", "", "dratio", "dlogit", "dsink_k", "dsink_v")
"""Gradients of the tensors of :func:`_call`; those of the maps have names of their own."""
_BY_MAP = ("dk", "dv", "dsink_k", "dsink_v")


def refusal(rule: Rule, dtype: torch.dtype, device: torch.device, kernel: str | None = None) -> str | None:
    """Why the kernels do not compute a call, or None: the one place that decides.

    `kernel` is the kernels' name of the feature maps' activation, if these are to be computed inside
    (:attr:`trenchcoat.students.feature_maps.Activation.kernel`).
    """
    if device.type != "cpu":
        return f"the compiled kernels run on CPUs, not on {device}"
    if dtype not in DTYPES:
        return f"the compiled kernels compute float32 and bfloat16 inputs, not {dtype}"
    if rule.scale <= 0:
        return f"the compiled kernels need a positive scale, not {rule.scale}"
    if rule.far and kernel not in (None, "softmax"):
        return f"the compiled kernels compute softmax feature maps (hedgehog), not {kernel!r}"
    return None


def require(rule: Rule, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError with the reason if the kernels do not compute a call."""
    reason = refusal(rule, dtype, device)
    if reason is not None:
        raise ValueError(f"impl is 'compiled', but {reason}; use impl='chunkwise'")


class _Attention(torch.autograd.Function):
    """y from a call's tensors; the differentiable ones come last, in the order of :func:`_call`."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, form: tuple[bool, float], fixed: Fixed, *tensors: Tensor | None) -> Tensor:
        """Outputs [B, H, L, E] in q's dtype."""
        call = _call(rule, form, fixed, *tensors)
        keep = any(ctx.needs_input_grad)
        den = torch.empty(call.q_BHTD.shape[:3], dtype=torch.float32) if keep else None
        y = _outputs(call, den)
        if keep:
            inputs = {name: t for name, t in fixed.items() if not name.startswith("end")}
            ctx.rule, ctx.form, ctx.names = rule, form, list(inputs)
            ctx.save_for_backward(y, den, *inputs.values(), *tensors)
        return y if tensors[0] is None else y.to(tensors[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors that require one."""
        y, den, *rest = ctx.saved_tensors
        count = len(ctx.names)
        fixed, tensors = dict(zip(ctx.names, rest[:count], strict=True)), rest[count:]
        call = _call(ctx.rule, ctx.form, fixed, *tensors)
        call.more |= {"y": y, "den": den, "dy": inner(dy.float())}
        grads = _gradients(call, tensors, ctx.needs_input_grad[3:])
        cast = [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
        return None, None, None, *cast


def _attention(rule: Rule, form: tuple[bool, float], fixed: Fixed, *tensors: Tensor | None, skip: int = 0) -> Tensor:
    """y [B, H, L, E] in q's dtype, differentiable where gradients are enabled; tensors as for :func:`_call`. Without
    gradients q may begin `skip` tokens after k, and y does so then."""
    q = tensors[0]
    assert q is not None
    if torch.is_grad_enabled():
        y: Tensor = _Attention.apply(rule, form, fixed, *tensors)
        return y
    call = _call(rule, form, fixed, *tensors)
    call.skip = skip
    return _outputs(call).to(q.dtype)


def _outputs(call: Call, den: Tensor | None = None) -> Tensor:
    """y [B, H, L, E] in float32; fills the denominators `den` [B, H, L] for a backward pass."""
    batch, heads, tokens = call.q_BHTD.shape[:3]
    y = torch.empty(batch, tokens, heads, call.v_BGTE.shape[3], dtype=torch.float32).transpose(1, 2)
    call.more |= {"y": y, "den": den}
    call.run("forward")
    return y


def _call(rule: Rule, form: tuple[bool, float], fixed: Fixed, *tensors: Tensor | None) -> Call:
    *pairs, fq, fk, q_matrix, q_bias, k_matrix, k_bias, log_ratio, logit, sink_k, sink_v = tensors
    q, k, v, sink_k, sink_v, target = alike(*pairs, sink_k, sink_v, fixed.get("target"))
    assert q is not None and k is not None and v is not None and log_ratio is not None  # noqa: PT018
    paired, floor = form
    maps = features = None
    if q_matrix is not None and k_matrix is not None:
        maps = (
            FusedMap("softmax", paired, q_matrix, q_bias, floor),
            FusedMap("softmax", paired, k_matrix, k_bias, floor),
        )
    elif fq is not None and fk is not None:
        features = fq.detach().float(), fk.detach().float()
    logit = None if logit is None else logit.detach().float()
    more = {**fixed, "logit": logit, "sink_k": sink_k, "sink_v": sink_v, "target": target}
    return Call(rule, q, k, v, features, maps, log_ratio.detach().float().exp(), more)


def _gradients(call: Call, tensors: list[Tensor | None], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """In the order of :func:`_call`."""
    batch, heads = call.q_BHTD.shape[:2]

    def zeros(name: str, like: Tensor) -> Tensor:
        """What the kernels add to: per row and head for numbers, per row and key map for keys and values."""
        shape = (batch, heads) if like.ndim == 1 else like.shape
        by_map = name in _BY_MAP
        return torch.zeros((batch, call.key_maps, *shape[2:]) if by_map else shape, dtype=torch.float32)

    outputs = {
        name: zeros(name, tensor)
        for name, tensor, need in zip(_GRADIENTS, tensors, needed, strict=True)
        if name and tensor is not None and need
    }
    maps = [torch.zeros(batch, *t.shape) if t is not None and any(needed[5:9]) else None for t in tensors[5:9]]
    call.more |= outputs
    call.map_grads = tuple(maps)
    call.run("backward")
    found: list[Tensor | None] = []
    for name, tensor in zip(_GRADIENTS, tensors, strict=True):
        grad = outputs.get(name) if name else maps[len(found) - 5]
        if grad is not None and tensor is not None and grad.shape != tensor.shape:
            shared = name in _BY_MAP
            grad = grad.unflatten(1, (tensor.shape[1], -1)).sum(2) if shared else grad.sum(0)
        found.append(grad)
    return found


def aligned_attention(x: Inputs, rule: Rule) -> Tensor:
    """y [B, H, L, E] in q's dtype of aligned rows with given features; as `chunked.chunkwise.aligned_attention`."""
    s0, z0 = (None, None) if x.start is None else x.start
    fixed = {"first": x.first_B, "length": None, **_start(s0, z0)}
    tensors = (x.q_BHTD, x.k_BGTD, x.v_BGTE, x.fq_BHTF, x.fk_BKTF, None, None, None, None)
    last = (x.log_ratio_H, x.sink_logit_H, x.sink_k_BGSD, x.sink_v_BGSE)
    return _attention(rule, (False, 0.0), fixed, *tensors, *last)


def _start(s0: Tensor | None, z0: Tensor | None) -> Fixed:
    if s0 is None or z0 is None:
        return {}
    return {"start_s": s0.float(), "start_z": z0.float()}


class GatedRows(NamedTuple):
    """A far part that forgets and has a denominator of its own (`terrace_gated`): logarithms of the gates of keys, and
    the far part's weight o in y = (1 - o) near + o far, 0 where nothing is far."""

    log_forget_BKT1: Tensor
    log_input_BKT1: Tensor
    mix_BHT: Tensor


def attend(
    tokens: Tokens, maps: FusedMaps | None, heads: HeadWeights, rule: Rule, *, state: StudentState | None = None,
    gated: GatedRows | None = None,
) -> tuple[Tensor, StudentState | None]:  # fmt: skip
    """y [B, H, T, E] in q's dtype, differentiable in everything but the state; and the state after the tokens.

    Args:
        tokens: float32 or bfloat16. maps: softmax feature maps of queries and keys; may be None if the rule has no far
        part. heads, rule, state: as for :func:`trenchcoat.ops.linear_window_attention`. gated: without gradients only,
        and with a `GatedState`, if with any; the heads' mix is not read then.

    Raises:
        ValueError: the kernels do not compute the call.
    """
    require(rule, tokens.q_BHTD.dtype, tokens.q_BHTD.device)
    q, k, v = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE
    rows = Rows.plan(q.shape[0], q.shape[2], rule, tokens.mask_BT, state)
    q, skip = _queries(q, rows, rule, state)
    k = rows.align(k, None if state is None else state.k_BGND)
    v = rows.align(v, None if state is None else state.v_BGNE)
    form, parameters = _opened(maps if rule.far else None)
    log_ratio = rule.log_ratio(heads.mix_H)
    fixed: Fixed = {"first": rows.first_B, "length": rows.length_B, **_aligned(gated, rows, state)}
    if is_softmax(q.shape[2], rule, heads, state):
        y = softmax_attention(q, k, v, rule, (*parameters, heads.mix_H))
    else:
        if state is not None and rule.far:
            s, z = state.far_s_BKFE.float(), state.far_z_BKF
            fixed |= {**_start(s, z), "end_s": torch.empty_like(s), "end_z": torch.empty_like(z)}
        sinks = sink_pairs(k, v, rows, rule, state) if rule.sinks else (None, None)
        tensors = (q, k, v, None, None, *parameters, log_ratio, heads.sink_logit_H, *sinks)
        y = _attention(rule, form, fixed, *tensors, skip=skip)
    y = y[:, :, rows.ahead - skip :] if skip else rows.restore(y)
    return y, None if state is None else _state_after(k, v, rows, rule, state, fixed)


def _aligned(gated: GatedRows | None, rows: Rows, state: StudentState | None) -> Fixed:
    """What the kernels read of a gated far part, [B, heads, L, 1]."""
    if gated is None:
        return {}
    forget, write, mix = gated.log_forget_BKT1, gated.log_input_BKT1, gated.mix_BHT[..., None]
    buffers: tuple[Tensor | None, ...] = (None,) * 3
    if isinstance(state, GatedState):
        buffers = (state.log_forget_BKN1, state.log_input_BKN1, mix.new_zeros(*mix.shape[:2], state.k_BGND.shape[2], 1))
    names = ("log_forget", "log_input", "far_mix")
    each = zip(names, (forget, write, mix), buffers, strict=True)
    return {name: rows.align(x.float(), before) for name, x, before in each}


def _queries(q: Tensor, rows: Rows, rule: Rule, state: StudentState | None) -> tuple[Tensor, int]:
    """Aligned queries, and the number of tokens before them: whole chunks of buffered keys, where no gradients are
    wanted."""
    skip = 0 if torch.is_grad_enabled() else rows.ahead // rule.window * rule.window
    if skip:
        before = rows.ahead - skip
        return torch.cat([q.new_zeros(*q.shape[:2], before, q.shape[3]), q], 2) if before else q, skip
    return rows.align(q, None if state is None else q.new_zeros(*q.shape[:2], rule.slots, q.shape[3])), 0


def _opened(maps: FusedMaps | None) -> tuple[tuple[bool, float], tuple[Tensor | None, ...]]:
    """The maps' form, and their parameters in the order of :func:`_call`."""
    if maps is None:
        return (False, 0.0), (None,) * 4
    query, key = maps
    return (query.paired, query.floor), (query.matrix, query.bias, key.matrix, key.bias)


@torch.no_grad()
def _state_after(k: Tensor, v: Tensor, rows: Rows, rule: Rule, state: StudentState, fixed: Fixed) -> StudentState:
    after = state_after(k.detach(), v.detach(), None, rows, rule, state)
    s, z = fixed.get("end_s"), fixed.get("end_z")
    if s is not None and z is not None:
        after.far_z_BKF = z
        after.far_s_BKFE = rounded(s, state.far_s_BKFE.dtype, after.seen_B)
    forget, write = fixed.get("log_forget"), fixed.get("log_input")
    if isinstance(after, GatedState) and forget is not None and write is not None:
        after.log_forget_BKN1 = newest(after.log_forget_BKN1, forget, after, rows)
        after.log_input_BKN1 = newest(after.log_input_BKN1, write, after, rows)
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
    no padding between tokens; `length_B` int64 is their token count (None: all L).
    """
    q, k, v = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE
    require(rule, q.dtype, q.device)
    form, parameters = _opened(maps if rule.far else None)
    learn = learn and parameters[0] is not None
    sinks = [None if x is None else x.contiguous() for x in (first_tokens(k, rule), first_tokens(v, rule))]
    fixed: Fixed = {"length": length_B, "target": y_BHTE}
    log_ratio, logit = rule.log_ratio(heads.mix_H), heads.sink_logit_H
    call = _call(rule, form, fixed, q, k, v, None, None, *parameters, log_ratio, logit, *sinks)
    call.error_scale = error_scale
    error = torch.zeros(q.shape[0], call.key_maps, dtype=torch.float64)
    dratio = torch.zeros(q.shape[:2], dtype=torch.float32) if learn else None
    call.more |= {"error": error, "dratio": dratio}
    if learn:
        call.map_grads = tuple(None if t is None else torch.zeros(q.shape[0], *t.shape) for t in parameters)
    call.run("transfer")
    if dratio is None:
        return error.sum().float(), [None] * 5
    return error.sum().float(), [None if t is None else t.sum(0) for t in (*call.map_grads, dratio)]

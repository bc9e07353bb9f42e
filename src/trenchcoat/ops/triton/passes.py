"""The passes of a call, one function each: far sums of groups, outputs, final sums, the far part's gradients.

Shape legend: as in :mod:`trenchcoat.ops.triton.launch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from trenchcoat.ops.triton.backward import gradient_sums, key_gradients, map_gradients, query_gradients
from trenchcoat.ops.triton.forward import far_sums, outputs, running_totals
from trenchcoat.ops.triton.launch import LARGEST_SUM, Call, Spans, launch_kernel, on, shared_limit


def group_starts(call: Call) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Far sums at the start of every group, [R K, N, F, E] and [R K, N, F]; None if they are all zero."""
    if not call.rule.far or call.key is None:
        return None, None
    if call.groups == 1:
        return (None, None) if call.start is None else call.start
    sums = grouped_sums(call, call.place(), call.lag - 1)
    total(sums[0], None if call.start is None else call.start[0])
    total(sums[1], None if call.start is None else call.start[1])
    return sums


def grouped_sums(call: Call, place: tuple[Any, ...], shift: int) -> tuple[Tensor, Tensor]:
    """Each group's own sums; `shift`: chunks by which these groups precede those of the outputs."""
    assert call.key is not None
    features, count = call.key.features, call.rows * call.maps
    s = call.q.new_empty(count, call.groups, features, call.v.shape[3], dtype=torch.float32)
    z = call.q.new_empty(count, call.groups, features, dtype=torch.float32)
    launch_kernel(
        far_sums, (count, call.groups), call,
        call.tensor(call.k), call.tensor(call.v), call.operands(call.key), (s, z), place,
        call.maps, call.kv_heads, call.span, shift,
    )  # fmt: skip
    return s, z


def total(x: Tensor, start: Tensor | None, *, backwards: bool = False) -> None:
    """Replace x [rows, N, ...] in place by the sums each group starts from."""
    rows, groups = x.shape[:2]
    size = math.prod(x.shape[2:])
    width = min(1024, triton.next_power_of_2(size))
    grid = (rows, triton.cdiv(size, width))
    first = None if start is None else start.contiguous()
    with on(x.device):
        running_totals[grid](x, first, groups, size, BACKWARDS=backwards, BLOCK=width)


@dataclass(frozen=True)
class Transfer:
    """What `outputs` stores instead of y when given the teacher's y."""

    teacher: Tensor
    dnum: Tensor
    """The error over the denominator, [B, H, T, E] in the teacher's dtype (float32 for float16)."""
    dden: Tensor
    """float32 [B, H, T]."""
    squares: Tensor
    """Squared error of every program."""
    weight: float


def run_outputs(
    call: Call, *, save: bool = False, transfer: Transfer | None = None, learn: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[Any, Any]]:
    """(y [B, H, T, E], denominators, largest scores [B, H, T], sums at the groups' starts); 0 outside the rows."""
    y = None if transfer is not None else call.buffer(call.heads, call.v.shape[3], dtype=call.q.dtype)
    den, top = (call.buffer(call.heads, dtype=torch.float32) if save else None for _ in range(2))
    starts = group_starts(call)
    teacher, dnum, dden, squares, weight = (None,) * 4 + (0.0,) if transfer is None else vars(transfer).values()
    x = call.tensor
    launch_kernel(
        outputs, (call.rows * call.heads, call.groups), call,
        x(call.q), x(call.k), x(call.v), *call.boxes, x(y), call.operands(call.query), call.operands(call.key), starts,
        (x(den), x(top)), x(teacher), x(dnum), x(dden), squares, *call.tail(), *call.numbers(), float(weight),
        SAVE=save, LEARN=learn,
    )  # fmt: skip
    return y, den, top, starts


def final_sums(call: Call, far_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Far sums [R, K, F, E] and [R, K, F] after the first `far_tokens` int32 [R] tokens of the rows."""
    slices = call.slices
    if len(slices) > 1:
        sums = [final_sums(call.sliced(values), far_tokens) for values in slices]
        return torch.cat([s for s, _z in sums], -1), sums[0][1]
    assert call.key is not None
    zero = torch.zeros_like(far_tokens)
    start, first = (zero if x is None else x for x in (call.spans.start, call.spans.first))
    ragged = replace(call, spans=Spans(start, far_tokens, first, call.spans.packed))
    s, z = (x.sum(1).unflatten(0, (call.rows, call.maps)) for x in grouped_sums(ragged, ragged.place(), 0))
    return (s, z) if call.start is None else (s + call.start[0], z + call.start[1])


class FarGradients:
    """The far part's backward pass: du of queries and keys, dv, and from du the maps' gradients."""

    def __init__(self, call: Call, dy: Tensor, den: Tensor | None, dden: Tensor, *, given: bool) -> None:
        """With `given`, `dy` is already dnum, and dden is already filled."""
        self.call, self.dy, self.dden, self.given = call, dy, dden, given
        self.den = call.tensor(den)
        self.du_query: Tensor | None = None
        self.du_key: Tensor | None = None
        self.dv: Tensor | None = None

    def queries(self, y: Tensor | None, starts: tuple[Any, Any]) -> Tensor:
        """Fills du of the queries and (unless given) dden; the gradient for log(g / l), [H]."""
        call, x, c = self.call, self.call.tensor, self.call.constants
        self.du_query = call.buffer(call.heads, c.columns.value, dtype=call.low)
        share = call.log_ratio.new_empty(call.rows * call.heads * call.groups)
        launch_kernel(
            query_gradients, (call.rows * call.heads, call.groups), call,
            x(call.q), x(call.k), x(call.v), *call.boxes, x(y), x(self.dy), call.operands(call.query),
            call.operands(call.key), starts, self.den, x(self.dden), x(self.du_query), share, call.place(), call.heads,
            call.kv_heads, call.maps, call.span, GIVEN=self.given,
        )  # fmt: skip
        dlog = share.view(call.rows, call.heads, -1).sum((0, 2))
        return torch.zeros_like(dlog) if call.rule.kind == "linear" else dlog

    def keys(self, *, values: bool) -> None:
        """Fills du of the keys and, with `values`, dv from far queries."""
        call, x, c = self.call, self.call.tensor, self.call.constants
        self.du_key = call.buffer(call.maps, c.columns.value, dtype=call.low)
        self.dv = call.buffer(call.maps, call.v.shape[3], dtype=call.low) if values else None
        launch_kernel(
            key_gradients, (call.rows * call.maps, call.groups), call,
            x(call.q), x(call.k), x(call.v), *call.boxes, x(self.dy), call.operands(call.query),
            call.operands(call.key), self._group_ends(), self.den, x(self.dden), x(self.du_key), x(self.dv),
            call.place(), call.heads, call.kv_heads, call.maps, call.span, SHARED=call.heads // call.maps,
            GIVEN=self.given,
        )  # fmt: skip

    def _group_ends(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Gradients of the far sums at the end of every group, [R K, N, F, E] and [R K, N, F]; None if all are 0."""
        call = self.call
        if call.groups == 1 or call.query is None:
            return None, None
        count, features = call.rows * call.maps, call.query.features
        s = call.log_ratio.new_empty(count, call.groups, features, call.v.shape[3])
        z = call.log_ratio.new_empty(count, call.groups, features)
        launch_kernel(
            gradient_sums, (count, call.groups), call,
            call.tensor(call.q), call.tensor(self.dy), call.operands(call.query), self.den, call.tensor(self.dden),
            (s, z), call.place(), call.heads, call.maps, call.span, call.lag - 1, SHARED=call.heads // call.maps,
            GIVEN=self.given,
        )  # fmt: skip
        total(s, None, backwards=True)
        total(z, None, backwards=True)
        return s, z

    def maps(self, query: bool, key: bool) -> list[Tensor | None]:
        """Gradients of the matrix and bias of the query map and the key map, None if not requested."""
        found: list[Tensor | None] = []
        for wanted, tensor, du, heads in (
            (query, self.call.q, self.du_query, self.call.heads),
            (key, self.call.k, self.du_key, self.call.maps),
        ):
            found += [None, None] if not wanted or du is None else map_gradient(self.call, tensor, du, heads)
        return found


def map_gradient(call: Call, x: Tensor, du: Tensor, maps: int) -> list[Tensor | None]:
    """Gradients of `maps` maps of x, matrix [M, D, P] and bias [M, P] or None, from du [B, H, T, P] with H any multiple
    of `maps`."""
    heads = du.shape[1]
    programs = call.rows * heads * call.groups
    matrix = call.log_ratio.new_empty(programs, x.shape[3], du.shape[3])
    bias = call.log_ratio.new_empty(programs, du.shape[3]) if call.constants.bias.value else None
    c = call.constants
    # the sum passes through shared memory once before it is stored
    most = min(LARGEST_SUM, 1 << (shared_limit(x.device) // 4).bit_length() - 1)
    rows = min(c.block_d.value, most // c.block_p.value)
    launch_kernel(
        map_gradients, (call.rows * heads, call.groups, triton.cdiv(x.shape[3], rows)), call,
        call.tensor(x), call.tensor(du), (matrix, bias), call.place(), x.shape[1], heads, call.span, BLOCK=rows,
    )  # fmt: skip
    return [None if s is None else s.view(call.rows, maps, -1, *s.shape[1:]).sum((0, 2)) for s in (matrix, bias)]

"""From tensors to Triton launches: what the kernels accept, their constants and grids, and one function a pass.

Shape legend: as in :mod:`trenchcoat.ops.triton_parts`; B batch rows, R rows (B, or the sequences of a packed batch), T
tokens, F features (P, or 2 P where paired), N groups of chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trenchcoat.ops.state import Rule
from trenchcoat.ops.triton_forward import far_sums, outputs, running_totals
from trenchcoat.ops.triton_parts import Constants

INTERPRETED = not isinstance(outputs, triton.runtime.JITFunction)
"""Kernels run in Triton's interpreter, on CPUs (the environment variable TRITON_INTERPRET was set)."""

ACTIVATIONS = {
    "hedgehog": ("softmax", True),
    "hedgehog_half": ("softmax", False),
    "exp": ("exp", True),
    "exp_half": ("exp", False),
    "t2r": ("relu", False),
    "elu": ("elu", False),
}
"""Feature map -> (activation, whether of u and of -u)."""

WIDEST, LONGEST_WINDOW, MOST_SINKS = 256, 128, 64
LARGEST_SUM = 1 << 15
"""Entries of the far sum on chip, F x E: 128 KiB, half of a multiprocessor's registers."""


@dataclass(frozen=True)
class FusedMap:
    """phi(x) = act(x matrix + bias) for M heads: matrix [M, D, P], bias [M, P] or None, float32."""

    name: str
    matrix: Tensor
    bias: Tensor | None = None
    floor: float = 1e-12

    @property
    def features(self) -> int:
        """F."""
        return int(self.matrix.shape[2]) * (2 if ACTIVATIONS[self.name][1] else 1)


@dataclass(frozen=True)
class Spans:
    """Where rows lie: row r has `length` tokens from token `start` of its batch row, the first at position `first`.

    int32 [R] each, or None when every row has all T tokens from position 0. `packed`: all rows lie in batch row 0.
    """

    start: Tensor | None = None
    length: Tensor | None = None
    first: Tensor | None = None
    packed: bool = False


@dataclass(frozen=True)
class Call:
    """One call's tensors and sizes, ready to launch with."""

    rule: Rule
    q: Tensor
    k: Tensor
    v: Tensor
    query: FusedMap | None
    key: FusedMap | None
    log_ratio: Tensor
    """log2 r of every head, r = g / l, float32."""
    logit: Tensor | None
    sink_k: Tensor | None
    sink_v: Tensor | None
    start: tuple[Tensor, Tensor] | None
    """Far sums before the first token, float32 [R, K, F, E] and [R, K, F]."""
    spans: Spans

    @property
    def rows(self) -> int:
        """R."""
        return self.q.shape[0] if self.spans.start is None else len(self.spans.start)

    @property
    def heads(self) -> int:
        """H."""
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.k.shape[1]

    @property
    def maps(self) -> int:
        """K (H where there is no far part)."""
        return self.heads if self.key is None else self.key.matrix.shape[0]

    @property
    def chunks(self) -> int:
        """Chunks of the longest row there can be."""
        return max(1, -(-self.q.shape[2] // self.rule.window))

    @property
    def lag(self) -> int:
        """Chunks the running sums lag behind."""
        return 1 if self.rule.kind == "linear" else 2

    @property
    def span(self) -> int:
        """Chunks of a group."""
        if not self.rule.far:
            return min(self.chunks, SHORTEST_GROUP)
        return group_size(self.chunks, self.rows * self.heads, wanted_programs(self.q.device))

    @property
    def groups(self) -> int:
        """N."""
        return -(-self.chunks // self.span)

    def tensor(self, x: Tensor) -> tuple[Any, ...]:
        """(pointer, strides) as the kernels take it; in a packed batch every row has the same batch row."""
        return x, 0 if self.spans.packed else x.stride(0), x.stride(1), x.stride(2)

    def place(self) -> tuple[Any, ...]:
        """ROWS of the kernels."""
        return self.spans.start, self.spans.length, self.spans.first, self.q.shape[2]

    def tail(self) -> tuple[Any, ...]:
        """The last arguments many kernels share."""
        sinks = [(None, 0, 0, 0) if s is None else (s, *s.stride()[:3]) for s in (self.sink_k, self.sink_v)]
        place = self.place()
        return self.log_ratio, self.logit, *sinks, place, self.heads, self.kv_heads, self.maps, self.span

    def buffer(self, heads: int, *size: int, dtype: torch.dtype) -> Tensor:
        """[B, heads, T, *size]; zeros where a row may not write all of it."""
        make = self.q.new_empty if self.spans.start is None else self.q.new_zeros
        return make(self.q.shape[0], heads, self.q.shape[2], *size, dtype=dtype)

    @property
    def low(self) -> torch.dtype:
        """The type in which features' and values' gradients are handed from one kernel to the next."""
        return torch.float32 if self.q.dtype == torch.float32 else torch.bfloat16

    def numbers(self) -> tuple[float, float]:
        """(scale, soft-cap)."""
        return float(self.rule.scale), 1.0 if self.rule.softcap is None else float(self.rule.softcap)

    def constants(self) -> Constants:
        """What the kernels are compiled for."""
        rule, dtype = self.rule, self.q.dtype
        phi = self.query
        act, paired = ("softmax", False) if phi is None else ACTIVATIONS[phi.name]
        columns = 16 if phi is None else phi.matrix.shape[2]
        half = dtype != torch.float32
        return Constants(
            kind=rule.kind, window=rule.window, block_w=block(rule.window),
            dim=self.q.shape[3], block_d=block(self.q.shape[3]), values=self.v.shape[3], block_e=block(self.v.shape[3]),
            columns=columns, block_p=block(columns), act=act, paired=paired,
            bias=phi is not None and phi.bias is not None, split=half, floor=1e-12 if phi is None else phi.floor,
            far=rule.far, softcap=rule.softcap is not None, sinks=rule.sinks, block_s=block(max(1, rule.sinks)),
            sink_logit=self.logit is not None, ragged=self.spans.start is not None,
            dot=TYPES[dtype], low=tl.bfloat16 if half else tl.float32, wide=INTERPRETED,
        )  # fmt: skip

    def operands(self, phi: FusedMap | None) -> tuple[Any, ...]:
        """(matrix, remainder, bias) of a map in the types the kernels load."""
        if phi is None:
            return None, None, None
        return *parts_of(phi.matrix, self.q.dtype), phi.bias


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SHORTEST_GROUP = 8
"""Chunks: sums of shorter groups cost more memory traffic than their parallel work is worth."""


def parts_of(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`matrix` as the sum of two numbers of `dtype`, which keep 16 bits of it (float32: itself)."""
    matrix = matrix.detach().contiguous()
    if dtype == torch.float32:
        return matrix, None
    upper = matrix.to(dtype)
    return upper, (matrix - upper.float()).to(dtype)


def block(size: int) -> int:
    """The power of two a tensor core can take, 16 at least."""
    return max(16, triton.next_power_of_2(size))


@lru_cache
def wanted_programs(device: torch.device) -> int:
    """Programs that fill a device: two for each multiprocessor."""
    if device.type != "cuda":
        return 1
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def group_size(chunks: int, programs: int, wanted: int) -> int:
    """Chunks of a group, so that rows x heads x groups are about as many programs as are wanted; see SHORTEST_GROUP."""
    groups = max(1, min(-(-wanted // programs), chunks // SHORTEST_GROUP))
    return -(-chunks // groups)


def warps(c: Constants) -> int:
    """Warps of a program that keeps the far sum on chip, 128 registers a thread for it."""
    sums = c.block_p.value * c.block_e.value * (2 if c.paired.value else 1) if c.far.value else 0
    return 4 if sums <= 1 << 14 else 8


def options(c: Constants) -> dict[str, int]:
    """Launch options of the kernels with a far sum."""
    return {"num_warps": warps(c), "num_stages": 1}


def near_options(c: Constants) -> dict[str, int]:
    """Launch options of the kernels without: dk and dv of a chunk, 128 registers a thread."""
    held = c.block_w.value * (c.block_d.value + c.block_e.value)
    return {"num_warps": 4 if held <= 1 << 14 else 8, "num_stages": 1}


def shared_bytes(c: Constants, itemsize: int) -> int:
    """Shared memory of the hungriest kernel (`query_gradients`): two maps of two parts, four key-side and two
    value-side tiles. At D = E = 128, P = W = 64 in bfloat16 this is what the compiler reports, but for 256 bytes."""
    d, e, p, w = (x.value for x in (c.block_d, c.block_e, c.block_p, c.block_w))
    return int(itemsize * ((4 if c.split.value else 2) * d * p + w * (4 * d + 2 * e)) + 256)


@lru_cache
def shared_limit(device: torch.device) -> int:
    """Shared memory a program can have; Hopper's where there is no CUDA device."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def on_gpu(device: torch.device) -> bool:
    """Whether kernels can run there."""
    return INTERPRETED or device.type == "cuda"


def refusal(call: Call) -> str | None:
    """Why the kernels cannot run this call, or None."""
    rule, q = call.rule, call.q
    if not on_gpu(q.device):
        return f"the tensors are on {q.device}; Triton kernels need a CUDA device"
    if q.dtype not in TYPES or call.k.dtype != q.dtype or call.v.dtype != q.dtype:
        types = f"q, k, v are {q.dtype}, {call.k.dtype}, {call.v.dtype}"
        return f"{types}; the kernels take bfloat16, float16 or float32, the same for all three"
    if max(q.shape[3], call.v.shape[3]) > WIDEST:
        return f"heads have {q.shape[3]} key and {call.v.shape[3]} value dimensions; the kernels hold {WIDEST} at most"
    if rule.window > LONGEST_WINDOW:
        return f"window is {rule.window}; the kernels hold {LONGEST_WINDOW} tokens at most"
    if rule.sinks > MOST_SINKS:
        return f"sinks is {rule.sinks}; the kernels hold {MOST_SINKS} at most"
    if rule.far and call.query is not None:
        c = call.constants()
        halves = 2 if c.paired.value else 1
        if halves * c.block_p.value * c.block_e.value > LARGEST_SUM:
            return (
                f"the far sum has {call.query.features} features x {call.v.shape[3]} values (as powers of two); the "
                f"kernels hold {LARGEST_SUM} numbers at most, so use a smaller feature_dim"
            )
        needed, there = shared_bytes(c, q.element_size()), shared_limit(q.device)
        if needed > there:
            return (
                f"a program would need {needed} bytes of shared memory where there are {there} ({q.dtype}, window "
                f"{rule.window}, head dim {q.shape[3]}, feature_dim {c.columns.value}); make one of them smaller"
            )
    return None


def group_starts(call: Call) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Far sums at the start of every group, [R K, N, F, E] and [R K, N, F]; None where they are all zero."""
    if not call.rule.far or call.key is None:
        return None, None
    if call.groups == 1:
        return (None, None) if call.start is None else call.start
    sums = grouped_sums(call, call.place(), call.lag - 1)
    total(sums[0], None if call.start is None else call.start[0])
    total(sums[1], None if call.start is None else call.start[1])
    return sums


def grouped_sums(call: Call, place: tuple[Any, ...], shift: int) -> tuple[Tensor, Tensor]:
    """Each group's own sums; `shift`: chunks by which the groups lie earlier than those of the outputs."""
    assert call.key is not None
    features, count = call.key.features, call.rows * call.maps
    s = call.q.new_empty(count, call.groups, features, call.v.shape[3], dtype=torch.float32)
    z = call.q.new_empty(count, call.groups, features, dtype=torch.float32)
    c = call.constants()
    far_sums[(count, call.groups)](
        call.tensor(call.k), call.tensor(call.v), call.operands(call.key), (s, z), place,
        call.maps, call.kv_heads, call.span, shift, c, **options(c),
    )  # fmt: skip
    return s, z


def total(x: Tensor, start: Tensor | None, *, backwards: bool = False) -> None:
    """x [rows, N, ...] becomes, in place, what each group starts from."""
    rows, groups = x.shape[:2]
    size = math.prod(x.shape[2:])
    width = min(1024, triton.next_power_of_2(size))
    grid = (rows, triton.cdiv(size, width))
    first = None if start is None else start.contiguous()
    running_totals[grid](x, first, groups, size, BACKWARDS=backwards, BLOCK=width)


@dataclass(frozen=True)
class Transfer:
    """What `outputs` stores in place of y when it is given the teacher's."""

    teacher: Tensor
    dnum: Tensor
    """The error over the denominator, [B, H, T, E] in the teacher's type (float32 for float16)."""
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
    c, none = call.constants(), (None, 0, 0, 0)
    saved = (none, none) if den is None or top is None else (call.tensor(den), call.tensor(top))
    teacher: tuple[Any, ...] = (None, none, none, None)
    if transfer is not None:
        teacher = (*(call.tensor(x) for x in (transfer.teacher, transfer.dnum, transfer.dden)), transfer.squares)
    outputs[(call.rows * call.heads, call.groups)](
        call.tensor(call.q), call.tensor(call.k), call.tensor(call.v), none if y is None else call.tensor(y),
        call.operands(call.query), call.operands(call.key), starts, saved, teacher, *call.tail(), *call.numbers(),
        0.0 if transfer is None else float(transfer.weight), c, SAVE=save, LEARN=learn, **options(c),
    )  # fmt: skip
    return y, den, top, starts


def final_sums(call: Call, far_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Far sums [R, K, F, E] and [R, K, F] after the first `far_tokens` int32 [R] tokens of the rows."""
    assert call.key is not None
    zero = torch.zeros_like(far_tokens)
    start, first = (zero if x is None else x for x in (call.spans.start, call.spans.first))
    ragged = Call(**{**call.__dict__, "spans": Spans(start, far_tokens, first, call.spans.packed)})
    s, z = (x.sum(1).unflatten(0, (call.rows, call.maps)) for x in grouped_sums(ragged, ragged.place(), 0))
    return (s, z) if call.start is None else (s + call.start[0], z + call.start[1])

"""Triton launches: what the kernels accept, their constants, groups and launch settings.

Shape legend: as in :mod:`trenchcoat.ops.triton.parts`; B batch rows, R rows (B, or the sequences of a packed batch), T
tokens, F features (P, or 2 P where paired), N groups of chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trenchcoat.ops.state import FusedMap, Rule
from trenchcoat.ops.triton import assembler
from trenchcoat.ops.triton.assembler import VERSION
from trenchcoat.ops.triton.forward import outputs
from trenchcoat.ops.triton.parts import Constants, features_of, shared_bytes
from trenchcoat.ops.triton.tiles import Choices, Tile, choices

OutOfResources = triton.runtime.errors.OutOfResources
INTERPRETED = not isinstance(outputs, triton.runtime.JITFunction)
"""Kernels run in Triton's interpreter, on CPUs (the environment variable TRITON_INTERPRET is set)."""
if INTERPRETED:
    from trenchcoat.ops.triton.interpreter import improve

    improve()

WIDEST, LONGEST_WINDOW, MOST_SINKS = 256, 128, 64
LARGEST_SUM = 1 << 15
"""Entries of the far sum on chip, F x E: 128 KiB, half of a multiprocessor's registers. Wider values are split."""
PIECE = 32
"""Rows of a map read at a time if maps do not fit whole in shared memory."""


@dataclass(frozen=True)
class Spans:
    """Row r has `length` tokens from token `start` of its batch row, the first at position `first`.

    int32 [R] each, or None if every row has all T tokens from position 0. `packed`: all rows are in batch row 0.
    """

    start: Tensor | None = None
    length: Tensor | None = None
    first: Tensor | None = None
    packed: bool = False

    @classmethod
    def of_lengths(cls, length_B: Tensor | None, device: torch.device) -> Spans:
        """Rows from the first token on, `length_B` tokens each (None: all T)."""
        if length_B is None:
            return cls()
        length = length_B.to(device, torch.int32)
        return cls(torch.zeros_like(length), length, torch.zeros_like(length))


@dataclass(frozen=True)
class Call:
    """One call's tensors and sizes, ready for launching."""

    rule: Rule
    q: Tensor
    k: Tensor
    v: Tensor
    query: FusedMap | None
    key: FusedMap | None
    log_ratio: Tensor
    """log2 r of every head, r = g / l, float32."""
    logit: Tensor | None = None
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None
    start: tuple[Tensor, Tensor] | None = None
    """Far sums before the first token, float32 [R, K, F, E] and [R, K, F]."""
    spans: Spans = field(default_factory=Spans)

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
        """K (H without a far part)."""
        return self.heads if self.key is None else self.key.matrix.shape[0]

    @property
    def chunks(self) -> int:
        """Chunks of the longest possible row."""
        return max(1, -(-self.q.shape[2] // self.rule.window))

    @property
    def lag(self) -> int:
        """Chunks by which the running sums lag."""
        return 1 if self.rule.kind == "linear" else 2

    @cached_property
    def choices(self) -> Choices:
        """The settings tuned on this device for this shape, or defaults."""
        shape = signature(self.constants, str(self.q.dtype))
        return choices(device_name(self.q.device), shape, VERSION)

    @cached_property
    def span(self) -> int:
        """Chunks of a group."""
        if not self.rule.far:
            return min(self.chunks, max(SHORTEST_GROUP, -(-self.chunks // MOST_GROUPS)))
        wanted = wanted_programs(self.q.device, self.choices.programs)
        return group_size(self.chunks, self.rows * self.heads, wanted)

    @property
    def groups(self) -> int:
        """N."""
        return -(-self.chunks // self.span)

    @property
    def slices(self) -> list[slice]:
        """Columns of the values per run of the kernels: all, unless the far sum would be too large."""
        c = self.constants
        width = int(c.block_e.value)
        while self.rule.far and features_of(c) * width > LARGEST_SUM:
            width //= 2
        return [slice(e, e + width) for e in range(0, self.v.shape[3], width)]

    def sliced(self, values: slice) -> Call:
        """The same call for some columns of the values: outputs are these columns, other gradients are summed."""
        if values.start == 0 and values.stop >= self.v.shape[3]:
            return self
        sink_v = None if self.sink_v is None else self.sink_v[..., values]
        start = None if self.start is None else (self.start[0][..., values], self.start[1])
        return replace(self, v=self.v[..., values], sink_v=sink_v, start=start)

    def tensor(self, x: Tensor | None) -> tuple[Any, ...]:
        """(pointer, strides) as the kernels take it; all rows of a packed batch share one batch row."""
        if x is None:
            return None, 0, 0, 0
        return x, 0 if self.spans.packed else x.stride(0), x.stride(1), x.stride(2)

    @cached_property
    def boxes(self) -> tuple[Any, ...]:
        """Tensor descriptors of q, k, v for copying chunk by chunk; None if unsupported (threads then load them)."""
        tensors = (self.q, self.k, self.v)
        c = self.constants
        sizes = ((c.block_w, c.window), (c.block_d, c.dim), (c.block_e, c.values))
        fits = self.spans.start is None and self.q.shape[2] >= c.window.value
        fits = fits and all(padded.value == size.value for padded, size in sizes)
        fits = fits and all(
            x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in x.stride()[:3]) for x in tensors
        )
        if not fits or not has_copy_engine(self.q.device):
            return None, None, None
        return tuple(
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, c.window.value, x.shape[3]]) for x in tensors
        )

    def place(self) -> tuple[Any, ...]:
        """The argument ROWS of the kernels."""
        return self.spans.start, self.spans.length, self.spans.first, self.q.shape[2]

    def tail(self) -> tuple[Any, ...]:
        """The last arguments many kernels share."""
        sinks = (self.tensor(s) for s in (self.sink_k, self.sink_v))
        return self.log_ratio, self.logit, *sinks, self.place(), self.heads, self.kv_heads, self.maps, self.span

    def buffer(self, heads: int, *size: int, dtype: torch.dtype) -> Tensor:
        """[B, heads, T, *size]; zeroed if rows may not write all of it."""
        make = self.q.new_empty if self.spans.start is None else self.q.new_zeros
        return make(self.q.shape[0], heads, self.q.shape[2], *size, dtype=dtype)

    @property
    def low(self) -> torch.dtype:
        """The dtype in which gradients of features and values are passed between kernels."""
        return torch.float32 if self.q.dtype == torch.float32 else torch.bfloat16

    def numbers(self) -> tuple[float, float]:
        """(scale, soft-cap)."""
        return float(self.rule.scale), 1.0 if self.rule.softcap is None else float(self.rule.softcap)

    @cached_property
    def constants(self) -> Constants:
        """The constants the kernels are compiled for."""
        rule, dtype = self.rule, self.q.dtype
        phi = self.query
        act, paired = ("softmax", False) if phi is None else (phi.act, phi.paired)
        columns = 16 if phi is None else phi.matrix.shape[2]
        half = dtype != torch.float32
        made = constants_of(
            kind=rule.kind, window=rule.window, block_w=block(rule.window),
            dim=self.q.shape[3], block_d=block(self.q.shape[3]), values=self.v.shape[3], block_e=block(self.v.shape[3]),
            columns=columns, block_p=block(columns), act=act, paired=paired, features=columns * (2 if paired else 1),
            bias=phi is not None and phi.bias is not None, split=half, floor=1e-12 if phi is None else phi.floor,
            far=rule.far, softcap=rule.softcap is not None, sinks=rule.sinks, block_s=block(max(1, rule.sinks)),
            sink_logit=self.logit is not None, ragged=self.spans.start is not None,
            dot=TYPES[dtype], low=tl.bfloat16 if half else tl.float32, wide=INTERPRETED, piece=0,
        )  # fmt: skip
        if not rule.far or shared_bytes(made, self.q.element_size()) <= shared_limit(self.q.device):
            return made
        return constants_of(**{**vars(made), "piece": min(PIECE, made.block_d.value, made.block_p.value)})

    def operands(self, phi: FusedMap | None) -> tuple[Any, ...]:
        """(matrix, remainder, bias) of a map in the dtypes the kernels load."""
        if phi is None:
            return None, None, None
        return *parts_of(phi.matrix, self.q.dtype), phi.bias


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
MOST_GROUPS = (1 << 16) - 1
"""Largest size of a grid's second axis."""
SHORTEST_GROUP = 8
"""In chunks; with shorter groups, the memory traffic of their sums costs more than the parallelism saves."""


def parts_of(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`matrix` as a sum of two tensors of `dtype`, which together keep 16 bits (float32: itself)."""
    matrix = matrix.detach().contiguous()
    if dtype == torch.float32:
        return matrix, None
    upper = matrix.to(dtype)
    return upper, (matrix - upper.float()).to(dtype)


@lru_cache
def constants_of(**fields: Any) -> Constants:
    """Cached, as constructing the object costs as much as a launch."""
    return Constants(**fields)


def block(size: int) -> int:
    """`size` rounded up to a power of two, at least 16, as tensor cores need."""
    return max(16, triton.next_power_of_2(size))


@lru_cache
def wanted_programs(device: torch.device, each: int) -> int:
    """Programs that fill a device, `each` per multiprocessor."""
    if device.type != "cuda":
        return 1
    return each * torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether tiles can be copied to shared memory by hardware (tensor memory accelerator: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def device_name(device: torch.device) -> str:
    """The name under which tuned choices are stored."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def signature(c: Constants, dtype: str) -> str:
    """The shape that choices are tuned for."""
    return (
        f"{c.kind.value} window {c.window.value} dim {c.dim.value} values {c.values.value} features "
        f"{c.features.value if c.far.value else 0} {dtype.removeprefix('torch.')}"
    )


def group_size(chunks: int, programs: int, wanted: int) -> int:
    """Chunks per group, so that rows x heads x groups is about `wanted` programs; see SHORTEST_GROUP."""
    groups = max(1, min(-(-wanted // programs), chunks // SHORTEST_GROUP))
    return -(-chunks // groups)


def untuned(c: Constants, kernel: str) -> Tile:
    """Four warps if a program's on-chip data fits in 192 of the 255 registers per thread."""
    w, d, e = c.block_w.value, c.block_d.value, c.block_e.value
    if kernel.startswith("near_"):
        held = w * (d + e)
    elif kernel == "map_gradients":
        held = d * c.block_p.value
    else:
        held = (features_of(c) * e if c.far.value else 0) + w * e
    return Tile(warps=4 if held <= 192 * 128 else 8, stages=1)


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], call: Call, *arguments: Any, usual: Tile | None = None, **flags: Any
) -> None:
    """Launch a kernel whose last positional argument is the call's constants, with tuned settings, else with `usual`
    (None: :func:`untuned`)."""
    name = kernel.fn.__name__
    tile = call.choices.tiles.get(name) or usual or untuned(call.constants, name)
    if launches is not None:
        launches.append(Launch(name, kernel, grid, (*arguments, call.constants), flags, tile))
    with on(call.q.device):
        kernel[grid](*arguments, call.constants, **flags, num_warps=tile.warps, num_stages=tile.stages)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one, as Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Launch:
    """A recorded launch of :func:`launch_kernel`, for repeating it."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    flags: dict[str, Any]
    tile: Tile

    def again(self, tile: Tile) -> None:
        """Repeat the launch with another tile; raises `OutOfResources` if it does not fit."""
        self.kernel[self.grid](*self.arguments, **self.flags, num_warps=tile.warps, num_stages=tile.stages)


launches: list[Launch] | None = None
"""The list :func:`recorded` appends to."""


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record every launch inside the `with` block."""
    global launches
    before, launches = launches, []
    try:
        yield launches
    finally:
        launches = before


@lru_cache
def shared_limit(device: torch.device) -> int:
    """Largest shared memory of a program; Hopper's if there is no CUDA device."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def on_gpu(device: torch.device) -> bool:
    """Whether kernels can run on `device`."""
    return INTERPRETED or device.type == "cuda"


def inner(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def refused(reason: str) -> ValueError:
    """The error for calls the kernels cannot run."""
    return ValueError(f"impl is 'triton', but {reason}; use `impl: chunkwise`")


def accepted(call: Call) -> Call:
    """The call itself; ValueError if the kernels cannot run it."""
    reason = refusal(call)
    if reason is not None:
        raise refused(reason)
    return call


def refusal(call: Call) -> str | None:
    """Why the kernels cannot run this call, or None."""
    rule, q, v = call.rule, call.q, call.v
    if not on_gpu(q.device):
        return f"the tensors are on {q.device}; Triton kernels need a CUDA device"
    unassembled = assembler.obstacle(q.device)
    if unassembled is not None:
        return unassembled
    if q.dtype not in TYPES or call.k.dtype != q.dtype or v.dtype != q.dtype:
        types = f"q, k, v are {q.dtype}, {call.k.dtype}, {v.dtype}"
        return f"{types}; the kernels take bfloat16, float16 or float32, the same for all three"
    columns = call.query.matrix.shape[2] if rule.far and call.query is not None else 0
    for name, size, most in (
        ("the key dimension", q.shape[3], WIDEST), ("the value dimension", v.shape[3], WIDEST),
        ("window", rule.window, LONGEST_WINDOW), ("sinks", rule.sinks, MOST_SINKS), ("feature_dim", columns, WIDEST),
    ):  # fmt: skip
        if size > most:
            return f"{name} is {size}; the kernels support at most {most}"
    c = call.sliced(call.slices[0]).constants
    needed, there = shared_bytes(c, q.element_size()), shared_limit(q.device)
    if needed > there:
        return (
            f"a program would need {needed} bytes of shared memory, but {there} are available ({q.dtype}, window "
            f"{rule.window}, head dim {q.shape[3]}, feature_dim {c.columns.value}); make one of them smaller"
        )
    return None

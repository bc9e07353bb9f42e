"""Generation on CPUs: one call of the kernels per layer and token, from q, k, v to y and the state after it.

Shape legend: as in :mod:`trenchcoat.ops.decode`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trenchcoat.ops.compiled.attention import DTYPES, require
from trenchcoat.ops.compiled.build import Unavailable, library
from trenchcoat.ops.compiled.call import MapPointers, View, inner
from trenchcoat.ops.state import FusedMaps, GatedState, HeadWeights, Rule, StudentState, Tokens

_INTEGERS = (
    "rows", "tokens", "heads", "kv_heads", "key_maps", "dim", "values", "features", "columns", "window", "sinks",
    "far", "narrow", "narrow_slots", "narrow_sums", "paired", "affine", "threads", "parts", "gated", "inputs",
    "narrow_inputs",
)  # fmt: skip
STATE_FIELDS = (
    "k_BGND", "v_BGNE", "sink_k_BGSD", "sink_v_BGSE", "far_s_BKFE", "far_z_BKF", "log_forget_BKN1", "log_input_BKN1",
    "seen_B",
)  # fmt: skip
"""Of a `GatedState`; a `StudentState` has no gates."""
_PARAMETERS = ("mix", "logit", "mix_weight", "forget_weight", "forget_bias", "input_weight", "input_bias")


class Step(ctypes.Structure):
    """The structure ``Step`` of ``source/decode.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "eps", "cap")),
        *((name, View) for name in ("q", "k", "v", "y", "x")),
        ("query", MapPointers),
        ("key", MapPointers),
        *((name, ctypes.c_void_p) for name in (*_PARAMETERS, "mask", *STATE_FIELDS)),
        *((name, ctypes.c_int64) for name in ("kept", "held")),
        *((name, View) for name in ("kept_k", "kept_v")),
        *((name, ctypes.c_void_p) for name in ("free_heads", "free_groups", "kept_groups")),
    )


class Pages(ctypes.Structure):
    """The structure ``Pages``."""

    _fields_ = (
        ("bases", ctypes.c_void_p), ("size", ctypes.c_int64), ("places", ctypes.c_int64 * (len(STATE_FIELDS) - 1)),
        ("slots", ctypes.c_void_p), ("seen", ctypes.c_void_p),
    )  # fmt: skip


class Gates(NamedTuple):
    """A far part that forgets and has a denominator of its own (`terrace_gated`), whose states are `GatedState`. The
    bias of its mix with the near part is the heads' `mix_H`. Parameters are float32."""

    x_BTM: Tensor
    """The layer's input, any length; taken as it is in float32 and bfloat16."""
    mix_HX: Tensor
    forget_KM: Tensor
    forget_K: Tensor
    input_KM: Tensor
    input_K: Tensor
    cap: float
    """Largest logarithm of an input gate."""


@dataclass(frozen=True)
class Kept:
    """Groups of the layer that keep softmax attention, in the same call: its q, k, v and y then have all H heads and G
    groups of the layer, a student's and these."""

    keys: Tensor
    """[B, kept groups, N, D] in q's dtype: `held` keys, then room for the new ones, which are written there."""
    values: Tensor
    """[B, kept groups, N, E]."""
    held: int
    places: tuple[Tensor, Tensor, Tensor]
    """Among the layer's: the student's heads, the student's groups, the kept groups; int64."""


def refusal(state: StudentState, rule: Rule) -> str | None:
    """Why a state is not decoded by the kernels, or None."""
    if rule.kind != "terrace":
        return f"states of kind {rule.kind!r}"
    if state.far_s_BKFE.dtype not in DTYPES or state.far_z_BKF.dtype != torch.float32:
        return f"far sums in {state.far_s_BKFE.dtype}"
    if state.k_BGND.dtype not in DTYPES:
        return f"buffers in {state.k_BGND.dtype}"
    if not all(map(Tensor.is_contiguous, _tensors(state))):
        return "a state that is not contiguous"
    return None


def decode(
    tokens: Tokens, maps: FusedMaps | None, heads: HeadWeights, states: Sequence[StudentState], rule: Rule,
    kept: Kept | None = None, gates: Gates | None = None,
) -> Tensor:  # fmt: skip
    """y [B, H, T, E] in q's dtype, without gradients; the states are updated in place. A token with mask False changes
    nothing and outputs 0.

    Args:
        tokens: a few tokens. maps: as for :func:`trenchcoat.ops.compiled.attention.attend`. states: one of B rows, or B
        of one row. kept: groups that keep softmax attention; without padding only. gates: of a gated far part; without
        maps it is not read.

    Raises:
        ValueError: the kernels do not compute the call.
    """
    q, k, v, mask = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE, tokens.mask_BT
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = inner(q), inner(k), inner(v)
    rows, count, length, _ = q.shape
    shape = (rows, count, length, v.shape[3])
    y = torch.empty(shape, dtype=torch.float32) if mask is None else torch.zeros(shape, dtype=torch.float32)
    maps, gates = _far_part(rule, maps, gates)
    fixed = _parameters(heads, maps, gates)
    key = _Key.of((q, k, v, y), fixed, maps, gates, states[0], rule, tuple(map(_addresses, states)))
    step = _prepared(key, states, heads.mix_H.shape[0])
    _point_to_tokens(step, q, k, v, y, gates)
    mask = None if mask is None else mask.to("cpu", torch.uint8).contiguous()
    step.mask = None if mask is None else mask.data_ptr()
    step.kept = 0 if kept is None else _point_to_kept(step, kept)
    _kernels().decode(ctypes.byref(step))
    for state in states:
        state.counted(length if mask is None else None)
    return y if y.dtype == tokens.q_BHTD.dtype else y.to(tokens.q_BHTD.dtype)


@dataclass(frozen=True)
class StatePages:
    """States of one row each in a server's caches. Each is in as many pages as there are caches, int8 [P, bytes] with
    the same strides, and each page has as many neighbouring groups."""

    caches: tuple[Tensor, ...]
    like: StudentState
    """A state with the shapes and dtypes of theirs, of all groups."""
    places: tuple[int, ...]
    """Byte offset in a page of each of :data:`STATE_FIELDS` but the last."""


def decode_pages(
    tokens: Tokens, maps: FusedMaps | None, heads: HeadWeights, rule: Rule, states: StatePages,
    slots: Sequence[Tensor], seen_B: Tensor, gates: Gates | None = None,
) -> Tensor:  # fmt: skip
    """:func:`decode` of one token for each of B rows, whose state is in the pages `slots`, [B] for each cache, and has
    seen `seen_B` tokens before; int64, on the CPU. The pages are updated, `seen_B` is not."""
    q, k, v = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = inner(q), inner(k), inner(v)
    y = torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
    maps, gates = _far_part(rule, maps, gates)
    fixed = _parameters(heads, maps, gates)
    key = _Key.of((q, k, v, y), fixed, maps, gates, states.like, rule, ())
    step = _prepared(key, (), heads.mix_H.shape[0])
    _point_to_tokens(step, q, k, v, y, gates)
    step.mask, step.kept, step.parts = None, 0, len(states.caches)
    bases, rows, size = _pointers(states.caches), _pointers(slots), states.caches[0].stride(0)
    places = (ctypes.c_int64 * len(states.places))(*states.places)
    place = Pages(ctypes.addressof(bases), size, places, ctypes.addressof(rows), seen_B.data_ptr())
    _kernels().decode_pages(ctypes.byref(step), ctypes.byref(place))
    return y if y.dtype == tokens.q_BHTD.dtype else y.to(tokens.q_BHTD.dtype)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _far_part(rule: Rule, maps: FusedMaps | None, gates: Gates | None) -> tuple[FusedMaps | None, Gates | None]:
    """Maps and gates as the kernels read them, None without a far part."""
    if maps is None or not rule.far:
        return None, None
    if gates is None:
        return maps, None
    x = gates.x_BTM if gates.x_BTM.dtype in DTYPES else gates.x_BTM.float()
    return maps, gates._replace(x_BTM=inner(x))


def _point_to_tokens(step: Step, q: Tensor, k: Tensor, v: Tensor, y: Tensor, gates: Gates | None) -> None:
    step.q.data, step.k.data, step.v.data, step.y.data = q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()
    step.x.data = None if gates is None else gates.x_BTM.data_ptr()
    step.threads = torch.get_num_threads()


def _point_to_kept(step: Step, kept: Kept) -> int:
    """Number of kept groups."""
    step.held = kept.held
    step.kept_k, step.kept_v = (View(t.data_ptr(), *t.stride()[:3]) for t in (kept.keys, kept.values))
    step.free_heads, step.free_groups, step.kept_groups = (t.data_ptr() for t in kept.places)
    return kept.keys.shape[1]


def _parameters(heads: HeadWeights, maps: FusedMaps | None, gates: Gates | None) -> list[Tensor | None]:
    """Those of :data:`_PARAMETERS`, then matrix and bias of both maps."""
    mix, logit = heads.mix_H.float(), None if heads.sink_logit_H is None else heads.sink_logit_H.float()
    five = (None,) * 5 if gates is None else gates[1:6]
    if maps is None:
        return [mix, logit, *five, None, None, None, None]
    query, key = maps
    nine = (*five, query.matrix, query.bias, key.matrix, key.bias)
    return [mix, logit, *(t if t is None or t.is_contiguous() else t.contiguous() for t in nine)]


class _Key(NamedTuple):
    """Everything that a step's structure is made of, but for the addresses of the tokens and outputs."""

    shapes: tuple[Any, ...]
    addresses: tuple[int | None, ...]
    """Of the parameters, then of the states' tensors."""
    maps: tuple[int, int, int, bool, float] | None
    """K, F, P, paired, eps."""
    gates: tuple[int, bool, float, int, int] | None
    """M, bfloat16, cap, strides of rows and tokens of the layer's input."""
    rule: Rule

    @classmethod
    def of(
        cls, tokens: tuple[Tensor, ...], fixed: list[Tensor | None], maps: FusedMaps | None, gates: Gates | None,
        like: StudentState, rule: Rule, states: tuple[tuple[int, ...], ...],
    ) -> _Key:  # fmt: skip
        """The key of a call with q, k, v, y; `states` are the addresses of those to be pointed to, all like `like`."""
        buffer, (q, _, v, _) = like.k_BGND, tokens
        types = (q.dtype, buffer.dtype, like.far_s_BKFE.dtype, buffer.shape[1])
        shapes = (q.shape, v.shape, *(t.stride() for t in tokens), *types)
        held = [None if t is None else t.data_ptr() for t in fixed]
        for state in states:
            held += state
        sizes = None
        if maps is not None:
            query, key = maps
            sizes = (key.matrix.shape[0], query.features, query.matrix.shape[2], query.paired, query.floor)
        given = None
        if gates is not None:
            x = gates.x_BTM
            given = (x.shape[2], x.dtype == torch.bfloat16, gates.cap, x.stride(0), x.stride(1))
        return cls(shapes, tuple(held), sizes, given, rule)


_RECENT = 4096
_recent: dict[_Key, tuple[Step, list[Any]]] = {}
"""The latest steps, with the arrays they point to; the oldest first. Their keys hold all that they depend on."""


def _prepared(key: _Key, states: Sequence[StudentState], heads: int) -> Step:
    known = _recent.get(key)
    if known is None:
        known = _recent[key] = _made(key, states, heads)
        if len(_recent) > _RECENT:
            del _recent[next(iter(_recent))]
    return known[0]


def _made(key: _Key, states: Sequence[StudentState], heads: int) -> tuple[Step, list[Any]]:
    q_shape, v_shape, *strides, dtype, buffers, sums, kv_heads = key.shapes
    rows, _, length, dim = q_shape
    maps, gates = key.maps or (heads, 0, 0, False, 0.0), key.gates or (0, False, 0.0, 0, 0)
    count = len(_PARAMETERS)
    parameters, maps_at = key.addresses[:count], key.addresses[count : count + 4]
    rule = key.rule
    require(rule, dtype, torch.device("cpu"))
    integers = (
        rows, length, heads, kv_heads, maps[0], dim, v_shape[3], maps[1], maps[2], rule.window, rule.sinks,
        key.maps is not None, dtype == torch.bfloat16, buffers == torch.bfloat16, sums == torch.bfloat16, maps[3],
        rule.affine, 1, 1, key.gates is not None, gates[0], gates[1],
    )  # fmt: skip
    pointers = [_rows(states, name, rows) for name in STATE_FIELDS]
    step = Step(
        *integers, rule.scale, rule.softcap or 0.0, maps[4], gates[2], *(View(None, *each[:3]) for each in strides),
        View(None, gates[3], 0, gates[4]), MapPointers(*maps_at[:2]), MapPointers(*maps_at[2:]), *parameters, None,
        *map(ctypes.addressof, pointers),
    )  # fmt: skip
    return step, pointers


def _tensors(state: StudentState) -> tuple[Tensor, ...]:
    """Those of :data:`STATE_FIELDS` that it has."""
    s = state
    gates = (s.log_forget_BKN1, s.log_input_BKN1) if isinstance(s, GatedState) else ()
    return s.k_BGND, s.v_BGNE, s.sink_k_BGSD, s.sink_v_BGSE, s.far_s_BKFE, s.far_z_BKF, *gates, s.seen_B


def _addresses(state: StudentState) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in _tensors(state))


def _rows(states: Sequence[StudentState], name: str, rows: int) -> ctypes.Array[ctypes.c_void_p]:
    """The address of each row of a state's tensor; none where states are in pages, or have no such tensor."""
    if not states or not hasattr(states[0], name):
        return (ctypes.c_void_p * 0)()
    tensors = [getattr(state, name) for state in states]
    addresses = [t.data_ptr() for t in tensors]
    if len(tensors) == 1:
        stride = tensors[0].stride(0) * tensors[0].itemsize
        addresses = [addresses[0] + b * stride for b in range(rows)]
    return (ctypes.c_void_p * rows)(*addresses)


@lru_cache
def _kernels() -> ctypes.CDLL:
    found = library()
    if found.step_bytes() != ctypes.sizeof(Step):
        raise Unavailable(f"the kernels expect steps of {found.step_bytes()} bytes, not {ctypes.sizeof(Step)}")
    return found

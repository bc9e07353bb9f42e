"""A call of the kernels: tensors as pointers and strides, in the structures of ``source/call.h``.

Shape legend: as in :mod:`trenchcoat.ops.operator`; P columns of a feature map.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trenchcoat.ops.compiled.build import Unavailable, library
from trenchcoat.ops.state import FusedMap, Rule

_INT = ctypes.c_int64


class View(ctypes.Structure):
    """A tensor [B, heads, T, width]: address, and the strides of rows, heads and tokens in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("row", _INT), ("head", _INT), ("token", _INT))


class MapPointers(ctypes.Structure):
    """A feature map [heads, D, P] and its gradients [B, heads, D, P]."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("weight", "bias", "dweight", "dbias"))


VIEWS = (
    "q", "k", "v", "fq", "fk", "y", "target", "dy", "sink_k", "sink_v", "dq", "dk", "dv", "dfq", "dfk", "dsink_k",
    "dsink_v",
)  # fmt: skip
POINTERS = (
    "ratio", "logit", "first", "length", "start_s", "start_z", "end_s", "end_z", "den", "dratio", "dlogit", "error",
    "log_forget", "log_input", "far_mix",
)  # fmt: skip
INTEGERS = (
    "rows", "heads", "kv_heads", "key_maps", "tokens", "dim", "values", "features", "columns", "window", "sinks",
    "kind", "far", "narrow", "mapped", "paired", "threads", "skip",
)  # fmt: skip
KINDS = ("terrace", "sliding", "linear")
NUMBERS = ("scale", "softcap", "eps", "error_scale")


class Arguments(ctypes.Structure):
    """The structure ``Call``."""

    _fields_ = (
        *((name, _INT) for name in INTEGERS),
        *((name, ctypes.c_double) for name in NUMBERS),
        *((name, View) for name in VIEWS),
        ("query", MapPointers),
        ("key", MapPointers),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


@dataclass
class Call:
    """Tensors and settings of one call. q, k and v (with sinks and the target of a transfer) are of one type, bfloat16
    or float32; all others are float32, counts and positions int64. Last axes are contiguous."""

    rule: Rule
    q_BHTD: Tensor
    k_BGTD: Tensor
    v_BGTE: Tensor
    features: tuple[Tensor, Tensor] | None = None
    """Of queries [B, H, T, F] and keys [B, K, T, F]."""
    maps: tuple[FusedMap, FusedMap] | None = None
    """What computes them, instead."""
    ratio_H: Tensor | None = None
    more: dict[str, Tensor | None] = field(default_factory=dict)
    """Other tensors by the names in :data:`VIEWS` and :data:`POINTERS`."""
    map_grads: tuple[Tensor | None, ...] = (None,) * 4
    """Query map [B, H, D, P] and bias [B, H, P], key map and bias; zeros at first."""
    error_scale: float = 0.0
    skip: int = 0
    """Of a forward pass: q and y begin with this token, a multiple of the window."""

    @property
    def far(self) -> bool:
        """Whether there is a far part."""
        return self.rule.far and (self.features is not None or self.maps is not None)

    @property
    def key_maps(self) -> int:
        """K; without a far part H, so that as much as possible runs at once."""
        if self.maps is not None and self.far:
            return self.maps[1].matrix.shape[0]
        return self.features[1].shape[1] if self.features is not None and self.far else self.q_BHTD.shape[1]

    @property
    def feature_count(self) -> int:
        """F."""
        if not self.far:
            return 0
        return self.maps[0].features if self.maps is not None else self.features[0].shape[-1]  # type: ignore[index]

    def run(self, entry: str) -> None:
        """Call the entry point `forward`, `transfer` or `backward` on the threads that PyTorch uses."""
        arguments, kept = self._arguments()
        getattr(kernels(), entry)(ctypes.byref(arguments))
        del kept

    def _arguments(self) -> tuple[Arguments, list[Tensor]]:
        """The structure, and the tensors that it points to."""
        rule, q, maps = self.rule, self.q_BHTD, self.maps if self.far else None
        rows, heads, _, dim = q.shape
        tokens = self.k_BGTD.shape[2]
        a, kept = Arguments(), []
        integers = (
            rows, heads, self.k_BGTD.shape[1], self.key_maps, tokens, dim, self.v_BGTE.shape[3], self.feature_count,
            maps[0].matrix.shape[2] if maps else 0, rule.window, rule.sinks,
            KINDS.index(rule.kind), self.far, q.dtype == torch.bfloat16,
            maps is not None, maps is not None and maps[0].paired, torch.get_num_threads(), self.skip,
        )  # fmt: skip
        for name, number in zip(INTEGERS, integers, strict=True):
            setattr(a, name, int(number))
        a.scale, a.softcap, a.error_scale = rule.scale, rule.softcap or 0.0, self.error_scale
        given: dict[str, Tensor | None] = {"q": q, "k": self.k_BGTD, "v": self.v_BGTE, "ratio": self.ratio_H}
        given |= self.more
        if maps is None and self.features is not None and self.far:
            given["fq"], given["fk"] = map(inner, self.features)
        for name, tensor in given.items():
            if tensor is None:
                continue
            if name in POINTERS:
                tensor = tensor.contiguous()
                setattr(a, name, tensor.data_ptr())
            else:
                before = self.skip * tensor.stride(2) * tensor.itemsize if name in ("q", "y") else 0
                setattr(a, name, View(tensor.data_ptr() - before, *tensor.stride()[:3]))
            kept.append(tensor)
        if maps is not None:
            a.eps = maps[0].floor
            self._point_to_maps(a, maps, kept)
        return a, kept

    def _point_to_maps(self, a: Arguments, maps: tuple[FusedMap, FusedMap], kept: list[Tensor]) -> None:
        for name, phi, grads in zip(("query", "key"), maps, (self.map_grads[:2], self.map_grads[2:]), strict=True):
            bias = None if phi.bias is None else phi.bias.detach().contiguous()
            parts = (phi.matrix.detach().contiguous(), bias, *grads)
            setattr(a, name, MapPointers(*(None if t is None else t.data_ptr() for t in parts)))
            kept += [t for t in parts if t is not None]


def alike(*tensors: Tensor | None) -> list[Tensor | None]:
    """Detached, with a contiguous last axis, and of one type: float32 if they have several."""
    types = {t.dtype for t in tensors if t is not None}
    wide = len(types) > 1
    return [None if t is None else inner(t.detach().float() if wide else t.detach()) for t in tensors]


def inner(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def scratch_peak_bytes() -> int:
    """The most memory that the kernels held for intermediate results since the last call of this function: not tensors,
    so PyTorch does not count it."""
    ask = kernels().scratch_peak_bytes
    ask.restype = _INT
    return int(ask())


def kernels() -> ctypes.CDLL:
    """The library; RuntimeError if it does not fit this file."""
    found = library()
    found.call_bytes.restype = _INT
    if found.call_bytes() != ctypes.sizeof(Arguments):
        raise Unavailable(f"the kernels expect calls of {found.call_bytes()} bytes, not {ctypes.sizeof(Arguments)}")
    return found

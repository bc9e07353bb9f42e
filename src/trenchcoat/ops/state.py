"""Types shared by all implementations: a call's tensors, the rule for near and far keys, the constant-size state.

Implementations import these types, never each other.

Shape legend: B batch rows, H query heads, G key/value heads, K heads of the key feature map (G or H), T tokens, N
buffer slots (2W terrace, W sliding, 0 linear), S sink slots, D key dim, E value dim, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from trenchcoat.config import Kind

PhiK = Callable[[Tensor], Tensor]
"""Key feature map: [B, G, N, D] -> [B, K, N, F]."""

LINEAR_EPS = 1e-12
"""Added to the denominator of kind ``linear``, where all features can be zero."""


@dataclass(frozen=True)
class Tokens:
    """The new tokens of a call, after RoPE and norms: any floating dtype, H a multiple of G.

    `mask_BT` is True at real tokens, in any pattern (None: all real); outputs at other tokens are 0.
    """

    q_BHTD: Tensor
    k_BGTD: Tensor
    v_BGTE: Tensor
    mask_BT: Tensor | None = None

    def __getitem__(self, span: slice) -> Tokens:
        """The tokens `span`."""
        parts = (self.q_BHTD[:, :, span], self.k_BGTD[:, :, span], self.v_BGTE[:, :, span])
        return Tokens(*parts, None if self.mask_BT is None else self.mask_BT[:, span])


@dataclass(frozen=True)
class Features:
    """Features (float32) of the tokens' queries and keys, K = H or G.

    `phi_k` computes features of the keys in a state's buffer; a state with a buffer needs it.
    """

    q_BHTF: Tensor
    k_BKTF: Tensor | None
    """None only in a decode step of a kind with a buffer, which computes them when a key leaves the buffer."""
    phi_k: PhiK | None = None

    def __getitem__(self, span: slice) -> Features:
        """The features of the tokens `span`."""
        return Features(self.q_BHTF[:, :, span], None if self.k_BKTF is None else self.k_BKTF[:, :, span], self.phi_k)

    def rows(self, rows: slice) -> Features:
        """The features of some rows."""
        return Features(self.q_BHTF[rows], None if self.k_BKTF is None else self.k_BKTF[rows], self.phi_k)


@dataclass(frozen=True)
class FusedMap:
    """phi(x) = act(x matrix + bias) for M heads: matrix [M, D, P], bias [M, P] or None, float32.

    `act` is softmax, exp, relu or elu; `paired`: of u and of -u. Features below `floor` are raised to it.
    """

    act: str
    paired: bool
    matrix: Tensor
    bias: Tensor | None = None
    floor: float = 1e-12

    @property
    def features(self) -> int:
        """F."""
        return int(self.matrix.shape[2]) * (2 if self.paired else 1)


FusedMaps = tuple[FusedMap, FusedMap]
"""The maps of queries and keys."""


@dataclass(frozen=True)
class HeadWeights:
    """One number per query head: the raw mix (g = sigmoid(mix) weights the near part) and a learned sink's logit."""

    mix_H: Tensor
    sink_logit_H: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The settings that define the function; positions count from the first real token of a row."""

    kind: Kind
    window: int
    scale: float
    softcap: float | None = None
    sinks: int = 0
    affine: bool = False
    far: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("terrace", "sliding", "linear"):
            raise ValueError(f"kind is {self.kind!r}; expected 'terrace', 'sliding' or 'linear'")
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1 token")
        if self.sinks < 0:
            raise ValueError(f"sinks is {self.sinks}; it must be 0 or more tokens")
        if self.kind == "linear" and self.sinks:
            raise ValueError(f"sinks is {self.sinks}, but kind 'linear' has no near part to keep them in; use sinks=0")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap is {self.softcap}; it must be positive, or None for no cap")

    @property
    def slots(self) -> int:
        """Key/value pairs buffered by the state."""
        return {"terrace": 2 * self.window, "sliding": self.window, "linear": 0}[self.kind]

    def log_ratio(self, mix_H: Tensor) -> Tensor:
        """log(g / l) with g = sigmoid(mix); the formula depends on the mix only through this."""
        return mix_H if self.affine else torch.nn.functional.logsigmoid(mix_H)

    def ratio(self, mix_H: Tensor) -> Tensor:
        """g / l."""
        return mix_H.exp() if self.affine else mix_H.sigmoid()

    def near_start(self, position: Tensor) -> Tensor:
        """First position (besides sinks) that is near for the query at `position` (int64, any shape); at least 0."""
        if self.kind == "terrace":
            return ((position.div(self.window, rounding_mode="floor") - 1) * self.window).clamp_min(0)
        if self.kind == "sliding":
            return (position - self.window + 1).clamp_min(0)
        return position + 1

    def is_near(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool: the key at position `key` belongs to N(n) of the query at `query` (broadcast together)."""
        recent = (key >= self.near_start(query)) | (key < self.sinks)
        return recent & (key <= query) if self.kind != "linear" else torch.zeros_like(recent)

    def is_far(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool: the key belongs to R(n)."""
        return (key <= query) & ~self.is_near(query, key)


known_rule = lru_cache(maxsize=256)(Rule)
"""A rule that is made once, since there are few and every call of a layer needs one."""


@dataclass(frozen=True, kw_only=True)
class StateSizes:
    """G, K, D, E and F of a state."""

    kv_heads: int
    key_maps: int
    key_dim: int
    value_dim: int
    features: int


@dataclass
class RowState:
    """A student's state per row: a dataclass of tensors of fixed size, rows first.

    Caches, files and servers use states only through this class, so a student may define its own subclass.
    """

    seen_B: Tensor = field(kw_only=True)
    """Real tokens seen, int64."""
    near_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that hold keys and values of the window and the sinks; the others represent the far past."""
    positive_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that are never negative: sums of features."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def replaced(self, tensors: dict[str, Tensor]) -> Self:
        """The same state with other tensors."""
        return type(self)(**tensors)

    def nbytes(self) -> int:
        """Size in bytes; independent of the number of tokens seen."""
        return sum(t.nbytes for t in self.tensors().values())

    def index_select(self, index: Tensor) -> Self:
        """Rows selected by `index`, int64 [n]; repeats allowed."""
        return self.replaced({name: t.index_select(0, index.to(t.device)) for name, t in self.tensors().items()})

    def repeat_interleave(self, n: int) -> Self:
        """Every row n times, copies of a row adjacent."""
        return self.replaced({name: t.repeat_interleave(n, dim=0) for name, t in self.tensors().items()})

    def clone(self) -> Self:
        """A copy that shares no memory."""
        return self.replaced({name: t.clone() for name, t in self.tensors().items()})

    def detach(self) -> Self:
        """The same numbers, without the computation that made them."""
        return self.replaced({name: t.detach() for name, t in self.tensors().items()})

    def to(self, device: torch.device) -> Self:
        """The state on `device`."""
        return self.replaced({name: t.to(device) for name, t in self.tensors().items()})

    def zero_(self) -> Self:
        """Forget everything, in place."""
        for t in self.tensors().values():
            t.zero_()
        return self

    def copy_(self, other: RowState) -> Self:
        """Take over the values of a state of the same kind and sizes, in place."""
        for name, t in other.tensors().items():
            getattr(self, name).copy_(t)
        return self


@dataclass
class StudentState(RowState):
    """The state of a softmax window and sums over everything older.

    `far_s_BKFE` and `far_z_BKF` (float32; the first may be bfloat16) hold the keys that were far for the last query;
    the buffer holds the others and possibly some older ones: the pair of position p is in slot p modulo N, so `seen_B`
    determines which slots are valid. The first S tokens of a row stay in the sink slots and never become far. Features
    of buffered keys are not stored; they are computed when the key becomes far.
    """

    k_BGND: Tensor
    v_BGNE: Tensor
    sink_k_BGSD: Tensor
    sink_v_BGSE: Tensor
    far_s_BKFE: Tensor
    far_z_BKF: Tensor
    _host: list[int] | None = field(default=None, init=False, repr=False, compare=False)
    near_fields = frozenset({"k_BGND", "v_BGNE", "sink_k_BGSD", "sink_v_BGSE"})
    positive_fields = frozenset({"far_z_BKF"})

    @classmethod
    def empty(
        cls,
        batch_size: int,
        rule: Rule,
        sizes: StateSizes,
        *,
        dtype: torch.dtype = torch.float32,
        far_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StudentState:
        """The state before the first token, with buffers of `dtype` and S of `far_dtype` (default: at least float32).

        z takes little memory, so it is always at least float32.
        """
        wide = torch.promote_types(dtype, torch.float32)
        kv_heads, key_dim, value_dim = sizes.kv_heads, sizes.key_dim, sizes.value_dim

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            """Zeros [B, *shape]."""
            return torch.zeros(batch_size, *shape, dtype=of, device=device)

        return cls(
            k_BGND=zeros(kv_heads, rule.slots, key_dim),
            v_BGNE=zeros(kv_heads, rule.slots, value_dim),
            sink_k_BGSD=zeros(kv_heads, rule.sinks, key_dim),
            sink_v_BGSE=zeros(kv_heads, rule.sinks, value_dim),
            far_s_BKFE=zeros(sizes.key_maps, sizes.features, value_dim, of=far_dtype or wide),
            far_z_BKF=zeros(sizes.key_maps, sizes.features, of=wide),
            seen_B=zeros(of=torch.int64),
        )

    def positions(self) -> list[int]:
        """`seen_B` on the host; it is read from the device only if the host lost count."""
        if self._host is None:
            self._host = self.seen_B.tolist()
        return self._host

    def count(self, real_B: Tensor | None = None) -> None:
        """Count one more token in every row (or those where the bool tensor `real_B` is True), in place."""
        self.seen_B += 1 if real_B is None else real_B
        self.counted(1 if real_B is None else None)

    def counted(self, tokens: int | None) -> None:
        """Record that `seen_B` has grown by `tokens` in every row; None: by an amount unknown to the host."""
        self._host = None if tokens is None or self._host is None else [n + tokens for n in self._host]

    def zero_(self) -> Self:
        """Forget everything, in place."""
        self._host = None
        return super().zero_()

    def copy_(self, other: RowState) -> Self:
        """Take over the values of a state of the same kind and sizes, in place."""
        self._host = None
        return super().copy_(other)

    def slot_positions(self) -> Tensor:
        """Position held by each buffer slot, int64 [B, N]; negative for empty slots."""
        slots = self.k_BGND.shape[2]
        last = self.seen_B[:, None] - 1
        slot = torch.arange(slots, device=last.device)
        return last - torch.remainder(last - slot, slots) if slots else last[:, :0]


@dataclass
class GatedState(StudentState):
    """As `StudentState`, with the logarithms of the gates of the buffered keys, at least float32; S and z are as of the
    last far key."""

    log_forget_BKN1: Tensor
    log_input_BKN1: Tensor

    @classmethod
    def beside(cls, window: StudentState) -> GatedState:
        """The state before the first token, of these tensors and gates."""
        z = window.far_z_BKF
        gates = z.new_zeros(*z.shape[:2], window.k_BGND.shape[2], 1)
        return cls(**window.tensors(), log_forget_BKN1=gates, log_input_BKN1=gates.clone())


def add_far(far_s_BKFE: Tensor, far_z_BKF: Tensor, fk_BKQF: Tensor, v_BGQE: Tensor, seen_B: Tensor) -> None:
    """Add Q keys of each row to the far sums, in place; zero features add nothing.

    `seen_B` are the rows' positions, for the rounding of a bfloat16 S (:func:`round_to_bfloat16`).
    """
    wide = far_z_BKF.dtype
    rows, maps, features, values = far_s_BKFE.shape
    fk = fk_BKQF.to(wide).reshape(rows * maps, -1, features)
    v = v_BGQE.to(wide)
    if maps != v.shape[1]:
        v = v[:, :, None].expand(-1, -1, maps // v.shape[1], -1, -1)
    v = v.reshape(rows * maps, -1, values)
    s = far_s_BKFE.to(wide)
    s.view(rows * maps, features, values).baddbmm_(fk.mT, v)
    far_z_BKF.add_(fk.sum(1).view(rows, maps, features))
    if far_s_BKFE.dtype == torch.bfloat16:
        far_s_BKFE.copy_(round_to_bfloat16(s, seen_B))


def rounded(sums_BX: Tensor, dtype: torch.dtype, seen_B: Tensor) -> Tensor:
    """Sums in the dtype that a state holds them in; bfloat16 by :func:`round_to_bfloat16`."""
    return round_to_bfloat16(sums_BX, seen_B) if dtype == torch.bfloat16 else sums_BX.to(dtype)


def round_to_bfloat16(x_BX: Tensor, seen_B: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down in proportion to the distance, by a threshold that varies with the position.

    With round-to-nearest, a sum stops growing once a chunk's contribution falls below half a unit in the last place,
    after about 256 chunks. Here the thresholds of an element at successive positions are a Weyl sequence modulo 1, so
    rounding errors average out. It is deterministic: the same text gives the same state.
    """
    count = x_BX[0].numel()
    element = torch.arange(count, device=x_BX.device, dtype=torch.int64).view(x_BX.shape[1:]) * 2654435761 >> 8
    turn = (seen_B.to(x_BX.device) * 40503).view(-1, *[1] * (x_BX.ndim - 1))
    threshold = (element + turn & 0xFFFF).to(torch.int32)
    bits = x_BX.float().contiguous().view(torch.int32) + threshold
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)

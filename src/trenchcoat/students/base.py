"""The base class of student attentions: feature maps, learning from the teacher, and the interface each must implement.

A student is one file in this package and one line in `students.registry`: a subclass of :class:`StudentAttention` (its
docstring says what to write), or of :class:`trenchcoat.students.sums.SumAttention` if the far part is the usual sum.
Caches, saved states, checkpoints and plans call only these methods and know no student by name.

Shape legend: B rows, H query heads, G key/value heads, K heads of the key map, T tokens, D head dim, E value dim,
F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from trenchcoat.config import StudentConfig
from trenchcoat.ops import Kind, RowState, Tokens
from trenchcoat.ops.compiled.decode import Kept, StatePages
from trenchcoat.students.feature_maps import FeatureMap
from trenchcoat.students.heads import KeptHeads

Mode = Literal["teacher", "transfer", "student"]

TINY = 1e-30
"""Lower clamp of a layer's mean squared target when the loss is divided by it."""


def layer_key(name: str, index: int) -> str:
    """Key of a per-layer number, e.g. ``loss/layer_03``."""
    return f"{name}/layer_{index:02d}"


@dataclass(frozen=True, kw_only=True)
class TransferRequest:
    """The objective's options for every student in a transfer step."""

    mse_weight: float = 1000.0
    xent_weight: float = 0.0
    normalize: Literal["none", "layer"] = "none"
    backward: bool = True
    """False: only measure the loss."""
    initialise: bool = False
    """Only set initial values that depend on real text (`init: landmarks`); no loss."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of a token's forward pass in one layer, two per multiply-add."""

    maps: float
    """Features of queries and keys."""
    near: float
    """Scores and values of the near keys."""
    write: float
    """Adding the token to the state of the far part."""
    read: float
    """Reading that state with its query."""


class StudentAttention(nn.Module):
    """A trainable sub-quadratic attention with the q, k, v of one layer as input. Parameters are float32, and stay so
    when the model is cast (`model.half()`).

    A subclass writes

    * `__init__`, if it has parameters besides the feature maps `query_map` and `key_map`, and `reset_parameters`;
    * `forward`, differentiable, and `empty_state`, whose class (a dataclass derived from
      :class:`trenchcoat.ops.RowState`) it defines itself. Derived from `StudentState` instead, it has the window's ring
      buffer of keys and values, which the operator maintains under a rule with `far=False`;

    and overrides, where the default does not fit, `decode` (default: `forward`, written back into the state), `learn`
    (default: autograd through `forward`), `flops`, `features` and `key_heads` (default: those of feature maps and of a
    state of F x E numbers per head) and `implementation` (default: a single one, in PyTorch).

    A subclass with `uses_input = True` (gates that depend on the layer's input) gets the hidden states that the layer's
    `self_attn` was called with as the keyword `x_BTM` of `forward`, every `decode...` and `transfer`.

    One with `replaces_layer = True` takes the place of the whole `self_attn`, projections included: it has no kept
    groups, reads `x_BTM` alone (x stands in for q, k and v too), and its outputs, as the teacher's in `transfer`, are
    those of the layer, behind the output projection: y [B, 1, T, M]. It writes `copy_projections` as well.
    """

    kind: ClassVar[Kind] = "linear"
    """Which keys the softmax part sees; `linear`: no softmax part."""
    has_far: ClassVar[bool] = True
    """Whether there is a far part."""
    has_maps: ClassVar[bool] = True
    """Whether the far part has feature maps."""
    uses_input: ClassVar[bool] = False
    """Whether the calls below are given `x_BTM`, the layer's input."""
    replaces_layer: ClassVar[bool] = False
    """Whether it takes the place of the layer's `self_attn`, projections included."""
    heads_apart: ClassVar[bool] = True
    """Whether every parameter is one tensor a head, heads first, so that processes can share the heads."""
    attention_rows: ClassVar[bool] = False
    """Whether `learn` can compare attention rows (`transfer.xent_weight`)."""

    def __init__(
        self,
        cfg: StudentConfig,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        if self.uses_input and hidden_size is None:
            raise ValueError(f"{cfg.name!r} reads the layer's input; give hidden_size, its width")
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads")
        self.cfg = cfg
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, head_dim if value_dim is None else value_dim
        self.hidden_size = hidden_size
        self.norm_eps = 1e-6
        """Added to mean squares by a student with `replaces_layer`; that of the model's norms once it is attached."""
        self.mode: Mode = "teacher"
        self.layer_idx = -1
        self.kept: KeptHeads | None = None
        """Heads of the layer that keep softmax attention, which are not among this student's; None for none."""
        self.far_enabled = True
        self.state_dtype = torch.float32
        self.request: TransferRequest | None = None
        self.metrics: dict[str, Tensor] = {}
        self.query_map: FeatureMap | None = None
        self.key_map: FeatureMap | None = None
        if self.has_far and self.has_maps:
            self._build_maps()

    def _build_maps(self) -> None:
        cfg = self.cfg
        if cfg.key_maps not in ("per_query_head", "per_kv_head"):
            raise ValueError(f"student.key_maps is {cfg.key_maps!r}; known: per_query_head, per_kv_head")
        key_heads = self.num_heads if cfg.key_maps == "per_query_head" else self.num_kv_heads
        if cfg.tied and key_heads != self.num_heads:
            raise ValueError(
                "student.tied shares one map between a head's queries and keys, which needs one key map per query "
                "head; use key_maps: per_query_head, or tied: false"
            )
        self.query_map = FeatureMap(cfg.feature_map, num_heads=self.num_heads, head_dim=self.head_dim)
        if not cfg.tied:
            self.key_map = FeatureMap(cfg.feature_map, num_heads=key_heads, head_dim=self.head_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to a device, but stay in float32 when it is cast to half precision."""

        def moved(tensor: Tensor) -> Tensor:
            """``fn`` without a narrowing cast."""
            found = fn(tensor)
            narrower = found.is_floating_point() and found.dtype.itemsize < torch.float32.itemsize
            return tensor.to(found.device) if narrower and found.dtype != tensor.dtype else found

        return super()._apply(moved, recurse)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter from the config; for use after `to_empty`."""
        for feature_map in (self.query_map, self.key_map):
            if feature_map is not None:
                feature_map.reset_parameters()

    def copy_projections(self, tensors: Mapping[str, Tensor]) -> None:
        """Start from the projections of the layer that a student with `replaces_layer` replaces.

        `tensors`: `q_proj.weight` [H D, M] and likewise of k, v and o; `q_proj.bias` and likewise of k and v, if there
        are; `q_norm.weight` and `k_norm.weight`, [D] or one for every head, if there are.
        """
        raise NotImplementedError

    def copied_parameters(self) -> list[nn.Parameter]:
        """Those that :meth:`copy_projections` sets; they may train at a rate of their own."""
        return []

    def see_attention(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, **scores: Any) -> None:
        """The teacher's q, k, v on the first rows of text, of a student with `replaces_layer`; called before
        :meth:`initialise`. `scores` as the keywords of :meth:`forward`."""

    @classmethod
    def starts_from_text(cls, cfg: StudentConfig) -> bool:
        """Whether initial values depend on real text (`init: landmarks`)."""
        return cls.has_far and cls.has_maps and cfg.feature_map.init == "landmarks"

    @property
    def keys_phi(self) -> FeatureMap | None:
        """The key feature map (the query map when tied)."""
        return self.key_map if self.key_map is not None else self.query_map

    @property
    def features(self) -> int:
        """F, 0 without a far part."""
        return 0 if self.query_map is None else self.query_map.features

    @property
    def outputs(self) -> int:
        """Numbers of an output of a token: H E, or M for a student with `replaces_layer`."""
        return int(self.hidden_size or 0) if self.replaces_layer else self.num_heads * self.value_dim

    @property
    def key_heads(self) -> int:
        """K, 0 without a far part."""
        return 0 if self.keys_phi is None else self.keys_phi.num_heads

    # What it computes

    def forward(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sink_logit: Tensor | None = None,
        mask_BT: Tensor | None = None,
        state: Any = None,
        **input: Any,
    ) -> tuple[Tensor, Any]:
        """y [B, H, T, E] in q's dtype with autograd, and the state after it if one was given (else None).

        `scale`, `softcap` and `sink_logit` are those of the teacher's scores. `mask_BT` is True at real tokens, in any
        pattern; other tokens are ignored, and their outputs are 0. `state` is the state before these tokens,
        :meth:`empty_state` at the start of a row; it is not modified. `input` is `x_BTM`, the layer's input, for a
        student with `uses_input`, and empty for others.
        """
        raise NotImplementedError

    def empty_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> RowState:
        """The state before the first token, at its full size; `dtype` is the model's.

        With `state_dtype` bfloat16 it should be half the size.
        """
        raise NotImplementedError

    @torch.no_grad()
    def decode(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        state: Any,
        scale: float,
        softcap: float | None = None,
        sink_logit: Tensor | None = None,
        mask_BT: Tensor | None = None,
        **input: Any,
    ) -> Tensor:
        """y [B, H, T, E] for a few new tokens; `state` is updated in place."""
        scores = {"scale": scale, "softcap": softcap, "sink_logit": sink_logit}
        y, after = self(q_BHTD, k_BGTD, v_BGTE, state=state, mask_BT=mask_BT, **scores, **input)
        state.copy_(after)
        return y

    def decode_with_kept(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, state: Any, kept: Kept, scale: float,
        softcap: float | None = None, **input: Any,
    ) -> Tensor:  # fmt: skip
        """`decode` of all heads of the layer together with its kept groups, where :meth:`decodes_kept`."""
        raise NotImplementedError

    def decodes_kept(self, like: Tensor, state: Any) -> bool:
        """Whether :meth:`decode_with_kept` can continue `state` with queries like `like`."""
        return False

    def decode_rows(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, states: Sequence[Any], scale: float,
        softcap: float | None = None, **input: Any,
    ) -> Tensor:  # fmt: skip
        """`decode` of one token for each of several states of one row, each updated in place; y [B, H, 1, E]."""
        outputs = []
        for row, state in enumerate(states):
            q, k, v = (x[row : row + 1] for x in (q_BHTD, k_BGTD, v_BGTE))
            own: dict[str, Any] = {name: x[row : row + 1] for name, x in input.items()}
            outputs.append(self.decode(q, k, v, state=state, scale=scale, softcap=softcap, **own))
        return torch.cat(outputs)

    def decode_pages(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, states: StatePages, slots: Sequence[Tensor],
        seen_B: Tensor, scale: float, softcap: float | None = None, **input: Any,
    ) -> Tensor:  # fmt: skip
        """`decode_rows` of states in a server's pages, where :meth:`decodes_pages`: one call for all rows."""
        raise NotImplementedError

    def decodes_pages(self, like: Tensor, state: Any) -> bool:
        """Whether :meth:`decode_pages` can continue states like `state` with queries like `like`."""
        return False

    def only_reads(self, *inputs: Tensor) -> bool:
        """Whether nothing needs a gradient, so that no intermediate result has to be kept."""
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in (*inputs, *self.parameters()))

    def implementation(self, dtype: torch.dtype, device: torch.device) -> str:
        """The implementation that runs for inputs of `dtype` on `device`; ValueError if the configured one cannot."""
        if self.cfg.impl != "auto":
            raise ValueError(
                f"student.impl is {self.cfg.impl}, but {self.cfg.name!r} has a single implementation; use auto"
            )
        return "pytorch"

    # How it learns

    def transfer(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        y_BHTE: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sink_logit: Tensor | None = None,
        mask_BT: Tensor | None = None,
        **input: Any,
    ) -> None:
        """Learn from the teacher's outputs y (before the output projection); see :class:`TransferRequest`.

        Adds the gradients to the parameters' `.grad` (if requested) and fills `metrics`. Works under an outer
        `torch.no_grad()`; q, k, v, y and the layer's input are constants.
        """
        request = self.request if self.request is not None else TransferRequest()
        q, k, v, y = (x.detach() for x in (q_BHTD, k_BGTD, v_BGTE, y_BHTE))
        tokens, given = Tokens(q, k, v, mask_BT), {name: x.detach() for name, x in input.items()}
        scores: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logit": sink_logit}
        if request.initialise:
            self.initialise(tokens, y, **scores, **given)
        else:
            self.metrics = self.learn(request, tokens, y, **scores, **given)

    def learn(
        self,
        request: TransferRequest,
        tokens: Tokens,
        y_BHTE: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sink_logit: Tensor | None = None,
        **input: Any,
    ) -> dict[str, Tensor]:
        """Loss, mse, xent and mean squared target, 0-d and detached; gradients go to the parameters' `.grad`."""
        if request.xent_weight:
            raise ValueError(f"{self.cfg.name!r} has no attention rows to compare; use transfer.xent_weight=0")
        mask_BT = tokens.mask_BT
        y = y_BHTE if mask_BT is None else y_BHTE * mask_BT[:, None, :, None]
        number = y.shape[0] * y.shape[2] if mask_BT is None else int(mask_BT.sum())
        count, power, weight = self._loss_scale(request, y, number)
        with torch.set_grad_enabled(request.backward):
            scores = {"scale": scale, "softcap": softcap, "sink_logit": sink_logit}
            y_hat, _ = self(tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE, mask_BT=mask_BT, **scores, **input)
            mse = (y_hat.to(power.dtype) - y).square().sum() / count
            if mse.requires_grad:
                (weight * mse).backward()
        mse = mse.detach()
        return {"loss": weight * mse, "mse": mse, "xent": torch.zeros_like(mse), "target_power": power}

    def _loss_scale(self, request: TransferRequest, y_BHTE: Tensor, tokens: int) -> tuple[int, Tensor, float]:
        """(numbers in `tokens` outputs, mean of y^2 over them, weight of the mean squared error); y is 0 elsewhere."""
        count = max(1, tokens * self.outputs)
        wide = torch.promote_types(y_BHTE.dtype, torch.float32)
        power = torch.linalg.vector_norm(y_BHTE, dtype=wide).square() / count
        divisor = power.clamp_min(TINY).item() if request.normalize == "layer" else 1.0
        return count, power, request.mse_weight / divisor

    @torch.no_grad()
    def initialise(self, tokens: Tokens, y_BHTE: Tensor, *, scale: float, **more: Any) -> None:
        """Set the initial values that depend on text, from a batch and the teacher's outputs of it; arguments as in
        :meth:`learn`. Called before the first step if :meth:`starts_from_text`."""
        k_BGTD, mask_BT = tokens.k_BGTD, tokens.mask_BT
        if self.cfg.feature_map.init != "landmarks":
            return
        real_BT = torch.ones_like(k_BGTD[:, 0, :, 0], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        for feature_map in (self.query_map, self.key_map):
            if feature_map is not None:
                feature_map.set_landmarks(k_BGTD.transpose(0, 1)[:, real_BT], scale)

    # What it costs

    def flops(self, seq_len: int) -> Flops:
        """Per token in a row of `seq_len` tokens: on average 1.5 W (terrace) or W (sliding) near keys, and the
        sinks."""
        near, window = 0.0, self.cfg.window
        if self.kind != "linear":
            keys = (1.5 if self.kind == "terrace" else 1.0) * window + self.cfg.sinks
            near = 2.0 * self.num_heads * (self.head_dim + self.value_dim) * min(keys, (seq_len + 1) / 2)
        maps = [phi for phi in (self.query_map, self.keys_phi) if phi is not None]
        each = 2.0 * self.features * self.value_dim if self.kind == "linear" or seq_len > window else 0.0
        return Flops(
            maps=2.0 * sum(p.numel() for phi in maps for p in phi.parameters() if p.ndim == 3),
            near=near, write=each * self.key_heads, read=each * self.num_heads,
        )  # fmt: skip

    @property
    def graph_numbers(self) -> float:
        """float32 numbers a token that `forward` keeps for its backward besides features; 0 if that recomputes them.

        Stage 1 by autograd holds as many for one layer at a time.
        """
        return 0.0

    def extra_repr(self) -> str:
        """One line for printing the module."""
        return f"{self.kind}, heads={self.num_heads}/{self.num_kv_heads}, window={self.cfg.window}"

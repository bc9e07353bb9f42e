"""The base class of every student attention: parameters, the three ways it runs, and its layer-local learning.

Shape legend: B rows, H query heads, G key/value heads, K heads of the key map, T tokens, D head dim, E value dim,
F features.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import trenchcoat.students.fused as fused
from trenchcoat.config import StudentConfig
from trenchcoat.ops import (
    Features,
    HeadWeights,
    Kind,
    Learner,
    Rows,
    Rule,
    StateSizes,
    StudentState,
    Tokens,
    attend_with_maps,
    attention_cross_entropy,
    decode,
    linear_window_attention,
    transfer,
)
from trenchcoat.students.feature_maps import FeatureMap, Weights

Mode = Literal["teacher", "transfer", "student"]

TINY = 1e-30
"""Floor of a layer's mean squared target where the loss is divided by it."""


def layer_key(name: str, index: int) -> str:
    """Key of a per-layer number, e.g. ``loss/layer_03``."""
    return f"{name}/layer_{index:02d}"


@dataclass(frozen=True, kw_only=True)
class TransferRequest:
    """What the objective asks of every student during a transfer step."""

    mse_weight: float = 1000.0
    xent_weight: float = 0.0
    normalize: Literal["none", "layer"] = "none"
    backward: bool = True
    """False only measures the loss."""
    initialise: bool = False
    """Only set the initial values that come from real text (`init: landmarks`); no loss."""


class StudentAttention(nn.Module):
    """A trainable sub-quadratic attention with the q, k, v of one layer as input.

    A subclass sets `kind` (and `has_far = False` when it has no feature maps). Parameters are float32.
    """

    kind: ClassVar[Kind] = "terrace"
    has_far: ClassVar[bool] = True

    def __init__(
        self, cfg: StudentConfig, *, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int | None = None
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads")
        if not 0.0 < cfg.mix_init < 1.0:
            raise ValueError(f"student.mix_init is {cfg.mix_init}; it must lie strictly between 0 and 1")
        self.cfg = cfg
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, head_dim if value_dim is None else value_dim
        self.mode: Mode = "teacher"
        self.layer_idx = -1
        self.far_enabled = True
        self.state_dtype = torch.float32
        self.request: TransferRequest | None = None
        self.metrics: dict[str, Tensor] = {}
        self.query_map: FeatureMap | None = None
        self.key_map: FeatureMap | None = None
        self.mix_H: nn.Parameter | None = None
        if self.has_far:
            self._build_maps()
        self._rule(scale=1.0)
        self.reset_parameters()

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
        if self.kind != "linear":
            self.mix_H = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter from the config; for use after `to_empty`."""
        for feature_map in (self.query_map, self.key_map):
            if feature_map is not None:
                feature_map.reset_parameters()
        if self.mix_H is not None:
            self.mix_H.fill_(math.log(self.cfg.mix_init / (1.0 - self.cfg.mix_init)))

    @property
    def starts_from_text(self) -> bool:
        """Whether initial values come from real text (`init: landmarks`)."""
        return self.has_far and self.cfg.feature_map.init == "landmarks"

    @property
    def keys_phi(self) -> FeatureMap | None:
        """The key feature map (the query map when tied)."""
        return self.key_map if self.key_map is not None else self.query_map

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
        state: StudentState | None = None,
    ) -> tuple[Tensor, StudentState | None]:
        """y [B, H, T, E] in q's dtype with autograd, and the state after it where one came in (else None).

        `state` is what came before, :meth:`empty_state` at the start of a row; it is not modified.
        """
        tokens, rule = Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT), self._rule(scale, softcap)
        heads, impl = HeadWeights(self._mix(q_BHTD), sink_logit), self._impl(q_BHTD)
        if impl == "triton":
            from trenchcoat.ops.triton.attention import attend

            return attend(tokens, fused.fused_maps(self.query_map, self.keys_phi, rule), heads, rule, state=state)
        if state is None and rule.far and impl == "chunkwise" and self._only_reads(q_BHTD, k_BGTD, v_BGTE):
            learners = self._learners(rule, False)
            assert learners is not None
            return attend_with_maps(tokens, learners, heads, rule), None
        features = self._features(q_BHTD, k_BGTD, rule)
        return linear_window_attention(tokens, features, heads, rule, state=state, impl=impl)

    def implementation(self, dtype: torch.dtype, device: torch.device) -> str:
        """The implementation that runs for inputs of `dtype` on `device`."""
        shape = fused.Shape(dtype, self._rule(scale=1.0), self.head_dim, self.value_dim)
        return fused.implementation(self.cfg.impl, device, self.query_map, shape)

    def _impl(self, like: Tensor) -> str:
        return self.implementation(like.dtype, like.device)

    def _only_reads(self, *inputs: Tensor) -> bool:
        """Nothing needs a gradient, so features need not outlive their tile."""
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in (*inputs, *self.parameters()))

    @torch.no_grad()
    def decode(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        state: StudentState,
        scale: float,
        softcap: float | None = None,
        sink_logit: Tensor | None = None,
        mask_BT: Tensor | None = None,
    ) -> Tensor:
        """y [B, H, T, E] for a few new tokens; `state` is updated in place."""
        tokens, rule = Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT), self._rule(scale, softcap)
        heads, query, key = HeadWeights(self._mix(q_BHTD), sink_logit), self.query_map, self.keys_phi
        if self._impl(q_BHTD) == "triton":
            from trenchcoat.ops.triton.decode import decode as fused_decode

            return fused_decode(tokens, fused.fused_maps(query, key, rule), heads, state, rule)
        features = None
        if rule.far and query is not None and key is not None:
            features = Features(query.rows(q_BHTD), key.rows(k_BGTD) if rule.kind == "linear" else None, key.rows)
        return decode(tokens, features, heads, state, rule)

    def empty_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> StudentState:
        """The state before the first token, at its final size; `dtype` is the keys' and values'.

        With `state_dtype` bfloat16 the far sums and the buffered pairs are bfloat16.
        """
        keys = self.keys_phi
        short = self.state_dtype == torch.bfloat16
        sizes = StateSizes(
            kv_heads=self.num_kv_heads,
            key_maps=0 if keys is None else keys.num_heads,
            key_dim=self.head_dim,
            value_dim=self.value_dim,
            features=0 if keys is None else keys.features,
        )
        types = {"dtype": torch.bfloat16, "far_dtype": torch.bfloat16} if short else {"dtype": dtype}
        return StudentState.empty(batch_size, self._rule(scale=1.0), sizes, device=device, **types)

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
    ) -> None:
        """Learn from the teacher's outputs y (before the output projection); see :class:`TransferRequest`.

        Adds the gradients to the parameters' `.grad` (when the request says so) and fills `metrics`. Works under an
        outer `torch.no_grad()`; q, k, v, y are constants.
        """
        request = self.request if self.request is not None else TransferRequest()
        if request.initialise:
            self._set_landmarks(k_BGTD, scale, mask_BT)
            return
        rule = self._rule(scale, softcap)
        with torch.no_grad():
            rows = Rows.plan(q_BHTD.shape[0], q_BHTD.shape[2], rule, mask_BT, None)
            q, k, v, y = (rows.align(t.detach()) for t in (q_BHTD, k_BGTD, v_BGTE, y_BHTE))
            tokens_count = q.shape[0] * q.shape[2] if rows.length_B is None else int(rows.length_B.sum())
            count = max(1, tokens_count * self.num_heads * self.value_dim)
            power = _power(y, rows) / count
            weight = request.mse_weight / (power.clamp_min(TINY).item() if request.normalize == "layer" else 1.0)
            learns = request.backward and self.query_map is not None
            tokens, heads = Tokens(q, k, v), HeadWeights(self._mix(q), sink_logit)
            lengths = rows.length_B
            error, dlog_ratio = self._transfer_error(tokens, y, heads, rule, lengths, weight / count, learns)
            mse, xent = error / count, torch.zeros_like(power)
            if request.xent_weight and rule.far:
                rows_count = max(1, tokens_count * self.num_heads)
                scale_of_rows = request.xent_weight / rows_count
                xent, dlog = self._cross_entropy(tokens, heads, rule, lengths, scale_of_rows, learns)
                xent = xent / rows_count
                dlog_ratio = dlog_ratio + dlog
            if learns:
                self._add_mix_gradient(dlog_ratio)
        loss = weight * mse + request.xent_weight * xent
        self.metrics = {"loss": loss, "mse": mse, "xent": xent, "target_power": power}

    def _transfer_error(
        self,
        tokens: Tokens,
        y_BHTE: Tensor,
        heads: HeadWeights,
        rule: Rule,
        length_B: Tensor | None,
        scale: float,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        """(summed squared error, gradient of `scale` times it for log(g / l)); the maps' go to their `.grad`."""
        dlog_ratio = torch.zeros_like(heads.mix_H)
        options: dict[str, Any] = {"length_B": length_B, "error_scale": scale}
        if self._impl(tokens.q_BHTD) == "triton":
            from trenchcoat.ops.triton.attention import transfer as fused_transfer

            maps = (self.query_map, self.keys_phi)
            fused_pair = fused.fused_maps(*maps, rule)
            total, found = fused_transfer(tokens, y_BHTE, fused_pair, heads, rule, learn=learns, **options)
            dlog = fused.add_gradients(*maps, found)
            return total, dlog_ratio if dlog is None else dlog
        wanted = dlog_ratio if learns else None
        total = transfer(tokens, y_BHTE, self._learners(rule, learns), heads, rule, dlog_ratio_H=wanted, **options)
        return total, dlog_ratio

    def _set_landmarks(self, k_BGTD: Tensor, scale: float, mask_BT: Tensor | None) -> None:
        real_BT = torch.ones_like(k_BGTD[:, 0, :, 0], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        for feature_map in (self.query_map, self.key_map):
            if feature_map is not None:
                feature_map.set_landmarks(k_BGTD.transpose(0, 1)[:, real_BT], scale)

    def _cross_entropy(
        self, tokens: Tokens, heads: HeadWeights, rule: Rule, length_B: Tensor | None, weight: float, learns: bool
    ) -> tuple[Tensor, Tensor]:
        """(summed cross-entropy, `weight` times its gradient for log(g / l)); adds the maps' gradients to `.grad`."""
        none = torch.zeros_like(heads.mix_H)
        if self._impl(tokens.q_BHTD) == "triton":
            from trenchcoat.ops.triton.crossent_launch import cross_entropy

            maps = (self.query_map, self.keys_phi)
            fused_pair = fused.fused_maps(*maps, rule)
            total, found = cross_entropy(tokens, fused_pair, heads, rule, length_B=length_B, learn=learns)
            dlog = fused.add_gradients(*maps, found, weight)
            return total, none if dlog is None else dlog
        with torch.set_grad_enabled(learns):
            features = self._features(tokens.q_BHTD, tokens.k_BGTD, rule)
        assert features is not None and features.k_BKTF is not None  # noqa: PT018
        fixed = Features(features.q_BHTF.detach(), features.k_BKTF.detach())
        result = attention_cross_entropy(tokens, fixed, heads, rule, length_B=length_B, gradients=learns)
        if not learns or result.dfq_BHTF is None or result.dfk_BKTF is None or result.dlog_ratio_H is None:
            return result.total, none
        with torch.enable_grad():
            both = (features.q_BHTF, features.k_BKTF)
            torch.autograd.backward(both, (result.dfq_BHTF.mul_(weight), result.dfk_BKTF.mul_(weight)))
        return result.total, result.dlog_ratio_H.mul_(weight)

    def _add_mix_gradient(self, dlog_ratio_H: Tensor) -> None:
        if self.mix_H is None:
            return
        d = dlog_ratio_H if self.cfg.affine else dlog_ratio_H * torch.sigmoid(-self.mix_H)
        self.mix_H.grad = d if self.mix_H.grad is None else self.mix_H.grad.add_(d)

    def _features(self, q_BHTD: Tensor, k_BGTD: Tensor, rule: Rule) -> Features | None:
        if not rule.far or self.query_map is None or self.keys_phi is None:
            return None
        return Features(self.query_map(q_BHTD), self.keys_phi(k_BGTD), self.keys_phi)

    def _learners(self, rule: Rule, learns: bool) -> tuple[Learner[Weights], Learner[Weights]] | None:
        if not rule.far or self.query_map is None or self.keys_phi is None:
            return None
        query, key = (
            Learner(phi, phi.weights(), phi.gradients() if learns else None) for phi in (self.query_map, self.keys_phi)
        )
        return query, key

    def _mix(self, like: Tensor) -> Tensor:
        """The raw mix; a constant 0 where the student learns none (its value then cancels or is not used)."""
        if self.mix_H is not None:
            return self.mix_H
        return torch.zeros(self.num_heads, dtype=torch.float32, device=like.device)

    def _rule(self, scale: float, softcap: float | None = None) -> Rule:
        far, cfg = self.has_far and self.far_enabled, self.cfg
        return _known_rule(self.kind, cfg.window, scale, softcap, cfg.sinks, cfg.affine, far)

    def extra_repr(self) -> str:
        """One line for printing the module."""
        return f"{self.kind}, heads={self.num_heads}/{self.num_kv_heads}, window={self.cfg.window}"


@functools.lru_cache(maxsize=256)
def _known_rule(
    kind: Kind, window: int, scale: float, softcap: float | None, sinks: int, affine: bool, far: bool
) -> Rule:
    return Rule(kind=kind, window=window, scale=scale, softcap=softcap, sinks=sinks, affine=affine, far=far)


def _power(y_BHLE: Tensor, rows: Rows) -> Tensor:
    """Sum of squares over real tokens."""
    if rows.length_B is not None:
        token = torch.arange(y_BHLE.shape[2], device=y_BHLE.device)
        y_BHLE = y_BHLE.masked_fill((token >= rows.length_B[:, None])[:, None, :, None], 0.0)
    return torch.linalg.vector_norm(y_BHLE, dtype=torch.promote_types(y_BHLE.dtype, torch.float32)).square()

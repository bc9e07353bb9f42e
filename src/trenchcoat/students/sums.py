"""Students based on the operator: softmax attention over a window, sums of phi(k) v^T over everything older.

The formula is in :mod:`trenchcoat.ops.reference`; transfer is in closed form, without an autograd graph.

Shape legend: as in :mod:`trenchcoat.students.base`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trenchcoat.config import StudentConfig
from trenchcoat.ops import Features, HeadWeights, Kind, Rule, StateSizes, StudentState, Tokens
from trenchcoat.ops.chunked.closed_form import transfer_error
from trenchcoat.ops.chunked.maps import Learners
from trenchcoat.ops.chunked.rows import Rows
from trenchcoat.ops.compiled.decode import Kept, StatePages, decode_pages
from trenchcoat.ops.compiled.decode import decode as compiled_decode
from trenchcoat.ops.crossent import attention_cross_entropy
from trenchcoat.ops.decode import decode, decode_rows
from trenchcoat.ops.operator import attend_with_maps, linear_window_attention
from trenchcoat.ops.state import known_rule
from trenchcoat.students import fused
from trenchcoat.students.base import StudentAttention, TransferRequest
from trenchcoat.students.feature_maps import Weights


class SumAttention(StudentAttention):
    """A subclass sets `kind`, and `has_far = False` if it has no far part."""

    kind: ClassVar[Kind] = "terrace"
    attention_rows = True

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(cfg, **sizes)
        if not 0.0 < cfg.mix_init < 1.0:
            raise ValueError(f"student.mix_init is {cfg.mix_init}; it must be strictly between 0 and 1")
        self._chosen: tuple[tuple[torch.dtype, str, bool], str] | None = None
        """The implementation on CPUs, and what it was chosen for."""
        self._known_maps = fused.DecodingMaps()
        self.mix_H: nn.Parameter | None = None
        if self.has_far and self.kind != "linear":
            self.mix_H = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self._rule(scale=1.0)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter from the config; for use after `to_empty`."""
        super().reset_parameters()
        if self.mix_H is not None:
            self.mix_H.fill_(math.log(self.cfg.mix_init / (1.0 - self.cfg.mix_init)))

    def forward(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        mask_BT: Tensor | None = None,
        state: StudentState | None = None,
        **scores: Any,
    ) -> tuple[Tensor, StudentState | None]:
        """See :meth:`StudentAttention.forward`."""
        tokens, (heads, rule) = Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT), self._settings(q_BHTD, **scores)
        impl = self._impl(q_BHTD)
        kernels = fused.kernels_of(impl)
        if kernels is not None:
            y, after = kernels.attend(tokens, self._fused(rule), heads, rule, state=state)
            return y, after
        if state is None and rule.far and impl == "chunkwise" and self.only_reads(q_BHTD, k_BGTD, v_BGTE):
            learners = self._learners(rule, False)
            assert learners is not None
            return attend_with_maps(tokens, learners, heads, rule), None
        features = self._features(q_BHTD, k_BGTD, rule)
        return linear_window_attention(tokens, features, heads, rule, state=state, impl=impl)

    def decode(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        state: StudentState,
        mask_BT: Tensor | None = None,
        **scores: Any,
    ) -> Tensor:
        """See :meth:`StudentAttention.decode`."""
        tokens, (heads, rule) = Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT), self._settings(q_BHTD, **scores)
        impl = self._impl(q_BHTD)
        if impl == "compiled" and fused.decodes(state, rule):
            return compiled_decode(tokens, self._decoding_maps(rule), heads, [state], rule)
        with torch.no_grad():
            if impl == "triton":
                from trenchcoat.ops.triton.decode import decode as fused_decode

                return fused_decode(tokens, self._fused(rule), heads, state, rule)
            return decode(tokens, self._decoding_features(tokens, rule), heads, state, rule)

    def decode_with_kept(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, state: StudentState, kept: Kept, **scores: Any
    ) -> Tensor:
        """See :meth:`StudentAttention.decode_with_kept`."""
        tokens, (heads, rule) = Tokens(q_BHTD, k_BGTD, v_BGTE), self._settings(q_BHTD, **scores)
        return compiled_decode(tokens, self._decoding_maps(rule), heads, [state], rule, kept)

    def decodes_kept(self, like: Tensor, state: StudentState) -> bool:
        """See :meth:`StudentAttention.decodes_kept`."""
        return self._impl(like) == "compiled" and fused.decodes(state, self._rule(scale=1.0))

    @torch.no_grad()
    def decode_rows(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        states: Sequence[StudentState],
        **scores: Any,
    ) -> Tensor:
        """See :meth:`StudentAttention.decode_rows`; the features of all rows are computed together."""
        impl = self._impl(q_BHTD)
        if impl == "triton":
            return super().decode_rows(q_BHTD, k_BGTD, v_BGTE, states=states, **scores)
        tokens, (heads, rule) = Tokens(q_BHTD, k_BGTD, v_BGTE), self._settings(q_BHTD, **scores)
        if impl == "compiled" and all(fused.decodes(state, rule) for state in states):
            return compiled_decode(tokens, self._decoding_maps(rule), heads, states, rule)
        return decode_rows(tokens, self._decoding_features(tokens, rule), heads, states, rule)

    def decode_pages(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, states: StatePages, slots: Sequence[Tensor],
        seen_B: Tensor, **scores: Any,
    ) -> Tensor:  # fmt: skip
        """See :meth:`StudentAttention.decode_pages`."""
        tokens, (heads, rule) = Tokens(q_BHTD, k_BGTD, v_BGTE), self._settings(q_BHTD, **scores)
        return decode_pages(tokens, self._decoding_maps(rule), heads, rule, states, slots, seen_B)

    def decodes_pages(self, like: Tensor, state: StudentState) -> bool:
        """See :meth:`StudentAttention.decodes_pages`."""
        return self.decodes_kept(like, state)

    def _decoding_features(self, tokens: Tokens, rule: Rule) -> Features | None:
        query, key = self.query_map, self.keys_phi
        if not rule.far or query is None or key is None:
            return None
        own = key.rows(tokens.k_BGTD) if rule.kind == "linear" else None
        return Features(query.rows(tokens.q_BHTD), own, key.rows)

    def empty_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> StudentState:
        """The state before the first token, at its full size; `dtype` is that of keys and values.

        With `state_dtype` bfloat16 the far sums and the buffered pairs are bfloat16.
        """
        sizes = StateSizes(
            kv_heads=self.num_kv_heads, key_maps=self.key_heads, key_dim=self.head_dim, value_dim=self.value_dim,
            features=self.features,
        )  # fmt: skip
        short = self.state_dtype == torch.bfloat16
        types = {"dtype": torch.bfloat16, "far_dtype": torch.bfloat16} if short else {"dtype": dtype}
        return StudentState.empty(batch_size, self._rule(scale=1.0), sizes, device=device, **types)

    @torch.no_grad()
    def learn(self, request: TransferRequest, tokens: Tokens, y_BHTE: Tensor, **scores: Any) -> dict[str, Tensor]:
        """In closed form, with the cross-entropy of attention rows; see :meth:`StudentAttention.learn`."""
        like = tokens.q_BHTD
        heads, rule = self._settings(like, **scores)
        rows = Rows.plan(like.shape[0], like.shape[2], rule, tokens.mask_BT, None)
        q, k, v, y = (rows.align(x) for x in (tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE, y_BHTE))
        number = q.shape[0] * q.shape[2] if rows.length_B is None else int(rows.length_B.sum())
        count, power, weight = self._loss_scale(request, _real(y, rows), number)
        learns = request.backward and self.query_map is not None
        call = Tokens(q, k, v), heads, rule, rows.length_B
        error, dlog_ratio = self._squared_error(*call, y, weight / count if learns else None)
        mse, xent = error / count, torch.zeros_like(power)
        if request.xent_weight and rule.far:
            pairs = max(1, number * self.num_heads)
            xent, dlog = self._cross_entropy(*call, request.xent_weight / pairs if learns else None)
            xent, dlog_ratio = xent / pairs, dlog_ratio + dlog
        if learns:
            self._add_mix_gradient(dlog_ratio)
        loss = weight * mse + request.xent_weight * xent
        return {"loss": loss, "mse": mse, "xent": xent, "target_power": power}

    def _squared_error(
        self,
        tokens: Tokens,
        heads: HeadWeights,
        rule: Rule,
        length_B: Tensor | None,
        y_BHTE: Tensor,
        weight: float | None,
    ) -> tuple[Tensor, Tensor]:
        """(sum, gradient of `weight` times the sum for log(g / l)); the maps' gradients go to their `.grad`. None: no
        gradients."""
        learns, dlog_ratio = weight is not None, torch.zeros_like(heads.mix_H)
        options: dict[str, Any] = {"length_B": length_B, "error_scale": weight or 0.0}
        kernels = fused.kernels_of(self._impl(tokens.q_BHTD))
        if kernels is not None:
            maps = self._fused(rule)
            total, found = kernels.transfer_error(tokens, y_BHTE, maps, heads, rule, learn=learns, **options)
            dlog = fused.add_gradients(self.query_map, self.keys_phi, found)
            return total, dlog_ratio if dlog is None else dlog
        wanted = dlog_ratio if learns else None
        total = transfer_error(
            tokens, y_BHTE, self._learners(rule, learns), heads, rule, dlog_ratio_H=wanted, **options
        )
        return total, dlog_ratio

    def _cross_entropy(
        self, tokens: Tokens, heads: HeadWeights, rule: Rule, length_B: Tensor | None, weight: float | None
    ) -> tuple[Tensor, Tensor]:
        """Like `_squared_error`, for the cross-entropy of attention rows."""
        learns, none = weight is not None, torch.zeros_like(heads.mix_H)
        if self._impl(tokens.q_BHTD) == "triton":
            from trenchcoat.ops.triton.crossent_launch import cross_entropy

            total, found = cross_entropy(tokens, self._fused(rule), heads, rule, length_B=length_B, learn=learns)
            dlog = fused.add_gradients(self.query_map, self.keys_phi, found, weight or 0.0)
            return total, none if dlog is None else dlog
        with torch.set_grad_enabled(learns):
            features = self._features(tokens.q_BHTD, tokens.k_BGTD, rule)
        assert features is not None and features.k_BKTF is not None  # noqa: PT018
        fixed = Features(features.q_BHTF.detach(), features.k_BKTF.detach())
        total, gradients = attention_cross_entropy(tokens, fixed, heads, rule, length_B=length_B, gradients=learns)
        if weight is None or gradients is None:
            return total, none
        dfq, dfk, dlog_ratio = (gradient.mul_(weight) for gradient in gradients)
        with torch.enable_grad():
            torch.autograd.backward((features.q_BHTF, features.k_BKTF), (dfq, dfk))
        return total, dlog_ratio

    def _add_mix_gradient(self, dlog_ratio_H: Tensor) -> None:
        if self.mix_H is None:
            return
        d = dlog_ratio_H if self.cfg.affine else dlog_ratio_H * torch.sigmoid(-self.mix_H)
        self.mix_H.grad = d if self.mix_H.grad is None else self.mix_H.grad.add_(d)

    def _features(self, q_BHTD: Tensor, k_BGTD: Tensor, rule: Rule) -> Features | None:
        if not rule.far or self.query_map is None or self.keys_phi is None:
            return None
        return Features(self.query_map(q_BHTD), self.keys_phi(k_BGTD), self.keys_phi)

    def _fused(self, rule: Rule) -> fused.FusedMaps | None:
        return fused.fused_maps(self.query_map, self.keys_phi, rule)

    def _decoding_maps(self, rule: Rule) -> fused.FusedMaps | None:
        return self._known_maps.of(self.query_map, self.keys_phi, rule)

    def _learners(self, rule: Rule, learns: bool) -> Learners[Weights] | None:
        if not rule.far or self.query_map is None or self.keys_phi is None:
            return None
        return self.query_map.learner(learns), self.keys_phi.learner(learns)

    def _mix(self, like: Tensor) -> Tensor:
        """The raw mix; a constant 0 if the student learns none (its value then cancels or is not used)."""
        if self.mix_H is not None:
            return self.mix_H
        return torch.zeros(self.num_heads, dtype=torch.float32, device=like.device)

    def _settings(
        self, like: Tensor, *, scale: float, softcap: float | None = None, sink_logit: Tensor | None = None
    ) -> tuple[HeadWeights, Rule]:
        return HeadWeights(self._mix(like), sink_logit), self._rule(scale, softcap)

    def _rule(self, scale: float, softcap: float | None = None) -> Rule:
        far, cfg = self.has_far and self.far_enabled, self.cfg
        return known_rule(
            kind=self.kind, window=cfg.window, scale=scale, softcap=softcap, sinks=cfg.sinks, affine=cfg.affine, far=far
        )

    def implementation(self, dtype: torch.dtype, device: torch.device) -> str:
        """The implementation that runs for inputs of `dtype` on `device`."""
        shape = fused.LayerShape(dtype, self._rule(scale=1.0), self.head_dim, self.value_dim)
        return fused.implementation(self.cfg.impl, device, self.query_map, shape)

    def _impl(self, like: Tensor) -> str:
        if like.device.type != "cpu":
            return self.implementation(like.dtype, like.device)
        asked = (like.dtype, self.cfg.impl, self.far_enabled)
        if self._chosen is None or self._chosen[0] != asked:
            self._chosen = (asked, self.implementation(like.dtype, like.device))
        return self._chosen[1]


def _real(y_BHLE: Tensor, rows: Rows) -> Tensor:
    """Zero outputs where there is no token."""
    if rows.length_B is None:
        return y_BHLE
    token = torch.arange(y_BHLE.shape[2], device=y_BHLE.device)
    return y_BHLE.masked_fill((token >= rows.length_B[:, None])[:, None, :, None], 0.0)

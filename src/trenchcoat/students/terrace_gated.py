"""Terrace attention whose far part forgets, weighs what it writes, and has a denominator of its own.

    S_j = f_j S_{j-1} + i_j phi(k_j) v_j^T,   z_j = f_j z_{j-1} + i_j phi(k_j),   far_n = phi(q_n) S / phi(q_n) z

where S and z are those of the last far key of the query. f = sigmoid(w_f . x + b_f) and i = exp(15 tanh((w_i . x + b_i)
/ 15)), one number a token and key map, from the layer's input. Mixed with the window as in
:mod:`trenchcoat.students.hybrid`.

Sources: hybrid xLSTM (https://arxiv.org/abs/2603.15590); the cap of the input gate, xLSTM 7B
(https://arxiv.org/abs/2503.13427, section 3.2). In :mod:`trenchcoat.ops.recurrences`, `gated_far` is the definition.

**At the start** i = 1 and f is one number a head, so far_n is the sum of the ungated student with a forgetting of that
half-life and without the near part in its denominator. Before any text f has a half-life of 16,384 tokens and o = 1 -
`mix_init`. On the first rows of text both are chosen, head by head, by the least squared error against the teacher: f
among `HALF_LIVES`, o in closed form. Up to the range of o, the error there is at most that of the window with sinks,
and at most that of mixing it with the ungated far part by any one number a head.

Shape legend: as in :mod:`trenchcoat.students.hybrid`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trenchcoat.config import StudentConfig
from trenchcoat.ops import GatedState, HeadWeights, Rule, StateSizes, StudentState, Tokens
from trenchcoat.ops.chunked.decayed import FarSums, GatedKeys, after_chunk, gated_far, read_far
from trenchcoat.ops.chunked.rows import Rows, far_keys, newest
from trenchcoat.ops.compiled.attention import GatedRows, attend
from trenchcoat.ops.compiled.decode import Gates, Kept, StatePages, decode, decode_pages
from trenchcoat.ops.decode import chunks_due
from trenchcoat.ops.state import rounded
from trenchcoat.students import fused
from trenchcoat.students.hybrid import LEAST_MIX, MOST_MIX, HybridAttention, InputGate, open_tokens

CAP = 15.0
"""Largest logarithm of an input gate."""

HALF_LIVES = (16384, 1024, 256, 64, 16)
"""Tokens after which a key counts half, of the forget gates that are tried on the first text."""


class TerraceGatedAttention(HybridAttention):
    """Softmax over the terrace window and the sinks, gated linear attention over everything older."""

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(cfg, **sizes)
        assert self.hidden_size is not None
        self.forget_gate = InputGate(self.hidden_size, self.key_heads)
        self.input_gate = InputGate(self.hidden_size, self.key_heads)
        self._known_kernels: tuple[Any, bool] | None = None
        """Whether the kernels compute the far part, and what that was asked for."""
        self._known_maps = fused.DecodingMaps()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter from the config."""
        super().reset_parameters()
        self.forget_gate.start(_forget_bias(HALF_LIVES[0]))
        self.input_gate.start(0.0)

    def empty_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> GatedState:
        """See :meth:`StudentAttention.empty_state`."""
        sizes = StateSizes(
            kv_heads=self.num_kv_heads, key_maps=self.key_heads, key_dim=self.head_dim, value_dim=self.value_dim,
            features=self.features,
        )  # fmt: skip
        short = self.state_dtype == torch.bfloat16
        types = {"dtype": torch.bfloat16, "far_dtype": torch.bfloat16} if short else {"dtype": dtype}
        return GatedState.beside(StudentState.empty(batch_size, self._rule(1.0), sizes, device=device, **types))

    def gates(self, x_BTM: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of f and i, [B, K, T, 1], of directions of the layer's input."""
        write = CAP * torch.tanh(self.input_gate(x_BTM) / CAP)
        return logsigmoid(self.forget_gate(x_BTM))[..., None], write[..., None]

    def far(
        self, tokens: Tokens, x_BTM: Tensor, rule: Rule, state: GatedState | None, after: GatedState | None
    ) -> tuple[Tensor, GatedState | None]:
        """See :meth:`HybridAttention.far`."""
        assert self.query_map is not None and self.keys_phi is not None  # noqa: PT018
        q, k, v = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE
        rows = Rows.plan(q.shape[0], q.shape[2], rule, tokens.mask_BT, state)
        fq, fk, (log_forget, log_input) = self.query_map(q), self.keys_phi(k), self.gates(x_BTM)
        before: tuple[Tensor | None, ...] = (None,) * 5
        if state is not None:
            with torch.no_grad():
                buffered = self.keys_phi(state.k_BGND)
            empty = fq.new_zeros(*fq.shape[:2], rule.slots, fq.shape[3])
            before = (empty, buffered, state.v_BGNE, state.log_forget_BKN1, state.log_input_BKN1)
        aligned = [rows.align(x, old) for x, old in zip((fq, fk, v, log_forget, log_input), before, strict=True)]
        fq, fk, v, log_forget, log_input = aligned
        share = self.key_heads // v.shape[1]
        v = v.to(fk.dtype).repeat_interleave(share, 1) if share > 1 else v.to(fk.dtype)
        keys = GatedKeys(far_keys(fk, rows, rule), v, log_forget[..., 0], log_input[..., 0])
        start = self._sums(state, keys)
        seen_B = None if after is None else after.seen_B.to(v.device)
        folded_B = None if seen_B is None else _folded(seen_B, rows.first_B.to(v.device), rule)
        y, sums = gated_far(fq, keys, rule.window, start, folded_B)
        if after is not None:
            with torch.no_grad():
                _store(after, sums)
                after.log_forget_BKN1 = newest(after.log_forget_BKN1, log_forget, after, rows)
                after.log_input_BKN1 = newest(after.log_input_BKN1, log_input, after, rows)
        return rows.restore(y), after

    def far_step(self, token: Tokens, x_B1M: Tensor, rule: Rule, state: GatedState) -> Tensor:
        """See :meth:`HybridAttention.far_step`."""
        assert self.query_map is not None
        real_B = None if token.mask_BT is None else token.mask_BT[:, 0].to(state.seen_B.device)
        for half, index in chunks_due(state, rule, real_B):
            self._fold(state, rule, half, index)
        slot_B = (state.seen_B % rule.slots)[:, None, None, None]
        for buffer, new in zip((state.log_forget_BKN1, state.log_input_BKN1), self.gates(x_B1M), strict=True):
            slot = slot_B.expand(-1, self.key_heads, 1, 1)
            kept = new if real_B is None else torch.where(real_B[:, None, None, None], new, buffer.gather(2, slot))
            buffer.scatter_(2, slot, kept.to(buffer.dtype))
        fq = self.query_map.rows(token.q_BHTD)
        return read_far(fq, FarSums(state.far_s_BKFE.to(fq.dtype), state.far_z_BKF.to(fq.dtype)))

    def forward(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        x_BTM: Tensor | None = None,
        mask_BT: Tensor | None = None,
        state: Any = None,
        sink_logit: Tensor | None = None,
        **scores: Any,
    ) -> tuple[Tensor, Any]:
        """See :meth:`StudentAttention.forward`; without gradients by the compiled kernels, where they can."""
        tokens = Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT)
        by_kernels = self.far_enabled and self._on_kernels(q_BHTD)
        if not by_kernels or not self.only_reads(q_BHTD, k_BGTD, v_BGTE, *(() if x_BTM is None else (x_BTM,))):
            given = {"x_BTM": x_BTM, "mask_BT": mask_BT, "sink_logit": sink_logit, **scores}
            return super().forward(q_BHTD, k_BGTD, v_BGTE, state=state, **given)
        with torch.no_grad():
            rule, gates = self._rule(**scores, far=True), self.gates(self._direction(x_BTM, q_BHTD))
            open_BT = open_tokens(tokens, rule, None if state is None else state.seen_B)
            rows = GatedRows(*gates, self.mix(tokens, open_BT, torch.float32))
            maps, heads = self._known_maps.of(self.query_map, self.keys_phi, rule), self._weights(q_BHTD, sink_logit)
            return attend(tokens, maps, heads, rule, state=state, gated=rows)

    def decode(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        state: StudentState,
        mask_BT: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        """See :meth:`StudentAttention.decode`: by the compiled kernels where they can, else as its base class does."""
        if not self.decodes_kept(q_BHTD, state):
            return super().decode(q_BHTD, k_BGTD, v_BGTE, state=state, mask_BT=mask_BT, **given)
        maps, heads, rule, gates = self._for_kernels(q_BHTD, **given)
        return decode(Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT), maps, heads, [state], rule, gates=gates)

    def decode_with_kept(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, state: StudentState, kept: Kept, **given: Any
    ) -> Tensor:
        """See :meth:`StudentAttention.decode_with_kept`."""
        maps, heads, rule, gates = self._for_kernels(q_BHTD, **given)
        return decode(Tokens(q_BHTD, k_BGTD, v_BGTE), maps, heads, [state], rule, kept, gates)

    def decodes_kept(self, like: Tensor, state: StudentState) -> bool:
        """See :meth:`StudentAttention.decodes_kept`."""
        return self._on_kernels(like) and fused.decodes(state, self._rule(1.0))

    def decode_rows(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, states: Sequence[StudentState], **given: Any
    ) -> Tensor:
        """See :meth:`StudentAttention.decode_rows`."""
        if not all(self.decodes_kept(q_BHTD, state) for state in states):
            return super().decode_rows(q_BHTD, k_BGTD, v_BGTE, states=states, **given)
        maps, heads, rule, gates = self._for_kernels(q_BHTD, **given)
        return decode(Tokens(q_BHTD, k_BGTD, v_BGTE), maps, heads, states, rule, gates=gates)

    def decode_pages(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, states: StatePages, slots: Sequence[Tensor],
        seen_B: Tensor, **given: Any,
    ) -> Tensor:  # fmt: skip
        """See :meth:`StudentAttention.decode_pages`."""
        maps, heads, rule, gates = self._for_kernels(q_BHTD, **given)
        return decode_pages(Tokens(q_BHTD, k_BGTD, v_BGTE), maps, heads, rule, states, slots, seen_B, gates)

    def decodes_pages(self, like: Tensor, state: StudentState) -> bool:
        """See :meth:`StudentAttention.decodes_pages`."""
        return self.decodes_kept(like, state)

    def _on_kernels(self, like: Tensor) -> bool:
        """Whether the compiled kernels compute the far part too for queries like `like`."""
        if like.device.type != "cpu" or self.cfg.impl not in ("auto", "compiled"):
            return False
        asked = (like.dtype, self.far_enabled, self.mix_bias_H.dtype)
        if self._known_kernels is None or self._known_kernels[0] != asked:
            rule = self._rule(1.0, far=self.far_enabled)
            shape = fused.LayerShape(like.dtype, rule, self.head_dim, self.value_dim)
            found = fused.implementation("auto", like.device, self.query_map, shape, f"{self.cfg.name}'s far part")
            self._known_kernels = (asked, found == "compiled" and self.mix_bias_H.dtype == torch.float32)
        return self._known_kernels[1]

    def _for_kernels(
        self, like: Tensor, *, x_BTM: Tensor | None = None, sink_logit: Tensor | None = None, **scores: Any
    ) -> tuple[fused.FusedMaps | None, HeadWeights, Rule, Gates | None]:
        """What the kernels' calls take beside the tokens, all but x as it is."""
        rule, heads = self._rule(**scores, far=self.far_enabled), HeadWeights(self.mix_bias_H, sink_logit)
        if not self.far_enabled:
            return None, heads, rule, None
        forget, write = self.forget_gate, self.input_gate
        parameters = (self.mix_HX, forget.weight_NM, forget.bias_N, write.weight_NM, write.bias_N)
        gates = Gates(self.input_of(x_BTM, like), *parameters, CAP)
        return self._known_maps.of(self.query_map, self.keys_phi, rule), heads, rule, gates

    def _fold(self, state: GatedState, rule: Rule, half: int, index: Tensor | None) -> None:
        """The chunk in `half` of the buffer becomes far, in the rows `index`."""
        assert self.keys_phi is not None
        rows = slice(None) if index is None else index
        span = slice(half * rule.window, (half + 1) * rule.window)
        fk = self.keys_phi.rows(state.k_BGND[rows, :, span])
        position = state.seen_B[rows, None] - 2 * rule.window + torch.arange(rule.window, device=fk.device)
        fk = fk.masked_fill((position < rule.sinks)[:, None, :, None], 0.0)
        v = state.v_BGNE[rows, :, span].to(fk.dtype).repeat_interleave(self.key_heads // self.num_kv_heads, 1)
        gates = [x[rows, :, span, 0].to(fk.dtype) for x in (state.log_forget_BKN1, state.log_input_BKN1)]
        before = FarSums(state.far_s_BKFE[rows].to(fk.dtype), state.far_z_BKF[rows].to(fk.dtype))
        sums = after_chunk(before, GatedKeys(fk, v, *gates))
        state.far_s_BKFE[rows] = rounded(sums.s, state.far_s_BKFE.dtype, state.seen_B[rows])
        state.far_z_BKF[rows] = sums.z.to(state.far_z_BKF.dtype)

    def _sums(self, state: GatedState | None, keys: GatedKeys) -> FarSums:
        """The sums of a state, or empty ones."""
        if state is not None:
            return FarSums(state.far_s_BKFE.to(keys.v_BKLE.dtype), state.far_z_BKF.to(keys.v_BKLE.dtype))
        batch, maps, _, values = keys.v_BKLE.shape
        z = keys.fk_BKLF.new_zeros(batch, maps, self.features)
        return FarSums(z.new_zeros(*z.shape, values), z)

    @property
    def graph_numbers(self) -> float:
        """Weighted features, the sums after each chunk, outputs and their mix (counted in a real graph)."""
        maps, features = self.key_heads, self.features
        sums = maps * features * self.value_dim / self.cfg.window
        return 0.5 * (self.num_heads + maps) * features + sums + 11.0 * self.num_heads * self.head_dim

    def fit(
        self, tokens: Tokens, x_BTM: Tensor, rule: Rule, near_BHTE: Tensor, y_BHTE: Tensor, open_BT: Tensor
    ) -> None:
        """Choose f among `HALF_LIVES` and o, for the least squared error of each head (f: of each key map)."""
        missing, at = y_BHTE - near_BHTE, open_BT[:, None, :, None]
        best_K = missing.new_full((self.key_heads,), math.inf)
        bias_K, mix_H = self.forget_gate.bias_N.clone(), missing.new_zeros(self.num_heads)
        for half_life in HALF_LIVES:
            self.forget_gate.start(_forget_bias(half_life))
            change = (self.far(tokens, x_BTM, rule, None, None)[0] - near_BHTE) * at
            gain_H, power_H = ((change * other).sum((0, 2, 3)) for other in (missing, change))
            found_H = (gain_H / power_H.clamp_min(1e-30)).clamp(LEAST_MIX, MOST_MIX)
            error_K = (found_H * (found_H * power_H - 2.0 * gain_H)).view(self.key_heads, -1).sum(1)
            better_K = error_K < best_K
            best_K, bias_K = (
                torch.where(better_K, error_K, best_K),
                torch.where(better_K, self.forget_gate.bias_N, bias_K),
            )
            mix_H = torch.where(better_K.repeat_interleave(self.num_heads // self.key_heads), found_H, mix_H)
        self.forget_gate.start(bias_K)
        self.set_mix(mix_H)


def _forget_bias(half_life: float) -> float:
    """b with sigmoid(b) ** half_life = 1/2."""
    return -math.log(math.expm1(math.log(2.0) / half_life))


def _folded(seen_B: Tensor, first_B: Tensor, rule: Rule) -> Tensor:
    """Chunks of the aligned rows that are far for the last of `seen` tokens."""
    far_from_B = torch.minimum(rule.near_start(seen_B - 1), seen_B)
    return (far_from_B - first_B).div(rule.window, rounding_mode="floor")


def _store(after: GatedState, sums: FarSums) -> None:
    after.far_s_BKFE = rounded(sums.s.detach(), after.far_s_BKFE.dtype, after.seen_B)
    after.far_z_BKF = sums.z.detach().to(after.far_z_BKF.dtype)

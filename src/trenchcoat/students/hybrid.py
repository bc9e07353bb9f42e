"""A softmax window and sinks beside a far part that has a denominator (or a norm) of its own; a gate mixes the two.

    y_n = (1 - o_n) near_n + o_n far_n,   o_n = sigmoid(w . [q_n; k_n; v_n] + b), one number a head and token

near_n is softmax over the terrace window and the first `sinks` tokens. Where no token is outside them o_n = 0, so y is
then softmax attention exactly. Source: hybrid xLSTM (https://arxiv.org/abs/2603.15590); there [q; k; v] and the layer's
input are taken as they are, here each is divided by its length, since their sizes differ between families and layers.

Shape legend: as in :mod:`trenchcoat.students.base`, and M width of the layer's input, X = 2 D + E.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from trenchcoat.config import StudentConfig
from trenchcoat.ops import HeadWeights, Rule, StudentState, Tokens, linear_window_attention
from trenchcoat.ops.compiled.decode import decode as compiled_decode
from trenchcoat.ops.decode import decode
from trenchcoat.ops.state import known_rule
from trenchcoat.students import fused
from trenchcoat.students.base import Flops, StudentAttention

LEAST_MIX, MOST_MIX = 0.02, 0.98
"""Range of a fitted o: at its ends its gradient nearly vanishes."""

FIT_TOKENS = 4096
"""Tokens that the start is fitted to (one row at least), so that memory does not grow with the number of rows."""
FEW = 8
"""Tokens that are decoded one after the other."""

_log = logging.getLogger("trenchcoat")


class InputGate(nn.Module):
    """N numbers a token, W x / |x| + b, from the layer's input x. W starts at 0."""

    def __init__(self, hidden_size: int, number: int) -> None:
        super().__init__()
        self.weight_NM = nn.Parameter(torch.empty(number, hidden_size, dtype=torch.float32))
        self.bias_N = nn.Parameter(torch.empty(number, dtype=torch.float32))

    @torch.no_grad()
    def start(self, bias_N: Tensor | float) -> None:
        """The same numbers for every input."""
        self.weight_NM.zero_()
        self.bias_N.copy_(torch.as_tensor(bias_N).to(self.bias_N).expand_as(self.bias_N))

    def forward(self, x_BTM: Tensor) -> Tensor:
        """[B, N, T] of directions x [B, T, M]."""
        return linear(x_BTM, self.weight_NM, self.bias_N).transpose(1, 2)


class HybridAttention(StudentAttention):
    """A subclass writes `far`, `far_step`, `fit`, and `empty_state` of a class derived from `StudentState`, whose sums
    it may use."""

    kind = "terrace"
    uses_input = True

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(cfg, **sizes)
        if not 0.0 < cfg.mix_init < 1.0:
            raise ValueError(f"student.mix_init is {cfg.mix_init}; it must be strictly between 0 and 1")
        width = 2 * self.head_dim + self.value_dim
        self.mix_HX = nn.Parameter(torch.empty(self.num_heads, width, dtype=torch.float32))
        self.mix_bias_H = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self._known_near: tuple[Any, str] | None = None
        self._rule(1.0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter from the config; o = 1 - `mix_init` until it is fitted to text."""
        super().reset_parameters()
        self.mix_HX.zero_()
        self.mix_bias_H.fill_(math.log(1.0 / self.cfg.mix_init - 1.0))

    @classmethod
    def starts_from_text(cls, cfg: StudentConfig) -> bool:
        """True: the mix is fitted to the teacher's outputs."""
        return True

    # What a subclass writes

    @abstractmethod
    def far(self, tokens: Tokens, x_BTM: Tensor, rule: Rule, state: Any, after: Any) -> tuple[Tensor, Any]:
        """The far part's outputs [B, H, T, E] in the parameters' dtype with autograd, finite where there is no token.

        `x` are directions of the layer's input. If `state` is not None, `after` is the state after these tokens but for
        the far part, which is to be added to it.
        """

    @abstractmethod
    def far_step(self, token: Tokens, x_B1M: Tensor, rule: Rule, state: Any) -> Tensor:
        """The far part's output [B, H, 1, E] for one more token of each row; `state` is updated in place, but for what
        the window holds and the number of tokens."""

    @abstractmethod
    def fit(
        self, tokens: Tokens, x_BTM: Tensor, rule: Rule, near_BHTE: Tensor, y_BHTE: Tensor, open_BT: Tensor
    ) -> None:
        """Set initial values by the first text: `near` and the teacher's `y` are 0 outside `open`, the tokens that have
        something outside the window."""

    # What all have in common

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
        """See :meth:`StudentAttention.forward`."""
        tokens, rule = Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT), self._rule(**scores)
        near, after = self._near(tokens, sink_logit, rule, state)
        if not self.far_enabled:
            return near, after
        far, after = self.far(tokens, self._direction(x_BTM, q_BHTD), rule, state, after)
        open_BT = open_tokens(tokens, rule, None if state is None else state.seen_B)
        return self._mixed(tokens, near, far, open_BT), after

    @torch.no_grad()
    def decode(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        state: StudentState,
        x_BTM: Tensor | None = None,
        mask_BT: Tensor | None = None,
        sink_logit: Tensor | None = None,
        **scores: Any,
    ) -> Tensor:
        """See :meth:`StudentAttention.decode`; more than `FEW` tokens go through `forward`."""
        if q_BHTD.shape[2] > FEW:
            given = {"x_BTM": x_BTM, "mask_BT": mask_BT, "sink_logit": sink_logit, **scores}
            return super().decode(q_BHTD, k_BGTD, v_BGTE, state=state, **given)
        tokens, rule = Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT), self._rule(**scores)
        # without a far part a mix changes nothing; a parameter stays where it is, so the kernels know the next call
        heads = HeadWeights(self.mix_bias_H, sink_logit)
        outputs = []
        x = self._direction(x_BTM, q_BHTD) if self.far_enabled else None
        count = q_BHTD.shape[2]
        for t in range(count):
            one, far = tokens if count == 1 else tokens[t : t + 1], None
            first = min(state.positions())  # known on the host: usually every row is open, without looking
            surely = mask_BT is None and (first // rule.window - 1) * rule.window > rule.sinks
            open_BT = None if surely else open_tokens(one, rule, state.seen_B)
            if x is not None:
                far = self.far_step(one, x[:, t : t + 1], rule, state)
            near = self._near_step(one, heads, state, rule)
            outputs.append(near if far is None else self._mixed(one, near, far, open_BT))
        return outputs[0] if count == 1 else torch.cat(outputs, 2)

    @torch.no_grad()
    def decode_rows(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, states: Sequence[StudentState], **given: Any
    ) -> Tensor:
        """See :meth:`StudentAttention.decode_rows`. All rows are one call on copies of the states: a copy takes less
        time than a call's many small operations."""
        if len(states) == 1:
            return self.decode(q_BHTD, k_BGTD, v_BGTE, state=states[0], **given)
        each = [state.tensors() for state in states]
        whole = states[0].replaced({name: torch.cat([tensors[name] for tensors in each]) for name in each[0]})
        y = self.decode(q_BHTD, k_BGTD, v_BGTE, state=whole, **given)
        for row, state in enumerate(states):
            state.copy_(whole.replaced({name: t[row : row + 1] for name, t in whole.tensors().items()}))
        return y

    @torch.no_grad()
    def initialise(
        self, tokens: Tokens, y_BHTE: Tensor, *, scale: float, softcap: float | None = None,
        sink_logit: Tensor | None = None, **input: Tensor,
    ) -> None:  # fmt: skip
        """Landmarks, if `init` says so, then :meth:`fit` on the rows with the most tokens outside the window, of about
        `FIT_TOKENS` together. Rows without any change nothing."""
        super().initialise(tokens, y_BHTE, scale=scale)
        rule = self._rule(scale, softcap)
        count_B = open_tokens(tokens, rule, None).sum(1)
        rows = count_B.argsort(descending=True, stable=True)[: max(1, FIT_TOKENS // tokens.q_BHTD.shape[2])]
        parts = (tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE, tokens.mask_BT, y_BHTE, input.get("x_BTM"))
        q, k, v, mask, y, x = (None if part is None else part[rows.to(part.device)] for part in parts)
        assert q is not None and k is not None and v is not None and y is not None  # noqa: PT018
        tokens = Tokens(q, k, v, mask)
        open_BT = open_tokens(tokens, rule, None)
        if not bool(open_BT.any()):
            _log.warning("layer %d: the first rows end within the window; the mix is not fitted", self.layer_idx)
            return
        near, _ = self._near(tokens, sink_logit, rule, None)
        wide, at = self.mix_bias_H.dtype, open_BT[:, None, :, None]
        self.fit(tokens, self._direction(x, q), rule, near.to(wide) * at, y.to(wide) * at, open_BT)

    @torch.no_grad()
    def set_mix(self, mix_H: Tensor) -> None:
        """The same o at every token."""
        self.mix_HX.zero_()
        self.mix_bias_H.copy_(torch.logit(mix_H.clamp(LEAST_MIX, MOST_MIX)))

    def implementation(self, dtype: torch.dtype, device: torch.device) -> str:
        """The implementation that runs for inputs of `dtype` on `device`; ValueError if the configured one cannot."""
        if self.cfg.impl in ("reference", "fla"):
            raise ValueError(
                f"student.impl is {self.cfg.impl}, but the far part of {self.cfg.name!r} runs in chunks in PyTorch; "
                "use student.impl=chunkwise, or auto, triton or compiled for a window on kernels"
            )
        self._near_impl(dtype, device)
        return "chunkwise"

    def _near_impl(self, dtype: torch.dtype, device: torch.device) -> str:
        """The implementation of the window, by `student.impl` (`fla`: that of `auto`)."""
        asked = (dtype, device, self.cfg.impl)
        if self._known_near is None or self._known_near[0] != asked:
            shape = fused.LayerShape(dtype, self._rule(1.0), self.head_dim, self.value_dim)
            impl = "auto" if self.cfg.impl == "fla" else self.cfg.impl
            self._known_near = (asked, fused.implementation(impl, device, None, shape))
        return self._known_near[1]

    def flops(self, seq_len: int) -> Flops:
        """As :meth:`StudentAttention.flops`, with the gates among the maps."""
        own = super().flops(seq_len)
        gates = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2)
        return Flops(maps=own.maps + 2.0 * gates, near=own.near, write=own.write, read=own.read)

    def _near(
        self, tokens: Tokens, sink_logit: Tensor | None, rule: Rule, state: StudentState | None
    ) -> tuple[Tensor, Any]:
        """The window's outputs and the state after them."""
        like = tokens.q_BHTD
        heads, impl = self._weights(like, sink_logit), self._near_impl(like.dtype, like.device)
        if impl == "triton":
            from trenchcoat.ops.triton.attention import attend

            return attend(tokens, None, heads, rule, state=state)
        return linear_window_attention(tokens, None, heads, rule, state=state, impl=impl)

    def _near_step(self, token: Tokens, heads: HeadWeights, state: StudentState, rule: Rule) -> Tensor:
        """The window's output for one more token of each row, which `state` then holds."""
        like = token.q_BHTD
        if self._near_impl(like.dtype, like.device) == "compiled" and fused.decodes(state, rule):
            return compiled_decode(token, None, heads, [state], rule)
        return decode(token, None, heads, state, rule)

    def _mixed(self, tokens: Tokens, near: Tensor, far: Tensor, open_BT: Tensor | None) -> Tensor:
        mix_BHT = self.mix(tokens, open_BT, far.dtype)
        return torch.lerp(near.to(far.dtype), far, mix_BHT[..., None]).to(near.dtype)

    def mix(self, tokens: Tokens, open_BT: Tensor | None, wide: torch.dtype) -> Tensor:
        """o [B, H, T]; 0 where not `open` (None: all are)."""
        logit_BHT = self.mix_bias_H[:, None]
        parts = (tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE)
        for x, weight_HD in zip(parts, self.mix_HX.split([x.shape[-1] for x in parts], 1), strict=True):
            of_heads = weight_HD.unflatten(0, (x.shape[1], -1))  # [G, query heads of a group, D]
            found = normalize(x.to(wide), dim=-1) @ of_heads.mT
            logit_BHT = logit_BHT + found.transpose(2, 3).flatten(1, 2)
        return logit_BHT.sigmoid() if open_BT is None else logit_BHT.sigmoid() * open_BT[:, None]

    def to_heads(self, x_BGTD: Tensor) -> Tensor:
        """Repeat key/value heads (or key maps) for the query heads that share them."""
        share = self.num_heads // x_BGTD.shape[1]
        return x_BGTD if share == 1 else x_BGTD.repeat_interleave(share, 1)

    def input_of(self, x_BTM: Tensor | None, like: Tensor) -> Tensor:
        """The layer's input, where q (`like`) is; ValueError if there is none."""
        if x_BTM is None:
            raise ValueError(f"student {self.cfg.name!r} reads the layer's input: call it with x_BTM [B, T, M]")
        return x_BTM if x_BTM.device == like.device else x_BTM.to(like.device)

    def _direction(self, x_BTM: Tensor | None, like: Tensor) -> Tensor:
        return normalize(self.input_of(x_BTM, like).to(self.mix_bias_H.dtype), dim=-1)

    def _weights(self, like: Tensor, sink_logit: Tensor | None) -> HeadWeights:
        return HeadWeights(torch.zeros(self.num_heads, dtype=torch.float32, device=like.device), sink_logit)

    def _rule(self, scale: float, softcap: float | None = None, far: bool = False) -> Rule:
        """By default that of the near part alone."""
        cfg = self.cfg
        return known_rule(kind=self.kind, window=cfg.window, scale=scale, softcap=softcap, sinks=cfg.sinks, far=far)


def open_tokens(tokens: Tokens, rule: Rule, seen_B: Tensor | None) -> Tensor:
    """Whether a token has keys outside the window and the sinks, bool [B, T]; False where there is no token."""
    like = tokens.k_BGTD[:, 0, :, 0]
    real = torch.ones_like(like, dtype=torch.bool) if tokens.mask_BT is None else tokens.mask_BT.bool()
    position = real.long().cumsum(1) - 1
    if seen_B is not None:
        position = position + seen_B[:, None]
    return real & (rule.near_start(position) > rule.sinks)

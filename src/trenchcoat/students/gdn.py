"""The gated delta rule beside a window: a memory that forgets, and that corrects what it holds under a key.

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   log a_t = -exp(A) softplus(w_a . x_t + c_a),
    b_t = sigmoid(w_b . x_t + c_b)

q and k have length 1. The read is normed and gated as in :mod:`trenchcoat.students.recurrent`, without a convolution.
Sources: Gated DeltaNet (https://arxiv.org/abs/2412.06464); the start, Taylor-Calibrate, with two changes: the mean
look-back of a head is that of its attention to keys outside the window, which are what the memory is for, and its
half-life is at most 6,931 tokens, not 693. In :mod:`trenchcoat.ops.recurrences`, `gated_delta` is the definition; it
is computed by Transformers' function, or by flash-linear-attention's kernels.

**At the start**, on the first rows of text: half-life of a = mean look-back; b from 0.3 (the head with the most uniform
attention) to 0.7 (the most peaked); then o and the size of the read by least squares.

Shape legend: as in :mod:`trenchcoat.students.hybrid`; J keys, N queries of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from trenchcoat.config import StudentConfig
from trenchcoat.ops import Rule, Tokens, delta_rule, fla_kernels
from trenchcoat.students.base import Flops
from trenchcoat.students.hybrid import InputGate
from trenchcoat.students.recurrent import RecurrentAttention

LEAST_RATE, MOST_RATE = 1e-4, 5.0
"""Range of an initial -log a."""
LEAST_WRITE, MORE_WRITE = 0.3, 0.4
"""Initial b of the most uniform head, and what the most peaked one has more."""
FIRST_RATE = math.log(2.0) / 1024
"""-log a before any text."""
BLOCK_SCORES = 1 << 24
"""Scores that are held at once."""

DeltaRule = Callable[..., tuple[Tensor, Tensor]]


class GatedDeltaAttention(RecurrentAttention):
    """Softmax over the terrace window and the sinks, and a memory under the gated delta rule.

    A subclass may have a rule of its own, with `new_forget_gate` and `log_forget`.
    """

    rules: ClassVar[tuple[DeltaRule, DeltaRule]] = (delta_rule.gated_delta, fla_kernels.gated_delta)
    """The rule in PyTorch and on the kernels of flash-linear-attention."""

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(cfg, **sizes)
        assert self.hidden_size is not None
        self.forget_gate = self.new_forget_gate(self.hidden_size)
        self.write_gate = InputGate(self.hidden_size, self.num_heads)
        self.log_rate_H = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.reset_parameters()

    def new_forget_gate(self, hidden_size: int) -> Any:
        """A module of the directions x [B, T, M], with `start` for the same numbers [H] (or number) at every token."""
        return InputGate(hidden_size, self.num_heads)

    def log_forget(self, x_BTM: Tensor) -> Tensor:
        """log a [B, H, T]; [B, H, T, D] if there is one a key channel."""
        return -self.log_rate_H.exp()[:, None] * softplus(self.forget_gate(x_BTM))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter from the config."""
        super().reset_parameters()
        self.forget_gate.start(math.log(math.expm1(FIRST_RATE)))
        self.write_gate.start(0.0)
        self.log_rate_H.zero_()

    def recur(
        self, tokens: Tokens, x_BTM: Tensor, memory_BHDE: Tensor, half: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`RecurrentAttention.recur`."""
        q, k, v = normalize(tokens.q_BHTD, dim=-1), normalize(tokens.k_BGTD, dim=-1), tokens.v_BGTE
        forget, write_BHT = self.log_forget(x_BTM), self.write_gate(x_BTM).sigmoid()
        if tokens.mask_BT is not None:
            real_B1T = tokens.mask_BT[:, None]
            forget, write_BHT = forget * (real_B1T if forget.ndim == 3 else real_B1T[..., None]), write_BHT * real_B1T
        in_pytorch, on_kernels = self.rules
        if half is None:
            return in_pytorch(q, k, v, forget, write_BHT, memory_BHDE)
        return on_kernels(q.to(half), k.to(half), v.to(half), forget, write_BHT, memory_BHDE)

    @torch.no_grad()
    def fit(self, tokens: Tokens, x_BTM: Tensor, rule: Rule, near_BHTE: Tensor, y_BHTE: Tensor, at_BT: Tensor) -> None:
        """The gates by the teacher's attention, then o and the size of the read."""
        distance_H, entropy_H = look_back(tokens, rule, at_BT)
        rate_H = (math.log(2.0) / distance_H.clamp_min(0.5)).clamp(LEAST_RATE, MOST_RATE)
        self.forget_gate.start(rate_H.expm1().log())
        least, most = entropy_H.aminmax()
        peaked_H = 1.0 - (entropy_H - least) / (most - least).clamp_min(1e-12)
        self.write_gate.start(torch.logit(LEAST_WRITE + MORE_WRITE * peaked_H))
        super().fit(tokens, x_BTM, rule, near_BHTE, y_BHTE, at_BT)

    @property
    def graph_numbers(self) -> float:
        """With the triangular systems of 64 x 64 a chunk."""
        return super().graph_numbers + 4.0 * self.num_heads * (self.head_dim + 64)

    def flops(self, seq_len: int) -> Flops:
        """As :meth:`RecurrentAttention.flops`; to correct the memory, the key reads it first."""
        own = super().flops(seq_len)
        return Flops(maps=own.maps, near=own.near, write=2.0 * own.write, read=own.read)


@torch.no_grad()
def look_back(tokens: Tokens, rule: Rule, at_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(mean distance in tokens of softmax attention to keys that are far under `rule`, mean entropy in nats), float32
    [H], over the queries where `at` is True; learned sinks are left out.

    O(T^2) operations; at most `BLOCK_SCORES` scores are held at once.
    """
    heads, share = tokens.q_BHTD.shape[1], tokens.q_BHTD.shape[1] // tokens.k_BGTD.shape[1]
    moment, weight, entropy = (torch.zeros(heads, device=tokens.q_BHTD.device) for _ in range(3))
    for b in range(len(at_BT)):
        real = slice(None) if tokens.mask_BT is None else tokens.mask_BT[b].bool()
        q, k = tokens.q_BHTD[b, :, real].float(), tokens.k_BGTD[b, :, real].float().repeat_interleave(share, 0)
        queries, key = at_BT[b, real].nonzero()[:, 0], torch.arange(k.shape[1], device=k.device)
        for query in queries.split(max(1, BLOCK_SCORES // max(1, heads * len(key)))):
            scores_HNJ = rule.scale * q[:, query] @ k.mT
            if rule.softcap is not None:
                scores_HNJ = rule.softcap * torch.tanh(scores_HNJ / rule.softcap)
            log_HNJ = scores_HNJ.masked_fill(key > query[:, None], float("-inf")).log_softmax(-1)
            map_HNJ = log_HNJ.exp()
            far_HNJ = map_HNJ * rule.is_far(query[:, None], key)
            moment += (far_HNJ * (query[:, None] - key)).sum((1, 2))
            weight += far_HNJ.sum((1, 2))
            entropy -= (map_HNJ * log_HNJ.clamp_min(-1e4)).sum((1, 2))
    return moment / weight.clamp_min(1e-30), entropy / at_BT.sum().clamp_min(1)

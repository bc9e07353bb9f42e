"""Kimi delta attention beside a window: the gated delta rule with a rate of forgetting for every key channel.

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T,   log a_t = -exp(A) softplus(C B x_t + c), [D] a head

All else is that of :mod:`trenchcoat.students.gdn`, the start as well: every channel of a head begins with the head's
half-life. B [R, M] and C [H D, R] have rank R = D, as the output gate; C is 0 at first. In
:mod:`trenchcoat.ops.recurrences`, `kimi_delta` is the definition; it is computed by Transformers' function, or by
flash-linear-attention's kernels.

Source: Kimi Linear (https://arxiv.org/abs/2510.26692, section 3), without its convolution.

Shape legend: as in :mod:`trenchcoat.students.gdn`, and R rank of the forget gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from trenchcoat.ops import delta_rule, fla_kernels
from trenchcoat.students.gdn import GatedDeltaAttention


class ChannelGate(nn.Module):
    """D numbers a token and head, C B x / |x| + c, from the layer's input x. C starts at 0."""

    def __init__(self, hidden_size: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.down_RM = nn.Parameter(torch.empty(dim, hidden_size, dtype=torch.float32))
        self.up_XR = nn.Parameter(torch.empty(heads * dim, dim, dtype=torch.float32))
        self.bias_X = nn.Parameter(torch.empty(heads * dim, dtype=torch.float32))

    @torch.no_grad()
    def start(self, bias_H: Tensor | float) -> None:
        """The same number for every input and channel of a head."""
        self.up_XR.zero_()
        self.bias_X.copy_(torch.as_tensor(bias_H).to(self.bias_X).expand(self.heads).repeat_interleave(self.dim))

    def forward(self, x_BTM: Tensor) -> Tensor:
        """[B, H, T, D] of directions x [B, T, M]."""
        found_BTX = linear(linear(x_BTM, self.down_RM), self.up_XR, self.bias_X)
        return found_BTX.unflatten(2, (self.heads, self.dim)).transpose(1, 2)


class KimiDeltaAttention(GatedDeltaAttention):
    """Softmax over the terrace window and the sinks, and a memory that forgets by channel."""

    rules = (delta_rule.kimi_delta, fla_kernels.kimi_delta)

    def new_forget_gate(self, hidden_size: int) -> ChannelGate:
        """See :meth:`GatedDeltaAttention.new_forget_gate`."""
        return ChannelGate(hidden_size, self.num_heads, self.head_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter from the config."""
        super().reset_parameters()
        self.forget_gate.down_RM.normal_()  # x has length 1

    def log_forget(self, x_BTM: Tensor) -> Tensor:
        """log a [B, H, T, D]."""
        return -self.log_rate_H.exp()[:, None, None] * softplus(self.forget_gate(x_BTM))

    @property
    def graph_numbers(self) -> float:
        """With what a chunk's pairs of tokens have for each channel (counted in a real graph)."""
        return 62.0 * self.num_heads * self.head_dim

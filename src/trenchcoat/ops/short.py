"""Rows that fit in the window: every key is near, so terrace attention is causal softmax attention exactly.

Shape legend: as in :mod:`trenchcoat.ops.operator`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from trenchcoat.ops.state import HeadWeights, Rule, StudentState


def is_softmax(tokens: int, rule: Rule, heads: HeadWeights, state: StudentState | None) -> bool:
    """Whether rows of `tokens` tokens (padding removed) after `state` are causal softmax attention, g and l cancelling:
    two chunks of a terrace from the start of a row, without soft-cap and sink logit."""
    if rule.kind != "terrace" or tokens > 2 * rule.window:
        return False
    if rule.softcap is not None or heads.sink_logit_H is not None:
        return False
    return state is None or not any(state.positions())


def softmax_attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, rule: Rule, unused: tuple[Tensor | None, ...] = ()
) -> Tensor:
    """y [B, H, T, E] in q's dtype, computed in float32 or wider by PyTorch's attention.

    `unused` are inputs that cancel: they get gradients of exactly 0.
    """
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BHTD, k_BGTD, v_BGTE))
    shared = q.shape[1] != k.shape[1]
    y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale, enable_gqa=shared).to(q_BHTD.dtype)
    learned = [t for t in unused if t is not None and t.requires_grad]
    if not learned or not torch.is_grad_enabled():
        return y
    with_zeros: Tensor = _ZeroGradients.apply(y, *learned)
    return with_zeros


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *unused: Tensor) -> Tensor:
        """y, as if it were a function of `unused` too."""
        ctx.like = [(t.shape, t.dtype, t.device) for t in unused]
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        """dy, and zeros."""
        return dy, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)

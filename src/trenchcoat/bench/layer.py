"""One layer's attention on random tensors: its passes as functions to time, and those of softmax attention.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.students import StudentAttention, TransferRequest, build_student


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer's attention and its student."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    columns: int = 64
    window: int = 64


class Layer:
    """A student on an implementation, and random q, k, v."""

    def __init__(
        self, sizes: LayerSizes, impl: str, tokens: int, device: str, rows: int = 1, *, kind: str = "terrace",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        cfg = StudentConfig(
            name=kind,
            window=sizes.window,
            feature_map=FeatureMapConfig(feature_dim=sizes.columns),
            impl=impl,  # type: ignore[arg-type]
        )
        heads = {"num_heads": sizes.heads, "num_kv_heads": sizes.kv_heads, "head_dim": sizes.dim}
        self.student: StudentAttention = build_student(cfg, **heads).to(device)
        self.student.request = TransferRequest(backward=True)
        self.scale = sizes.dim**-0.5

        def random(count: int) -> Tensor:
            """Vectors of `count` heads."""
            x = torch.randn(rows, count, tokens, sizes.dim, device=device, dtype=dtype)
            return x.requires_grad_()

        self.q, self.k, self.v = (random(n) for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads))
        self.dy = torch.randn_like(self.q)

    @torch.no_grad()
    def forward(self) -> None:
        """Outputs."""
        self.student(self.q, self.k, self.v, scale=self.scale)

    def training(self) -> None:
        """Outputs and every gradient."""
        leaves = [self.q, self.k, self.v, *self.student.parameters()]
        torch.autograd.grad(self.student(self.q, self.k, self.v, scale=self.scale)[0], leaves, self.dy)

    @torch.no_grad()
    def transfer(self, y_BHTD: Tensor | None = None) -> None:
        """Loss and gradients of maps and mix against the teacher's outputs (random ones by default)."""
        self.student.transfer(self.q, self.k, self.v, self.dy if y_BHTD is None else y_BHTD, scale=self.scale)

    @torch.no_grad()
    def cross_entropy(self) -> None:
        """The same with the cross-entropy of attention rows as the whole loss."""
        before, self.student.request = self.student.request, TransferRequest(mse_weight=0.0, xent_weight=1.0)
        self.transfer()
        self.student.request = before

    def decoding(self) -> Callable[[], object]:
        """A decode step with the first token of every row, from a state after ten windows."""
        state = self.student.empty_state(len(self.q), dtype=self.q.dtype, device=self.q.device)
        state.seen_B += 10 * self.student.cfg.window + 1
        x = [t.detach()[:, :, :1] for t in (self.q, self.k, self.v)]
        return partial(self.student.decode, *x, state=state, scale=self.scale)

    def softmax(self) -> Tensor:
        """Outputs [B, H, T, D] of PyTorch's causal attention."""
        return scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True)

    @torch.no_grad()
    def softmax_forward(self) -> None:
        """The same without gradients."""
        self.softmax()

    def softmax_training(self) -> None:
        """The same with its backward."""
        torch.autograd.grad(self.softmax(), [self.q, self.k, self.v], self.dy)

"""Feature maps phi(x) = act(x W + b), one W per head, with their hand-written backward.

Sources: LoLCATs (https://arxiv.org/abs/2410.10254), Hedgehog (https://arxiv.org/abs/2402.04347), T2R
(https://arxiv.org/abs/2103.13076), elu (https://arxiv.org/abs/2006.16236).

Shape legend: B rows, M map heads, X heads of the input (M, or a divisor of it: each input head feeds M / X maps), T
tokens, D head dim, P columns of W (`feature_dim`), F features (2P for hedgehog and exp, P otherwise), R adapter width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trenchcoat.config import FeatureMapConfig


@dataclass(frozen=True)
class Activation:
    """act: [..., P] -> [..., factor * P] before clamping; `backward(f, df)` gives du from the output f alone.

    `paired` applies `single` to u and to -u and concatenates the two.
    """

    single: Callable[[Tensor], Tensor]
    single_backward: Callable[[Tensor, Tensor], Tensor]
    paired: bool

    @property
    def factor(self) -> int:
        """Features per column of W."""
        return 2 if self.paired else 1


def _softmax_backward(f: Tensor, df: Tensor) -> Tensor:
    return torch._softmax_backward_data(df, f, -1, f.dtype)


def _exp(u: Tensor) -> Tensor:
    return torch.exp(u - u.amax(-1, keepdim=True))


def _exp_backward(f: Tensor, df: Tensor) -> Tensor:
    du = f * df
    top = (f == 1).to(f.dtype)
    return du - top * (du.sum(-1, keepdim=True) / top.sum(-1, keepdim=True))


def _softmax(u: Tensor) -> Tensor:
    return torch.softmax(u, -1)


def _elu_plus_one(u: Tensor) -> Tensor:
    return nn.functional.elu(u) + 1


def _relu_backward(f: Tensor, df: Tensor) -> Tensor:
    return df


def _elu_backward(f: Tensor, df: Tensor) -> Tensor:
    return df * f.clamp_max(1.0)


ACTIVATIONS: dict[str, Activation] = {
    "hedgehog": Activation(_softmax, _softmax_backward, paired=True),
    "hedgehog_half": Activation(_softmax, _softmax_backward, paired=False),
    "t2r": Activation(torch.relu, _relu_backward, paired=False),
    "exp": Activation(_exp, _exp_backward, paired=True),
    "exp_half": Activation(_exp, _exp_backward, paired=False),
    "elu": Activation(_elu_plus_one, _elu_backward, paired=False),
}
"""Name in :class:`trenchcoat.config.FeatureMapConfig` -> activation."""


class FeatureMap(nn.Module):
    """phi for M heads; parameters are float32, input of any dtype, output float32 (float64 for float64 parameters)."""

    def __init__(self, cfg: FeatureMapConfig, *, num_heads: int, head_dim: int) -> None:
        super().__init__()
        if cfg.name not in ACTIVATIONS:
            raise ValueError(f"feature map is {cfg.name!r}; known: {', '.join(ACTIVATIONS)}")
        if cfg.feature_dim < 1:
            raise ValueError(f"feature_dim is {cfg.feature_dim}; it must be at least 1")
        if cfg.skip and cfg.feature_dim != head_dim:
            raise ValueError(f"skip needs feature_dim equal to the head dimension {head_dim}, not {cfg.feature_dim}")
        if cfg.init not in ("identity", "kaiming", "normal"):
            raise ValueError(f"feature map init is {cfg.init!r}; known: identity, kaiming, normal")
        self.cfg, self.num_heads, self.head_dim = cfg, num_heads, head_dim
        self.act = ACTIVATIONS[cfg.name]
        has_bias = cfg.name == "t2r" if cfg.bias is None else cfg.bias
        width = cfg.adapter_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_heads, *shape, dtype=torch.float32))

        self.weight = parameter(head_dim, cfg.feature_dim)
        self.bias = parameter(cfg.feature_dim) if has_bias else None
        self.down = parameter(head_dim, width) if width is not None else None
        self.up = parameter(width, head_dim) if width is not None else None
        self.reset_parameters()

    @property
    def features(self) -> int:
        """F, the width of the output."""
        return self.cfg.feature_dim * self.act.factor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values from the config; the adapter starts as the identity (up = 0)."""
        if self.cfg.init == "kaiming":
            bound = math.sqrt(6.0 / self.head_dim)
            self.weight.uniform_(-bound, bound)
        elif self.cfg.init == "normal":
            self.weight.normal_(0.0, 0.02)
        else:
            self.weight.zero_()
            if not self.cfg.skip:
                self.weight.diagonal(dim1=1, dim2=2).fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()
        if self.down is not None and self.up is not None:
            bound = math.sqrt(6.0 / self.head_dim)
            self.down.uniform_(-bound, bound)
            self.up.zero_()

    def forward(self, x_BXTD: Tensor) -> Tensor:
        """Features [B, M, T, F] of x [B, X, T, D]; M must be a multiple of X."""
        batch, inputs, tokens, _ = x_BXTD.shape
        x = x_BXTD.to(self.weight.dtype)[:, :, None]
        if self.down is not None and self.up is not None:
            x = x + torch.relu(x @ self._grouped(self.down, inputs)) @ self._grouped(self.up, inputs)
        u = x @ self._grouped(self.weight, inputs)
        if self.bias is not None:
            u = u + self._grouped(self.bias[:, None], inputs)
        if self.cfg.skip:
            u = u + x
        u = u.reshape(batch, self.num_heads, tokens, self.cfg.feature_dim)
        f = torch.cat([self.act.single(u), self.act.single(-u)], -1) if self.act.paired else self.act.single(u)
        return f.clamp_min(self.cfg.eps)

    def _grouped(self, weight: Tensor, inputs: int) -> Tensor:
        """[M, ...] -> [X, M / X, ...]."""
        return weight.view(inputs, self.num_heads // inputs, *weight.shape[1:])

    def extra_repr(self) -> str:
        """One line for printing the module."""
        return f"{self.cfg.name}, heads={self.num_heads}, {self.head_dim} -> {self.features}"

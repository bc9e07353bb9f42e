"""Feature maps phi(x) = act(x W + b), one W per head, with a hand-written backward that needs only x and phi(x).

Sources: LoLCATs (https://arxiv.org/abs/2410.10254), Hedgehog (https://arxiv.org/abs/2402.04347), T2R
(https://arxiv.org/abs/2103.13076), elu (https://arxiv.org/abs/2006.16236).

Shape legend: B rows, M map heads, X heads of the input (M, or a divisor of it: each input head feeds M / X maps), T
tokens, D head dim, P columns of W (`feature_dim`), F features (2P for hedgehog and exp, P otherwise), R adapter width;
inside a block, A heads and N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trenchcoat.config import KNOWN_FEATURE_MAPS, FeatureMapConfig
from trenchcoat.ops.chunked.maps import Learner

BLOCK_ROWS = 4096
"""Heads x tokens per block, so that a block's arrays fit in cache."""


@dataclass(frozen=True)
class Activation:
    """`forward(u, out)` fills out with act(u); `backward(f, df)` is du, from the output f alone. Last axis: features.

    f is what `forward` gave, raised to at least `FeatureMapConfig.eps`; `backward` may overwrite df. `reaches_zero`
    says that act(u) can be below eps: features that were raised to it then have no gradient.

    `paired` applies it to u and to -u and concatenates the two. `kernel` is its name in the Triton kernels
    (:class:`trenchcoat.ops.state.FusedMap`); None if they do not support it.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    paired: bool
    kernel: str | None = None
    reaches_zero: bool = False


def _softmax(u: Tensor, out: Tensor) -> Tensor:
    return torch.softmax(u, -1, out=out)


def _softmax_backward(f: Tensor, df: Tensor) -> Tensor:
    return torch._softmax_backward_data(df, f, -1, f.dtype)


def _exp(u: Tensor, out: Tensor) -> Tensor:
    return torch.sub(u, u.amax(-1, keepdim=True), out=out).exp_()


def _exp_backward(f: Tensor, df: Tensor) -> Tensor:
    du = f * df
    top = (f == 1).to(f.dtype)
    return du.addcmul_(top, du.sum(-1, keepdim=True) / top.sum(-1, keepdim=True).clamp_min_(1.0), value=-1.0)


def _relu(u: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(u, 0.0, out=out)


def _relu_backward(f: Tensor, df: Tensor) -> Tensor:
    return df


def _elu(u: Tensor, out: Tensor) -> Tensor:
    return torch.add(nn.functional.elu(u), 1.0, out=out)


def _elu_backward(f: Tensor, df: Tensor) -> Tensor:
    return df * f.clamp_max(1.0)


ACTIVATIONS: dict[str, Activation] = {
    "hedgehog": Activation(_softmax, _softmax_backward, paired=True, kernel="softmax"),
    "hedgehog_half": Activation(_softmax, _softmax_backward, paired=False, kernel="softmax"),
    "t2r": Activation(_relu, _relu_backward, paired=False, kernel="relu", reaches_zero=True),
    "exp": Activation(_exp, _exp_backward, paired=True, kernel="exp"),
    "exp_half": Activation(_exp, _exp_backward, paired=False, kernel="exp"),
    "elu": Activation(_elu, _elu_backward, paired=False, kernel="elu"),
}
"""Name in :class:`trenchcoat.config.FeatureMapConfig` -> activation; the same names as `config.KNOWN_FEATURE_MAPS`."""


def register_feature_map(name: str, activation: Activation) -> None:
    """Make `activation` available as `student.feature_map.name: <name>`; ValueError if the name is taken."""
    if ACTIVATIONS.get(name, activation) is not activation:
        raise ValueError(f"feature map {name!r} exists already; choose another name")
    ACTIVATIONS[name] = activation
    if name not in KNOWN_FEATURE_MAPS:
        KNOWN_FEATURE_MAPS.append(name)


@dataclass
class Weights:
    """A block's parameters, or their gradients: weight [A, D, P], bias [A, P], down [A, D, R], up [A, R, D]."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None


class FeatureMap(nn.Module):
    """phi for M heads. Parameters are float32; features have the parameters' dtype, whatever the input's."""

    def __init__(self, cfg: FeatureMapConfig, *, num_heads: int, head_dim: int) -> None:
        super().__init__()
        if cfg.name not in ACTIVATIONS:
            raise ValueError(f"feature map is {cfg.name!r}; known: {', '.join(ACTIVATIONS)}")
        if cfg.feature_dim < 1:
            raise ValueError(f"feature_dim is {cfg.feature_dim}; it must be at least 1")
        if cfg.skip and cfg.feature_dim != head_dim:
            raise ValueError(f"skip needs feature_dim equal to the head dimension {head_dim}, not {cfg.feature_dim}")
        if cfg.init not in ("identity", "kaiming", "normal", "landmarks"):
            raise ValueError(f"feature map init is {cfg.init!r}; known: identity, kaiming, normal, landmarks")
        if cfg.adapter_dim is not None and cfg.adapter_dim < 1:
            raise ValueError(f"adapter_dim is {cfg.adapter_dim}; it must be at least 1, or null for no adapter")
        self.cfg, self.num_heads, self.head_dim = cfg, num_heads, head_dim
        self.act = ACTIVATIONS[cfg.name]
        has_bias = cfg.name == "t2r" if cfg.bias is None else cfg.bias
        width = cfg.adapter_dim

        def parameter(*shape: int) -> nn.Parameter:
            """A parameter with one entry per head."""
            return nn.Parameter(torch.empty(num_heads, *shape, dtype=torch.float32))

        self.weight = parameter(head_dim, cfg.feature_dim)
        self.bias = parameter(cfg.feature_dim) if has_bias else None
        self.down = parameter(head_dim, width) if width is not None else None
        self.up = parameter(width, head_dim) if width is not None else None
        self.reset_parameters()

    @property
    def features(self) -> int:
        """F, the width of the output."""
        return self.cfg.feature_dim * (2 if self.act.paired else 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set initial values from the config; the adapter starts as the identity (up = 0).

        `landmarks` starts like kaiming, until `set_landmarks` gets keys of real text.
        """
        bound = math.sqrt(6.0 / self.head_dim)
        if self.cfg.init in ("kaiming", "landmarks"):
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
            self.down.uniform_(-bound, bound)
            self.up.zero_()

    @torch.no_grad()
    def set_landmarks(self, keys_GND: Tensor, scale: float) -> None:
        """W = scale * (c_1 - c, ..., c_P - c) of P keys c_f, evenly spaced among N [G, N, D], with mean c of all.

        Then softmax(x W) are the attention weights of x over P landmark keys, so phi(q) . phi(k) is large where q would
        attend to the landmarks that k resembles (the idea of Nystrom's method, https://arxiv.org/abs/2102.03902).
        """
        groups, available, _ = keys_GND.shape
        if available < self.cfg.feature_dim:
            raise ValueError(
                f"landmarks need at least feature_dim = {self.cfg.feature_dim} keys; the first rows have {available}. "
                "Use longer or more rows, a smaller feature_dim, or another init"
            )
        for head in range(self.num_heads):
            keys_ND = keys_GND[head * groups // self.num_heads].float()
            # a different offset for each head, so that heads of a group start from different keys
            chosen = (torch.arange(self.cfg.feature_dim) * available + head) // self.cfg.feature_dim
            landmarks_PD = keys_ND[chosen.clamp_max(available - 1)] - keys_ND.mean(0)
            self.weight[head].copy_(landmarks_PD.T * scale)

    def forward(self, x_BXTD: Tensor) -> Tensor:
        """Features [B, M, T, F] of x [B, X, T, D]; M must be a multiple of X."""
        y: Tensor = _Phi.apply(self, x_BXTD, self.weight, self.bias, self.down, self.up)
        return y

    def rows(self, x_BXTD: Tensor) -> Tensor:
        """Like `forward`, under `no_grad` and with all rows in one block: faster for few tokens."""
        batch, inputs, tokens, _ = x_BXTD.shape
        w = Weights(*self.parameter_list())
        x = x_BXTD if x_BXTD.dtype == w.weight.dtype else x_BXTD.to(w.weight.dtype)
        x = x.transpose(0, 1).reshape(inputs, batch * tokens, -1)
        if inputs != self.num_heads:
            x = x.repeat_interleave(self.num_heads // inputs, dim=0)
        f = self.block(x, w, x.new_empty(self.num_heads, batch * tokens, self.features))
        return f.view(self.num_heads, batch, tokens, -1).transpose(0, 1)

    def block(self, x_AND: Tensor, w: Weights, out_ANF: Tensor) -> Tensor:
        """Fill `out` with the features of x, without autograd. `out` must be contiguous per head."""
        u = self._linear(x_AND, w)
        if self.act.paired:
            halves = torch.stack((u, -u), -2)
            self.act.forward(halves, out_ANF.view(halves.shape))
        else:
            self.act.forward(u, out_ANF)
        return out_ANF.clamp_(min=self.cfg.eps)

    def block_backward(
        self, x_AND: Tensor, w: Weights, f_ANF: Tensor, df_ANF: Tensor, grads: Weights | None, need_dx: bool
    ) -> Tensor | None:
        """Add the parameters' gradients to `grads`; returns dx [A, N, D] if requested. May overwrite df."""
        if self.act.reaches_zero:
            df_ANF = df_ANF.mul_(f_ANF > self.cfg.eps)
        shape = (*f_ANF.shape[:-1], 2, -1) if self.act.paired else f_ANF.shape
        du = self.act.backward(f_ANF.view(shape), df_ANF.view(shape))
        if self.act.paired:
            du = du[..., 0, :] - du[..., 1, :]
        hidden, x = self._adapted(x_AND, w)
        if grads is not None:
            grads.weight.baddbmm_(x.mT, du)
            if grads.bias is not None:
                grads.bias.add_(du.sum(1))
        if not need_dx and w.up is None:
            return None
        dx = du @ self._matrix(w).mT
        if hidden is None or w.up is None or w.down is None:
            return dx
        dhidden = (dx @ w.up.mT).mul_(hidden > 0)
        if grads is not None and grads.up is not None and grads.down is not None:
            grads.up.baddbmm_(hidden.mT, dx)
            grads.down.baddbmm_(x_AND.mT, dhidden)
        return dx.baddbmm_(dhidden, w.down.mT)

    def weights(self) -> Weights:
        """The parameters as plain tensors."""
        return Weights(*(None if p is None else p.detach() for p in self.parameter_list()))  # type: ignore[arg-type]

    def pick(self, w: Weights, inputs: int, heads: slice, share: int) -> Weights:
        """Views of the parameters (or gradients) of map `share` of each input head in `heads`, out of `inputs`
        heads."""
        parts = (w.weight, w.bias, w.down, w.up)
        return Weights(*(None if p is None else p.unflatten(0, (inputs, -1))[heads, share] for p in parts))  # type: ignore[arg-type]

    def gradients(self) -> Weights:
        """The parameters' `.grad`, created as zeros if missing."""
        for p in self.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return Weights(*(None if p is None else p.grad for p in self.parameter_list()))  # type: ignore[arg-type]

    def learner(self, learns: bool) -> Learner[Weights]:
        """The map with its parameters and, if it learns, the tensors their gradients are added to."""
        return Learner(self, self.weights(), self.gradients() if learns else None)

    def parameter_list(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """weight, bias, down, up."""
        return self.weight, self.bias, self.down, self.up

    def matrix(self) -> Tensor:
        """The matrix [M, D, P] that multiplies x, including the skip connection; differentiable."""
        return self._matrix(Weights(self.weight))

    def _matrix(self, w: Weights) -> Tensor:
        if not self.cfg.skip:
            return w.weight
        return w.weight + torch.eye(self.head_dim, dtype=w.weight.dtype, device=w.weight.device)

    def _adapted(self, x_AND: Tensor, w: Weights) -> tuple[Tensor | None, Tensor]:
        if w.down is None or w.up is None:
            return None, x_AND
        hidden = torch.relu_(x_AND @ w.down)
        return hidden, torch.baddbmm(x_AND, hidden, w.up)

    def _linear(self, x_AND: Tensor, w: Weights) -> Tensor:
        x = self._adapted(x_AND, w)[1]
        if w.bias is not None:
            return torch.baddbmm(w.bias[:, None], x, self._matrix(w))
        return torch.bmm(x, self._matrix(w))

    def extra_repr(self) -> str:
        """One line for printing the module."""
        return f"{self.cfg.name}, heads={self.num_heads}, {self.head_dim} -> {self.features}"


_Block = tuple[int, slice, slice]
"""(row, input heads, tokens)."""


def _blocks(batch: int, inputs: int, tokens: int, share: int) -> list[_Block]:
    """Blocks of about BLOCK_ROWS output rows each."""
    heads = min(max(1, BLOCK_ROWS // max(1, share * tokens)), inputs)
    length = max(1, BLOCK_ROWS // share) if heads == 1 else max(1, tokens)
    return [
        (b, slice(x, min(x + heads, inputs)), slice(t, min(t + length, tokens)))
        for x in range(0, inputs, heads)
        for b in range(batch)
        for t in range(0, tokens, length)
    ]


def _pick(w: Weights, heads: slice, share: int) -> Weights:
    rows = slice(heads.start * share, heads.stop * share)
    parts = (w.weight, w.bias, w.down, w.up)
    return Weights(*(None if p is None else p[rows] for p in parts))  # type: ignore[arg-type]


def _input(x_BXTD: Tensor, b: int, heads: slice, tokens: slice, share: int, dtype: torch.dtype) -> Tensor:
    """[A, N, D], each input head repeated for the maps it feeds."""
    x = x_BXTD[b, heads, tokens].to(dtype)
    return x if share == 1 else x.repeat_interleave(share, dim=0)


class _Phi(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phi: FeatureMap, x_BXTD: Tensor, *params: Tensor | None) -> Tensor:
        """Features, block by block."""
        batch, inputs, tokens, _ = x_BXTD.shape
        w = Weights(*params)  # type: ignore[arg-type]
        share = phi.num_heads // inputs
        f = w.weight.new_empty(batch, phi.num_heads, tokens, phi.features)

        for b, heads, span in _blocks(batch, inputs, tokens, share):
            rows = slice(heads.start * share, heads.stop * share)
            x = _input(x_BXTD, b, heads, span, share, f.dtype)
            phi.block(x, _pick(w, heads, share), f[b, rows, span])

        ctx.phi = phi
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x_BXTD, f, *params)
        return f

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, df_BMTF: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the parameters, where required."""
        x_BXTD, f, *params = ctx.saved_tensors
        phi: FeatureMap = ctx.phi
        batch, inputs, tokens, dim = x_BXTD.shape
        share = phi.num_heads // inputs
        w = Weights(*params)
        need_dx, need_w = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:])
        grads = Weights(*(None if p is None else torch.zeros_like(p) for p in params)) if need_w else None  # type: ignore[arg-type]
        dx_BXTD = f.new_empty(batch, inputs, tokens, dim) if need_dx else None

        for b, heads, span in _blocks(batch, inputs, tokens, share):
            rows = slice(heads.start * share, heads.stop * share)
            x = _input(x_BXTD, b, heads, span, share, f.dtype)
            df = df_BMTF[b, rows, span].clone(memory_format=torch.contiguous_format)
            picked = None if grads is None else _pick(grads, heads, share)
            f_block = f[b, rows, span].contiguous()
            dx = phi.block_backward(x, _pick(w, heads, share), f_block, df, picked, need_dx)
            if dx_BXTD is not None and dx is not None:
                torch.sum(dx.unflatten(0, (-1, share)), 1, out=dx_BXTD[b, heads, span])
        dx_out = None if dx_BXTD is None else dx_BXTD.to(x_BXTD.dtype)
        out = (None,) * 4 if grads is None else (grads.weight, grads.bias, grads.down, grads.up)
        return None, dx_out, *out

"""A gated delta rule layer in place of the whole attention layer: the linear layer of Qwen3.5, without a window.

    q, k, v = silu(conv4(W_q x)), silu(conv4(W_k x)), silu(conv4(W_v x)),   q and k then divided by their lengths
    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   log a_t = -exp(A) softplus(W_a x_t + c)
    b_t = sigmoid(W_b x_t)
    y = W_o [RMSNorm(q S) * silu(W_z x)]

It has its own q, k, v and o projections, which start as copies of the layer's, and takes the layer's input to the
layer's output. The parameters have the names and shapes of Transformers' `Qwen3_5GatedDeltaNet`, so a model of such
layers and of kept softmax layers is a Qwen3.5 (:mod:`trenchcoat.models.native`). Sources: Gated DeltaNet
(https://arxiv.org/abs/2412.06464); its layer in Qwen3-Next and Qwen3.5 (Transformers); copies of the projections and
alignment behind the output projection, RADLADS (https://arxiv.org/abs/2505.03005) and HALO
(https://arxiv.org/abs/2601.22156); the start of the gates, Taylor-Calibrate. The delta rule is computed as in
:mod:`trenchcoat.students.gdn`.

**The copies.** q and o are copied; k and v once for each query head of their group. The weight of a q or k norm is
multiplied into the rows: the norm itself would be lost in the length 1 of q and k. The layer has no biases and no
position encoding; biases of q, k and v are added through the input, see below.

**At the start**, on the first rows of text: a vector u is found with u . x = 1 as nearly as a linear function of the
layer's input can. Along it, W_q, W_k and W_v get their biases, W_b a value of b from 0.3 (the head with the most
uniform attention) to 0.7 (the most peaked), and W_z the value at which silu(z) = 1. Half-life of a = mean look-back of
the head. The rows of v are made so small that silu is nearly linear in them, which the norm undoes. Last, the columns
of W_o are scaled by one number a head, by least squares against the teacher's output.

Shape legend: as in :mod:`trenchcoat.students.base`, and M width of the layer's input, C = H (2 D + E) channels of the
convolution, N tokens of the first text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, silu, softplus

from trenchcoat.config import StudentConfig
from trenchcoat.ops import RowState, Rule, Tokens, delta_rule, fla_kernels
from trenchcoat.ops.state import rounded
from trenchcoat.students.base import Flops, StudentAttention
from trenchcoat.students.gdn import FIRST_RATE, LEAST_RATE, LEAST_WRITE, MORE_WRITE, MOST_RATE, look_back
from trenchcoat.students.recurrent import kernels_or_pytorch

KERNEL = 4
"""Tokens that the convolution sees."""
UNIT_EPS = 1e-6
"""Added to the squared length of q and k, as Transformers does."""
FIT_TOKENS = 4096
"""Tokens that the start is fitted to (one row at least)."""
RIDGE = 1e-3
"""Penalty of u, relative to the mean square of the input."""
OPEN = 1.2784645
"""silu(OPEN) = 1."""
KEY_SIZE, VALUE_SIZE = 1.0, 0.5
"""Root mean square of a head's q and k, and of its v, before silu."""


@dataclass
class LayerState(RowState):
    """The memory after the last real token, and the last three inputs of the convolution."""

    memory_BHDE: Tensor
    conv_BCK: Tensor


class GatedDeltaLayer(StudentAttention):
    """A layer of Qwen3.5's linear attention; see :class:`StudentAttention` for what `replaces_layer` means."""

    kind = "linear"
    has_maps = False
    uses_input = True
    replaces_layer = True

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(cfg, **sizes)
        assert self.hidden_size is not None
        heads, width = self.num_heads, self.hidden_size
        channels, values = heads * (2 * self.head_dim + self.value_dim), heads * self.value_dim

        def matrix(inputs: int, outputs: int) -> nn.Linear:
            """A linear layer without bias, uninitialised."""
            made: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, dtype=torch.float32)
            return made

        self.in_proj_qkv, self.in_proj_z = matrix(width, channels), matrix(width, values)
        self.in_proj_b, self.in_proj_a = matrix(width, heads), matrix(width, heads)
        self.conv1d: nn.Conv1d = nn.utils.skip_init(
            nn.Conv1d, channels, channels, KERNEL, groups=channels, bias=False, dtype=torch.float32
        )
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.norm = _Scale(self.value_dim)
        self.out_proj = matrix(values, width)
        self._biases: Tensor | None = None
        self._teacher: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter: random projections, for :meth:`copy_projections` to replace."""
        super().reset_parameters()
        for linear in (self.in_proj_qkv, self.in_proj_z, self.out_proj):
            linear.weight.normal_(0.0, linear.in_features**-0.5)
        self.in_proj_a.weight.zero_()
        self.in_proj_b.weight.zero_()
        self.conv1d.weight.zero_()
        self.conv1d.weight[:, 0, -1] = 1.0
        self.A_log.zero_()
        self.dt_bias.fill_(math.log(math.expm1(FIRST_RATE)))
        self.norm.weight.fill_(1.0)

    @classmethod
    def starts_from_text(cls, cfg: StudentConfig) -> bool:
        """True: gates and sizes are."""
        return True

    @torch.no_grad()
    def copy_projections(self, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`StudentAttention.copy_projections`."""
        heads, groups, dim, values = self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim

        def rows(name: str, number: int, each: int) -> tuple[Tensor, Tensor | None]:
            """(weight, bias) of a projection to `number` heads of `each` rows, repeated for the query heads."""
            weight, bias = tensors[f"{name}_proj.weight"].float(), tensors.get(f"{name}_proj.bias")
            norm = tensors.get(f"{name}_norm.weight")
            parts = [weight, torch.zeros_like(weight[:, 0]) if bias is None else bias.float()]
            if norm is not None:  # one weight a dimension, or one for each head and dimension
                size = norm.float().repeat(number * each // norm.numel())
                parts = [parts[0] * size[:, None], parts[1] * size]
            shared = [part.unflatten(0, (number, each)).repeat_interleave(heads // number, 0) for part in parts]
            return shared[0].flatten(0, 1), None if bias is None else shared[1].flatten()

        found = [rows("q", heads, dim), rows("k", groups, dim), rows("v", groups, values)]
        self.in_proj_qkv.weight.copy_(torch.cat([weight for weight, _ in found]))
        self.out_proj.weight.copy_(tensors["o_proj.weight"])
        whole = [torch.zeros_like(weight[:, 0]) if bias is None else bias for weight, bias in found]
        self._biases = torch.cat(whole) if any(bias is not None for _, bias in found) else None

    def copied_parameters(self) -> list[nn.Parameter]:
        """The copies of q, k, v and o."""
        return [*self.in_proj_qkv.parameters(), *self.out_proj.parameters()]

    @property
    def features(self) -> int:
        """D: the memory has D x E numbers a head."""
        return self.head_dim

    @property
    def key_heads(self) -> int:
        """H: each query head has a memory."""
        return self.num_heads

    # What it computes

    def forward(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        *,
        x_BTM: Tensor | None = None,
        mask_BT: Tensor | None = None,
        state: LayerState | None = None,
        **scores: Any,
    ) -> tuple[Tensor, LayerState | None]:
        """y [B, 1, T, M], the output of the layer for its input x; q, k, v are not read. `mask_BT` and `state` as in
        :meth:`StudentAttention.forward`."""
        x = self._input(x_BTM)
        order_BT = None
        if mask_BT is not None:  # real tokens first, in order
            order_BT = (~mask_BT.bool()).to(torch.uint8).argsort(dim=1, stable=True)
            x = x.gather(1, order_BT[..., None].expand_as(x))
        count_B = x.new_full((len(x),), x.shape[1], dtype=torch.int64) if mask_BT is None else mask_BT.sum(1)
        real_BT = None if mask_BT is None else torch.arange(x.shape[1], device=x.device) < count_B[:, None]
        read, conv_BCL, memory = self._read(x, real_BT, state, q_BHTD)
        y = self.out_proj(read)
        if order_BT is not None and real_BT is not None:
            y = torch.zeros_like(y).scatter(1, order_BT[..., None].expand_as(y), y * real_BT[..., None])
        y = y.to(q_BHTD.dtype)[:, None]
        return y, None if state is None else self._after(state, conv_BCL.detach(), memory.detach(), count_B)

    def _read(
        self, x: Tensor, real_BT: Tensor | None, state: LayerState | None, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(what the output projection gets [B, T, H E], the convolution's inputs with those before, the memory)."""
        heads, dim, values = self.num_heads, self.head_dim, self.value_dim
        q, k, v, conv_BCL = self._qkv(x, state)
        log_forget = -self.A_log.exp() * softplus(self.in_proj_a(x) + self.dt_bias)
        write = self.in_proj_b(x).sigmoid()
        if real_BT is not None:
            log_forget, write = log_forget * real_BT[..., None], write * real_BT[..., None]
        log_forget, write = log_forget.transpose(1, 2), write.transpose(1, 2)
        start = x.new_zeros(len(x), heads, dim, values) if state is None else state.memory_BHDE.to(x.dtype)
        if self.implementation(like.dtype, like.device) == "fla":
            half = like.dtype
            read, memory = fla_kernels.gated_delta(q.to(half), k.to(half), v.to(half), log_forget, write, start)
        else:
            read, memory = delta_rule.gated_delta(q, k, v, log_forget, write, start)
        read = read.to(x.dtype).transpose(1, 2)
        normed = self.norm.weight * (read * torch.rsqrt(read.square().mean(-1, keepdim=True) + self.norm_eps))
        return normed.flatten(2) * silu(self.in_proj_z(x)), conv_BCL, memory

    def _qkv(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [B, H, T, D] of length 1, v [B, H, T, E], the inputs of the convolution with the three before."""
        given_BCT = self.in_proj_qkv(x).transpose(1, 2)
        before = given_BCT.new_zeros(*given_BCT.shape[:2], KERNEL - 1) if state is None else state.conv_BCK.to(x.dtype)
        conv_BCL = torch.cat((before, given_BCT), 2)
        mixed = silu(conv1d(conv_BCL, self.conv1d.weight, groups=conv_BCL.shape[1])).transpose(1, 2)
        sizes = [self.num_heads * each for each in (self.head_dim, self.head_dim, self.value_dim)]
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in mixed.split(sizes, 2))
        return _unit(q), _unit(k), v, conv_BCL

    def _after(self, state: LayerState, conv_BCL: Tensor, memory: Tensor, count_B: Tensor) -> LayerState:
        """The state after `count` real tokens of each row."""
        seen_B = state.seen_B + count_B.to(state.seen_B.device)
        last = count_B[:, None, None] + torch.arange(KERNEL - 1, device=count_B.device)
        conv = conv_BCL.gather(2, last.expand(-1, conv_BCL.shape[1], -1))
        return LayerState(
            seen_B=seen_B,
            memory_BHDE=rounded(memory, state.memory_BHDE.dtype, seen_B),
            conv_BCK=conv.to(state.conv_BCK.dtype),
        )

    def empty_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> LayerState:
        """See :meth:`StudentAttention.empty_state`."""
        wide = torch.bfloat16 if self.state_dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)
        heads, dim, values = self.num_heads, self.head_dim, self.value_dim

        def zeros(*shape: int, of: torch.dtype = wide) -> Tensor:
            """Zeros [B, *shape]."""
            return torch.zeros(batch_size, *shape, dtype=of, device=device)

        channels = heads * (2 * dim + values)
        return LayerState(
            seen_B=zeros(of=torch.int64), memory_BHDE=zeros(heads, dim, values), conv_BCK=zeros(channels, KERNEL - 1)
        )

    def _input(self, x_BTM: Tensor | None) -> Tensor:
        if x_BTM is None:
            raise ValueError(f"student {self.cfg.name!r} reads the layer's input: call it with x_BTM [B, T, M]")
        return x_BTM.to(self.dt_bias.device, self.dt_bias.dtype)

    def implementation(self, dtype: torch.dtype, device: torch.device) -> str:
        """`fla` or `chunkwise` (PyTorch); `auto` is `fla` where its kernels can run, and the log says why not."""
        return kernels_or_pytorch(self.cfg.name, self.cfg.impl, dtype, device)

    # How it learns

    @torch.no_grad()
    def see_attention(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, **scores: Any) -> None:
        """See :meth:`StudentAttention.see_attention`."""
        mask_BT = scores.get("mask_BT")
        tokens = Tokens(q_BHTD, k_BGTD, v_BGTE, mask_BT)
        rule = Rule(kind="linear", window=1, scale=scores["scale"], softcap=scores.get("softcap"))
        rows = self._rows(tokens)
        real_BT = torch.ones_like(k_BGTD[:, 0, :, 0], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        some = Tokens(q_BHTD[rows], k_BGTD[rows], v_BGTE[rows], None if mask_BT is None else mask_BT[rows])
        self._teacher = look_back(some, rule, real_BT[rows])

    @staticmethod
    def _rows(tokens: Tokens) -> slice:
        return slice(max(1, FIT_TOKENS // tokens.q_BHTD.shape[2]))

    @torch.no_grad()
    def initialise(self, tokens: Tokens, y_BHTE: Tensor, *, scale: float, **more: Any) -> None:
        """The start described above, on the first rows, of about `FIT_TOKENS` together; arguments as in :meth:`learn`.

        Without :meth:`see_attention` before it, half-lives and b stay as they are.
        """
        rows, mask_BT = self._rows(tokens), tokens.mask_BT
        x, y = self._input(more.get("x_BTM"))[rows], y_BHTE[rows, 0].to(self.dt_bias.dtype)
        real_BT = torch.ones_like(x[..., 0], dtype=torch.bool) if mask_BT is None else mask_BT[rows].bool()
        u_M = self._constant(x[real_BT])
        if self._biases is not None:
            self.in_proj_qkv.weight.add_(self._biases.to(u_M)[:, None] * u_M)
            self._biases = None
        if self._teacher is not None:
            self._fit_gates(*self._teacher, u_M)
            self._teacher = None
        self.in_proj_z.weight.copy_((OPEN * u_M).expand_as(self.in_proj_z.weight))
        self._fit_sizes(x[real_BT])
        read, _, _ = self._read(x * real_BT[..., None], real_BT, None, tokens.q_BHTD)
        self._fit_output(read[real_BT], y[real_BT])

    def _constant(self, x_NM: Tensor) -> Tensor:
        """u [M], the ridge regression of 1 on the input."""
        gram = x_NM.mT @ x_NM
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-30)
        return torch.linalg.solve(gram, x_NM.sum(0))

    def _fit_gates(self, distance_H: Tensor, entropy_H: Tensor, u_M: Tensor) -> None:
        rate_H = (math.log(2.0) / distance_H.clamp_min(0.5)).clamp(LEAST_RATE, MOST_RATE)
        self.dt_bias.copy_(rate_H.expm1().log())
        self.A_log.zero_()
        self.in_proj_a.weight.zero_()
        least, most = entropy_H.aminmax()
        peaked_H = 1.0 - (entropy_H - least) / (most - least).clamp_min(1e-12)
        write_H = torch.logit(LEAST_WRITE + MORE_WRITE * peaked_H).to(u_M)
        self.in_proj_b.weight.copy_(write_H[:, None] * u_M)

    def _fit_sizes(self, x_NM: Tensor) -> None:
        """q, k and v of each head get the root mean squares `KEY_SIZE` and `VALUE_SIZE` before silu."""
        given = self.in_proj_qkv(x_NM)
        keys = 2 * self.num_heads * self.head_dim
        for part, size, each in (
            (slice(keys), KEY_SIZE, self.head_dim),
            (slice(keys, None), VALUE_SIZE, self.value_dim),
        ):
            power = given[:, part].unflatten(1, (-1, each)).square().mean((0, 2))
            factor = size * power.clamp_min(1e-30).rsqrt()
            self.in_proj_qkv.weight[part] *= factor.repeat_interleave(each)[:, None]

    def _fit_output(self, read_NX: Tensor, y_NM: Tensor) -> None:
        """One factor a head for the columns of the output projection, jointly by least squares."""
        columns = self.out_proj.weight.unflatten(1, (self.num_heads, -1))
        parts = read_NX.unflatten(1, (self.num_heads, -1))
        gram = read_NX.new_zeros(self.num_heads, self.num_heads)
        gain = read_NX.new_zeros(self.num_heads)
        for some, target in zip(parts.split(256), y_NM.split(256), strict=True):
            each_NHM = torch.einsum("nhe,mhe->nhm", some, columns)
            gram += torch.einsum("nhm,ngm->hg", each_NHM, each_NHM)
            gain += torch.einsum("nhm,nm->h", each_NHM, target)
        gram.diagonal().add_(1e-4 * gram.diagonal().mean() + 1e-30)
        factor_H = torch.linalg.solve(gram, gain)
        self.out_proj.weight.mul_(factor_H.repeat_interleave(self.value_dim))

    # What it costs

    @property
    def graph_numbers(self) -> float:
        """Projections and the convolution, q, k, v of length 1, the chunks of the rule, gates and outputs (counted in a
        real graph)."""
        return 32.0 * self.num_heads * self.head_dim + 4.0 * self.num_heads * 64

    def flops(self, seq_len: int) -> Flops:
        """Per token: the projections and the convolution (as `maps`); a key reads the memory before it corrects it."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim >= 2)
        each = 2.0 * self.head_dim * self.value_dim * self.num_heads
        return Flops(maps=2.0 * matrices, near=0.0, write=2.0 * each, read=each)

    def extra_repr(self) -> str:
        """One line for printing the module."""
        return f"layer of width {self.hidden_size}, heads={self.num_heads}"


class _Scale(nn.Module):
    """The weight of a norm, for its name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)

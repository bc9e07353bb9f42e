"""A softmax window and sinks beside a recurrent memory of all tokens, S [D, E] a query head, read without denominator.

    far_n = s * RMSNorm(q_n S_n) * sigmoid(B A x_n)

with q and k those of the layer, q + q Q and k + k K with learned Q and K (0 at first), normalised by the subclass; s
one number a head and value dimension, A [R, M] and B [H E, R] of rank R = D (as in Kimi Linear,
https://arxiv.org/abs/2510.26692, section 3; B is 0 at first). Keys and values of a group are copied for each of its
query heads. The memory reads the window's tokens too, so that one call of a library's kernel computes it; its output
counts where there are tokens outside the window (:mod:`trenchcoat.students.hybrid`), so a row of at most two windows is
softmax attention exactly, and what the memory adds can be compared with the window alone.

Shape legend: as in :mod:`trenchcoat.students.hybrid`, and R rank of the output gate.
"""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trenchcoat.config import StudentConfig
from trenchcoat.ops import Rule, StateSizes, StudentState, Tokens, fla_kernels
from trenchcoat.ops.state import rounded
from trenchcoat.students.base import Flops
from trenchcoat.students.hybrid import LEAST_MIX, MOST_MIX, HybridAttention

EPS = 1e-8
"""Added to the mean square of a read."""

_log = logging.getLogger("trenchcoat")


@dataclass
class RecurrentState(StudentState):
    """The window of `StudentState`, without its sums, and the memory after the last real token."""

    memory_BHDE: Tensor


class RecurrentAttention(HybridAttention):
    """A subclass writes `recur`, and `reset_parameters` for its gates."""

    has_maps = False
    heads_apart = False

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(cfg, **sizes)
        heads, dim, values = self.num_heads, self.head_dim, self.value_dim
        assert self.hidden_size is not None

        def parameter(*shape: int) -> nn.Parameter:
            """An uninitialised parameter."""
            return nn.Parameter(torch.empty(*shape, dtype=torch.float32))

        self.query_HDD, self.key_HDD = parameter(heads, dim, dim), parameter(heads, dim, dim)
        self.size_HE = parameter(heads, values)
        self.gate_RM, self.gate_XR = parameter(dim, self.hidden_size), parameter(heads * values, dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """(Re)initialise every parameter from the config; the output gate is then 1/2, the size 2."""
        super().reset_parameters()
        for zero in (self.query_HDD, self.key_HDD, self.gate_XR):
            zero.zero_()
        self.size_HE.fill_(2.0)
        self.gate_RM.normal_()  # x has length 1

    @property
    def features(self) -> int:
        """D: the memory has D x E numbers a head."""
        return self.head_dim

    @property
    def key_heads(self) -> int:
        """H: each query head has a memory."""
        return self.num_heads

    @abstractmethod
    def recur(
        self, tokens: Tokens, x_BTM: Tensor, memory_BHDE: Tensor, half: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """(what the queries read [B, H, T, E] up to a factor, the memory after the tokens), with autograd.

        `tokens` has H heads of keys and values, which are 0 where there is no token; the gates must then leave the
        memory as it is. `half` is the dtype for the kernels of flash-linear-attention; None: PyTorch.
        """

    def far(
        self, tokens: Tokens, x_BTM: Tensor, rule: Rule, state: RecurrentState | None, after: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState | None]:
        """See :meth:`HybridAttention.far`."""
        before = None if state is None else state.memory_BHDE
        read, memory = self._read(tokens, x_BTM, before)
        if after is not None:
            after.memory_BHDE = self._kept(memory.detach(), after)
        return self._gated(read, x_BTM) * self.size_HE[:, None], after

    def far_step(self, token: Tokens, x_B1M: Tensor, rule: Rule, state: RecurrentState) -> Tensor:
        """See :meth:`HybridAttention.far_step`."""
        read, memory = self._read(token, x_B1M, state.memory_BHDE)
        state.memory_BHDE.copy_(self._kept(memory, state))
        return self._gated(read, x_B1M) * self.size_HE[:, None]

    def _read(self, tokens: Tokens, x_BTM: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """(what is read divided by its root mean square, the memory after the tokens)."""
        dtype, real_BT = self.size_HE.dtype, tokens.mask_BT
        q, k, v = (self.to_heads(x.to(dtype)) for x in (tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE))
        q, k = q + q @ self.query_HDD, k + k @ self.key_HDD
        if real_BT is not None:
            k, v = (x * real_BT[:, None, :, None] for x in (k, v))
        start = q.new_zeros(q.shape[0], self.num_heads, self.head_dim, self.value_dim) if memory is None else memory
        given = tokens.q_BHTD
        half = given.dtype if self.implementation(given.dtype, given.device) == "fla" else None
        read, after = self.recur(Tokens(q, k, v, real_BT), x_BTM, start.to(dtype), half)
        read = read.to(dtype)
        return read * torch.rsqrt(read.square().mean(-1, keepdim=True) + EPS), after

    def _gated(self, read_BHTE: Tensor, x_BTM: Tensor) -> Tensor:
        gate_BTX = linear(linear(x_BTM, self.gate_RM), self.gate_XR).sigmoid()
        gate_BHTE = gate_BTX.unflatten(2, (self.num_heads, self.value_dim)).transpose(1, 2)
        return read_BHTE * gate_BHTE

    def _kept(self, memory: Tensor, state: RecurrentState) -> Tensor:
        return rounded(memory, state.memory_BHDE.dtype, state.seen_B)

    def empty_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> RecurrentState:
        """See :meth:`StudentAttention.empty_state`."""
        sizes = StateSizes(
            kv_heads=self.num_kv_heads, key_maps=0, key_dim=self.head_dim, value_dim=self.value_dim, features=0
        )
        short = self.state_dtype == torch.bfloat16
        wide = torch.bfloat16 if short else torch.promote_types(dtype, torch.float32)
        window = StudentState.empty(
            batch_size, self._rule(1.0), sizes, dtype=torch.bfloat16 if short else dtype, device=device
        )
        shape = (batch_size, self.num_heads, self.head_dim, self.value_dim)
        return RecurrentState(**window.tensors(), memory_BHDE=torch.zeros(shape, dtype=wide, device=device))

    @torch.no_grad()
    def fit(self, tokens: Tokens, x_BTM: Tensor, rule: Rule, near_BHTE: Tensor, y_BHTE: Tensor, at_BT: Tensor) -> None:
        """o and the size s of each head, for the least squared error of (1 - o) near + o s r against the teacher's y,
        with r what is read; s is also the best for an o at an end of its range."""
        read = self._gated(self._read(tokens, x_BTM, None)[0], x_BTM) * at_BT[:, None, :, None]
        missing = y_BHTE - near_BHTE

        def sums(a: Tensor, b: Tensor) -> Tensor:
            """Sum of the products, a head."""
            return (a * b).sum((0, 2, 3))

        power_H = sums(read, read).clamp_min(1e-30)
        across_H, gain_H = sums(near_BHTE, read), sums(missing, read)
        # without its part along the read, near is what is left to subtract
        rest_H = (sums(near_BHTE, near_BHTE) - across_H.square() / power_H).clamp_min(1e-30)
        mix_H = ((gain_H * across_H / power_H - sums(missing, near_BHTE)) / rest_H).clamp(LEAST_MIX, MOST_MIX)
        self.size_HE.copy_(((gain_H + mix_H * across_H) / power_H / mix_H)[:, None].expand_as(self.size_HE))
        self.set_mix(mix_H)

    def implementation(self, dtype: torch.dtype, device: torch.device) -> str:
        """`fla` or `chunkwise` (PyTorch); `auto` is `fla` where its kernels can run, and the log says why not."""
        return kernels_or_pytorch(self.cfg.name, self.cfg.impl, dtype, device)

    @property
    def graph_numbers(self) -> float:
        """Copies of q, k, v a query head, the memory after each chunk, gates and outputs (counted in a real graph)."""
        return 24.0 * self.num_heads * self.head_dim

    def flops(self, seq_len: int) -> Flops:
        """As :meth:`HybridAttention.flops`, where every token is written."""
        own = super().flops(seq_len)
        each = 2.0 * self.head_dim * self.value_dim * self.num_heads
        return Flops(maps=own.maps + 4.0 * self.num_heads * self.head_dim**2, near=own.near, write=each, read=each)


@functools.cache
def kernels_or_pytorch(name: str, impl: str, dtype: torch.dtype, device: torch.device) -> str:
    """`fla` or `chunkwise`: what `student.impl` selects for the student `name`, whose `auto` is `fla` where its kernels
    can run; ValueError if the one that is asked for cannot."""
    if impl not in ("auto", "chunkwise", "fla"):
        raise ValueError(
            f"student.impl is {impl}, but {name!r} runs on the kernels of flash-linear-attention (fla) or in PyTorch "
            "(chunkwise); use one of these, or auto"
        )
    if impl == "chunkwise":
        return impl
    reason = fla_kernels.obstacle(dtype, device)
    if impl == "fla" and reason is not None:
        raise ValueError(f"student.impl is fla, but {reason}; use student.impl=chunkwise")
    chosen = "fla" if reason is None else "chunkwise"
    _log.info("%s on %s", name, f"{device}: {chosen}" + ("" if reason is None else f" ({reason})"))
    return chosen

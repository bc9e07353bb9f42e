"""Lightning attention beside a window: a memory that forgets at a fixed rate, one a head.

    S_t = gamma_h S_{t-1} + k_t v_t^T,   gamma_h = exp(-2^(-8 h / H)),  h = 1 .. H

q and k are divided by their root mean square (which RoPE does not change). Half-lives are from 1 to 177 tokens; with
kept groups, the H heads are those of the student. The read is normed and gated as in
:mod:`trenchcoat.students.recurrent`. In :mod:`trenchcoat.ops.recurrences`, `gated_sums` is the definition.

Sources: Lightning Attention-2 (https://arxiv.org/abs/2401.04658); rates and norms, HALO
(https://arxiv.org/abs/2601.22156).

Shape legend: as in :mod:`trenchcoat.students.hybrid`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trenchcoat.config import StudentConfig
from trenchcoat.ops import Tokens, fla_kernels
from trenchcoat.ops.chunked.decayed import gated_sums
from trenchcoat.students.recurrent import RecurrentAttention


class LightningAttention(RecurrentAttention):
    """Softmax over the terrace window and the sinks, and a memory with a fixed rate of forgetting a head."""

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(cfg, **sizes)
        self.reset_parameters()

    def log_forget(self, like: Tensor) -> Tensor:
        """log gamma [H]."""
        head = torch.arange(1, self.num_heads + 1, dtype=like.dtype, device=like.device)
        return -torch.exp2(-8.0 * head / self.num_heads)

    def recur(
        self, tokens: Tokens, x_BTM: Tensor, memory_BHDE: Tensor, half: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`RecurrentAttention.recur`."""
        size = self.head_dim**0.5
        q, k, v = normalize(tokens.q_BHTD, dim=-1), normalize(tokens.k_BGTD, dim=-1) * size, tokens.v_BGTE
        forget_BHT = self.log_forget(q)[:, None].expand(q.shape[:3])
        if tokens.mask_BT is not None:
            forget_BHT = forget_BHT * tokens.mask_BT[:, None]
        if half is None:
            return gated_sums(q, k, v, forget_BHT, memory_BHDE)
        return fla_kernels.gated_sums(q.to(half), k.to(half), v.to(half), forget_BHT, memory_BHDE)

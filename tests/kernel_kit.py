"""Random calls of the Triton kernels and of the quadratic reference, feature maps and their gradients included."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; pip install 'trenchcoat[kernels]'")

from trenchcoat.config import FeatureMapConfig
from trenchcoat.ops import Rule, linear_window_attention, triton, triton_launch
from trenchcoat.students.feature_maps import FeatureMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Compiled on a GPU, in Triton's interpreter elsewhere."""


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """Sizes and settings of one call."""

    kind: str = "terrace"
    window: int = 4
    tokens: int = 21
    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    key_maps: int = 2
    dim: int = 6
    values: int = 5
    columns: int = 4
    map: str = "hedgehog"
    bias: bool = False
    mask: str | None = None
    sink_logit: bool = False
    groups: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors that get gradients, by name: the same numbers for every dtype (of q, k, v: rounded to bfloat16)."""
        make = torch.Generator().manual_seed(self.tokens + 100 * self.window)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        sizes = {
            "q": (self.batch, self.heads, self.tokens, self.dim),
            "k": (self.batch, self.kv_heads, self.tokens, self.dim),
            "v": (self.batch, self.kv_heads, self.tokens, self.values),
            "query_matrix": (self.heads, self.dim, self.columns),
            "key_matrix": (self.key_maps, self.dim, self.columns),
            "query_bias": (self.heads, self.columns),
            "key_bias": (self.key_maps, self.columns),
            "mix": (self.heads,),
            "sink_logit": (self.heads,),
        }
        made = {name: random(*shape).to(torch.bfloat16).to(DEVICE, dtype) for name, shape in sizes.items()}
        return {name: t.requires_grad_() for name, t in made.items()}

    @property
    def rule(self) -> Rule:
        """The operator's settings."""
        return Rule(kind=self.kind, window=self.window, scale=0.7, **self.options)  # type: ignore[arg-type]

    def real(self) -> Tensor | None:
        """The mask [B, T]; rows are padded differently."""
        if self.mask is None:
            return None
        real = torch.ones(self.batch, self.tokens, dtype=torch.bool)
        for b in range(self.batch):
            pads = 3 + 4 * b
            if self.mask == "left":
                real[b, :pads] = False
            elif self.mask == "right":
                real[b, self.tokens - pads :] = False
            else:
                real[b] = torch.rand(self.tokens, generator=torch.Generator().manual_seed(b)) > 0.3
        return real.to(DEVICE)

    def phi(self, leaves: dict[str, Tensor], side: str) -> FeatureMap:
        """The feature map of queries or keys, with the leaves as its parameters."""
        heads = self.heads if side == "query" else self.key_maps
        cfg = FeatureMapConfig(name=self.map, feature_dim=self.columns, bias=self.bias)  # type: ignore[arg-type]
        phi = FeatureMap(cfg, num_heads=heads, head_dim=self.dim)
        del phi.weight
        phi.weight = leaves[f"{side}_matrix"]  # type: ignore[assignment]
        if self.bias:
            del phi.bias
            phi.bias = leaves[f"{side}_bias"]
        return phi

    def reference(self, dtype: torch.dtype, *, rounding: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output and gradients of a random projection of it; `rounding` rounds features and output to that type."""
        leaves = self.leaves(dtype)
        y = self.run_reference(leaves, rounding)
        y = y if rounding is None else y + (y.to(rounding).to(dtype) - y).detach()
        return self.differentiated(y, leaves)

    def run_reference(self, leaves: dict[str, Tensor], rounding: torch.dtype | None = None) -> Tensor:
        """y of the quadratic reference."""
        far = self.rule.far
        fq, fk = (self.phi(leaves, s)(leaves[x]) if far else None for s, x in (("query", "q"), ("key", "k")))
        if rounding is not None:
            fq, fk = (f + (f.to(rounding).to(f.dtype) - f).detach() for f in (fq, fk))
        rule = self.rule
        y, _ = linear_window_attention(
            leaves["q"], leaves["k"], leaves["v"], fq, fk, leaves["mix"], kind=rule.kind, window=rule.window,
            scale=rule.scale, softcap=rule.softcap, sinks=rule.sinks, affine=rule.affine, far=rule.far,
            sink_logit_H=leaves["sink_logit"] if self.sink_logit else None, mask_BT=self.real(), impl="reference",
        )  # fmt: skip
        return y

    def maps(self, leaves: dict[str, Tensor]) -> list[triton.FusedMap | None]:
        """Query and key map as the kernels take them."""
        if not self.rule.far:
            return [None, None]
        return [
            triton.FusedMap(self.map, leaves[f"{s}_matrix"].float(), leaves[f"{s}_bias"].float() if self.bias else None)
            for s in ("query", "key")
        ]

    def kernels(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same by the kernels; parameters stay float32."""
        leaves = self.leaves(torch.float32)
        q, k, v = (leaves[name].to(dtype) for name in "qkv")
        rule = self.rule
        y, _ = triton.attend(
            q, k, v, *self.maps(leaves), rule.log_ratio(leaves["mix"]), rule=rule,
            sink_logit_H=leaves["sink_logit"] if self.sink_logit else None, mask_BT=self.real(),
        )  # fmt: skip
        assert y.dtype == dtype
        return self.differentiated(y, leaves)

    def differentiated(self, y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output and gradients in float64."""
        projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
        grads = torch.autograd.grad(
            (y * projection.to(y.device, y.dtype)).sum(), list(leaves.values()), allow_unused=True
        )
        found = {"y": y.detach().double()}
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[f"d{name}"] = torch.zeros_like(leaf).double() if grad is None else grad.double()
        return found

    @property
    def terms(self) -> int:
        """Products summed for one number, roughly."""
        return self.batch * self.tokens * self.columns * 2 + 2 * self.window * self.dim * self.heads


def group(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Cut rows into up to `groups` groups of two chunks or more."""
    monkeypatch.setattr(triton_launch, "SHORTEST_GROUP", 2)
    monkeypatch.setattr(triton_launch, "group_size", lambda chunks, programs, wanted: max(2, -(-chunks // groups)))


def name_of(case: KernelCase) -> str:
    """A test id."""
    plain = KernelCase()
    parts = [f"{k}={v}" for k, v in case.__dict__.items() if v != getattr(plain, k)]
    return ",".join(parts) or "plain"

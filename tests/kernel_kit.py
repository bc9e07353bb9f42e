"""Random calls of the Triton kernels and the quadratic reference, including feature maps and their gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; pip install triton")

from low_precision import DRAWS, LowPrecision, Product, features, tolerances
from trenchcoat.config import FeatureMapConfig
from trenchcoat.ops import Features, HeadWeights, Rule, Tokens, linear_window_attention
from trenchcoat.ops.state import FusedMap, FusedMaps
from trenchcoat.ops.triton import attention, launch, passes
from trenchcoat.students.feature_maps import ACTIVATIONS, FeatureMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Compiled on a GPU, in Triton's interpreter elsewhere."""

LEARNED, WEIGHT = ["query_matrix", "query_bias", "key_matrix", "key_bias", "mix"], 0.3
"""The tensors transfer trains, and the weight of the squared error."""


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
    seed: int = 0
    sharp: float = 1.0
    """Factor of the maps' matrices."""
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors that get gradients, by name: the same values for every dtype (q, k and v have bfloat16 values)."""
        make = torch.Generator().manual_seed(self.tokens + 100 * self.window + 10_000 * self.seed)

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
        short = {name: torch.bfloat16 if name in "qkv" else torch.float32 for name in sizes}
        made = {name: random(*shape).to(short[name]).to(DEVICE, dtype) for name, shape in sizes.items()}
        for name in ("query_matrix", "key_matrix"):
            made[name] *= self.sharp
        return {name: t.requires_grad_() for name, t in made.items()}

    @property
    def rule(self) -> Rule:
        """The operator's settings."""
        return Rule(kind=self.kind, window=self.window, scale=0.7, **self.options)  # type: ignore[arg-type]

    def real(self) -> Tensor | None:
        """The mask [B, T]; each row is padded differently."""
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

    def reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The output, and the gradients of a random projection of it."""
        leaves = self.leaves(dtype)
        return self.differentiated(self.run_reference(leaves), leaves)

    def run_reference(self, leaves: dict[str, Tensor]) -> Tensor:
        """y of the quadratic reference."""
        features = None
        if self.rule.far:
            features = Features(*(self.phi(leaves, s)(leaves[x]) for s, x in (("query", "q"), ("key", "k"))))
        return linear_window_attention(self.qkv(leaves), features, self.weights(leaves), self.rule, impl="reference")[0]

    def low_precision(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same from the independent 16-bit run; for rows without padding."""
        leaves = self.leaves(torch.float64)
        return self.differentiated(self.run_low_precision(leaves, dtype), leaves)

    def run_low_precision(self, leaves: dict[str, Tensor], dtype: torch.dtype, *, store: bool = True) -> Tensor:
        """y of :class:`low_precision.LowPrecision`."""
        run = LowPrecision(rule=self.rule, map=self.map, dtype=dtype, store=store)
        return run(leaves, bias=self.bias, sink_logit=self.sink_logit)

    def qkv(self, leaves: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tokens:
        """The tokens, in `dtype`."""
        return Tokens(*(leaves[name].to(dtype or leaves[name].dtype) for name in "qkv"), self.real())

    def weights(self, leaves: dict[str, Tensor]) -> HeadWeights:
        """Mix and sink logit."""
        return HeadWeights(leaves["mix"], leaves["sink_logit"] if self.sink_logit else None)

    def maps(self, leaves: dict[str, Tensor]) -> FusedMaps | None:
        """Query and key map in the kernels' format."""
        if not self.rule.far:
            return None
        act = ACTIVATIONS[self.map]
        query, key = (
            FusedMap(
                str(act.kernel), act.paired, leaves[f"{s}_matrix"].float(),
                leaves[f"{s}_bias"].float() if self.bias else None,
            )
            for s in ("query", "key")
        )  # fmt: skip
        return query, key

    def kernels(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same from the kernels; parameters stay float32."""
        leaves = self.leaves(torch.float32)
        y, _ = attention.attend(self.qkv(leaves, dtype), self.maps(leaves), self.weights(leaves), self.rule)
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

    def teacher(self) -> Tensor:
        """Teacher outputs [B, H, T, E], bfloat16 values in float32."""
        shape = (self.batch, self.heads, self.tokens, self.values)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).bfloat16().float().to(DEVICE)

    def transferred(self, dtype: torch.dtype, *, rounding: torch.dtype | None = None) -> dict[str, Tensor]:
        """Summed squared error and its gradients, by autograd through the reference; with `rounding` through the
        independent 16-bit run."""
        leaves = self.leaves(dtype)
        mask = self.real()
        with torch.enable_grad():
            y = (
                self.run_reference(leaves)
                if rounding is None
                else self.run_low_precision(leaves, rounding, store=False)
            )
            deviation = y - self.teacher().to(dtype)
            deviation = deviation if mask is None else deviation * mask[:, None, :, None]
            loss = deviation.square().sum()
            grads = torch.autograd.grad(WEIGHT * loss, [leaves[n] for n in LEARNED], allow_unused=True)
        pairs = zip(LEARNED, grads, strict=True)
        return {"loss": loss.detach().double(), **{n: g.double() for n, g in pairs if g is not None}}

    def transfer_kernels(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same from the kernels; parameters stay float32."""
        leaves = self.leaves(torch.float32)
        mask = self.real()
        with torch.no_grad():
            total, grads = attention.transfer_error(
                self.qkv(leaves, dtype), self.teacher().to(dtype), self.maps(leaves), self.weights(leaves), self.rule,
                length_B=None if mask is None else mask.sum(1), error_scale=WEIGHT,
            )  # fmt: skip
        found = {"loss": total, **{n: g for n, g in zip(LEARNED, grads, strict=True) if g is not None}}
        if self.kind != "linear" and not self.rule.affine:
            found["mix"] = found["mix"] * torch.sigmoid(-leaves["mix"].detach())
        return found

    @property
    def terms(self) -> int:
        """Approximate number of products summed per result."""
        return self.batch * self.tokens * self.columns * 2 + 2 * self.window * self.dim * self.heads


def group(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Split rows into up to `groups` groups of at least two chunks."""
    monkeypatch.setattr(launch, "SHORTEST_GROUP", 2)
    monkeypatch.setattr(launch, "group_size", lambda chunks, programs, wanted: max(2, -(-chunks // groups)))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised tensors with NaN (integers with their largest value)."""

    def filled(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(torch.iinfo(x.dtype).max)

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, make=make, **k: filled(make(*a, **k)))


def output_tolerances(case: KernelCase, dtype: torch.dtype, draws: int = DRAWS) -> dict[str, float]:
    """Tolerances of the kernels' output and gradients."""
    cases = [replace(case, seed=1000 + i) for i in range(draws)]
    return tolerances([(c.low_precision(dtype), c.reference(torch.float64)) for c in cases])


def transfer_tolerances(case: KernelCase, dtype: torch.dtype) -> dict[str, float]:
    """Tolerances of the kernels' loss and gradients in attention transfer."""
    draws = [replace(case, seed=1000 + i) for i in range(DRAWS)]
    return tolerances([(c.transferred(torch.float64, rounding=dtype), c.transferred(torch.float64)) for c in draws])


def sum_errors(case: KernelCase, dtype: torch.dtype, seed: int, *, kernels: bool) -> Tensor:
    """Deviations of S after all tokens, for the kernels or the independent run: one product."""
    leaves = {name: t.detach() for name, t in replace(case, seed=seed).leaves(torch.float64).items()}
    v = leaves["v"]
    exact = case.phi(leaves, "key")(leaves["k"]).mT @ v
    if not kernels:
        f = features(leaves["k"], leaves["key_matrix"], None, case.map, dtype)
        return (Product.apply(f.mT, v, torch.bfloat16) - exact).abs()
    q, k, v = (leaves[name].to(dtype) for name in "qkv")
    maps, none = case.maps(leaves), (None,) * 4
    call = launch.Call(case.rule, q, k, v, *maps, leaves["mix"].float(), *none, launch.Spans())
    count = torch.full((case.batch,), case.tokens, dtype=torch.int32, device=DEVICE)
    return (passes.final_sums(call, count)[0] - exact).abs()


def name_of(case: KernelCase) -> str:
    """A test id."""
    plain = KernelCase()
    parts = [f"{k}={v}" for k, v in case.__dict__.items() if v != getattr(plain, k)]
    return ",".join(parts) or "plain"

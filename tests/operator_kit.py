"""Random calls of the operator, and error budgets derived from an independent float32 run of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trenchcoat.ops import Features, HeadWeights, Rule, StateSizes, StudentState, Tokens, linear_window_attention

EXACT = ("chunkwise", "reference")
"""The implementations that compute in float64."""
NAMES = ("q", "k", "v", "fq", "fk", "mix", "sink_logit")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and settings of one call; features of keys are a fixed positive function of the keys."""

    kind: str = "terrace"
    window: int = 4
    tokens: int = 23
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    key_maps: int = 4
    dim: int = 6
    values: int = 5
    features: int = 8
    mask: str | None = None
    sink_logit: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """q, k, v, fq, fk, mix, sink_logit in float64."""
        make = torch.Generator().manual_seed(self.tokens * 1000 + self.window)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        q = random(self.batch, self.heads, self.tokens, self.dim)
        k = random(self.batch, self.kv_heads, self.tokens, self.dim)
        v = random(self.batch, self.kv_heads, self.tokens, self.values)
        fq = random(self.batch, self.heads, self.tokens, self.features).abs()
        return [q, k, v, fq, self.phi(k), random(self.heads), random(self.heads)]

    def phi(self, k_BGND: Tensor) -> Tensor:
        """Key features [B, K, N, F]."""
        make = torch.Generator().manual_seed(99)
        weight = torch.randn(self.key_maps, self.dim, self.features, generator=make, dtype=torch.float64)
        shared = self.key_maps // k_BGND.shape[1]
        return torch.relu(k_BGND.repeat_interleave(shared, 1) @ weight.to(k_BGND.dtype)).clamp_min(1e-12)

    @property
    def terms(self) -> int:
        """Approximate number of products summed per result: the far sums, and the window over the heads that share its
        keys."""
        return self.tokens * self.features + 2 * self.window * self.dim * self.heads

    def real(self) -> Tensor | None:
        """The mask, [B, T]; each row is padded differently."""
        if self.mask is None:
            return None
        mask = torch.ones(self.batch, self.tokens, dtype=torch.bool)
        for b in range(self.batch):
            pads = self.tokens * (b + 1) // (2 * self.batch)
            if self.mask == "left":
                mask[b, :pads] = False
            elif self.mask == "right":
                mask[b, self.tokens - pads :] = False
            else:
                mask[b] = torch.rand(self.tokens, generator=torch.Generator().manual_seed(b)) > 0.3
        return mask

    @property
    def rule(self) -> Rule:
        """The operator's settings."""
        return Rule(kind=self.kind, window=self.window, scale=0.7, **self.options)  # type: ignore[arg-type]

    def inputs(self, tensors: Sequence[Tensor], span: slice = slice(None)) -> tuple[Tokens, Features, HeadWeights]:
        """Inputs of the operator and of a decode step, for the tokens `span`."""
        q, k, v, fq, fk, mix, sink = tensors
        heads = HeadWeights(mix, sink if self.sink_logit else None)
        return Tokens(q, k, v, self.real())[span], Features(fq, fk, self.phi)[span], heads

    def empty(self, dtype: torch.dtype = torch.float64) -> StudentState:
        """The state before the first token."""
        sizes = StateSizes(
            kv_heads=self.kv_heads, key_maps=self.key_maps, key_dim=self.dim, value_dim=self.values,
            features=self.features,
        )  # fmt: skip
        return StudentState.empty(self.batch, self.rule, sizes, dtype=dtype)

    def call(
        self,
        tensors: Sequence[Tensor],
        *,
        impl: str,
        span: slice = slice(None),
        state: StudentState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, StudentState | None]:
        """Run the operator on tokens `span`."""
        if return_state and state is None:
            state = self.empty(tensors[1].dtype)
        return linear_window_attention(*self.inputs(tensors, span), self.rule, state=state, impl=impl)

    def results(self, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The output, and the gradients of a random projection of it, in float64."""
        tensors = [t.to(dtype).requires_grad_() for t in self.tensors()]
        y, _ = self.call(tensors, impl=impl)
        projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        grads = torch.autograd.grad((y * projection.to(dtype)).sum(), tensors, allow_unused=True)
        found = {"y": y.detach().double()}
        for name, tensor, grad in zip(NAMES, tensors, grads, strict=True):
            found[f"d{name}"] = torch.zeros_like(tensor).double() if grad is None else grad.double()
        return found


def variants(kind: str) -> list[Case]:
    """The settings every kind is tested with."""
    base = Case(kind=kind)
    cases = [
        base,
        replace(base, key_maps=2),
        replace(base, kv_heads=4),
        replace(base, kv_heads=1, key_maps=1),
        replace(base, options={"affine": True}),
        replace(base, options={"softcap": 2.0}),
        replace(base, sink_logit=True),
        replace(base, window=1),
        replace(base, window=16),
        *(replace(base, mask=mask) for mask in ("left", "right", "odd")),
    ]
    if kind != "linear":
        everything = {"sinks": 6, "softcap": 3.0, "affine": True}
        cases += [
            replace(base, options={"sinks": 2}),
            replace(base, options=everything, sink_logit=True, key_maps=2, mask="odd"),
            replace(base, options={"far": False}),
            replace(base, options={"far": False, "sinks": 3}, sink_logit=True, mask="left"),
        ]
    return cases


def label(case: Case) -> str:
    """A test id."""
    plain = Case(kind=case.kind)
    parts = [case.kind]
    for name in ("window", "tokens", "kv_heads", "key_maps", "mask", "sink_logit"):
        if getattr(case, name) != getattr(plain, name):
            parts.append(f"{name}={getattr(case, name)}")
    parts += [f"{name}={value}" for name, value in case.options.items()]
    return ",".join(parts)


def error(found: Tensor, exact: Tensor) -> float:
    """Largest deviation over the largest value (or 0.25, as inputs are of unit size); infinite for NaN."""
    if exact.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    found, exact = found.detach(), exact.detach()
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(0.25))


def budget(independent: float, terms: int) -> float:
    """Error allowed for a float32 run: 8 times that of an independent float32 run of the reference on the same inputs,
    or that of `terms` random roundings, whichever is larger."""
    rounding = float(torch.finfo(torch.float32).eps)
    return max(8 * independent, 4 * rounding * terms**0.5)


def compare(case: Case, impl: str, *, double: bool = True, single: bool = True) -> None:
    """Outputs and every gradient of `impl` equal those of the reference: to 1e-10 in float64, in float32 within the
    budget of an independent run."""
    exact = case.results("reference", torch.float64)
    if double:
        found = case.results(impl, torch.float64)
        for name, value in exact.items():
            assert error(found[name], value) < 1e-10, (name, label(case))
    if not single:
        return
    independent = case.results("reference", torch.float32)
    found = case.results(impl, torch.float32)
    for name, value in exact.items():
        allowed = budget(error(independent[name], value), case.terms)
        assert error(found[name], value) <= allowed, (name, label(case))

"""The self-check at the first use in a process: small cases through every pass, and through decoding, against the
definitions in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from trenchcoat.ops.compiled.attention import GatedRows, attend, transfer_error
from trenchcoat.ops.compiled.call import kernels
from trenchcoat.ops.compiled.decode import Gates, decode
from trenchcoat.ops.recurrences import gated_far
from trenchcoat.ops.reference import attention_outputs
from trenchcoat.ops.state import (
    Features,
    FusedMap,
    FusedMaps,
    GatedState,
    HeadWeights,
    Rule,
    StateSizes,
    StudentState,
    Tokens,
)

NAMES = ("q", "k", "v", "the query map", "the key map", "the mix")
TOKENS = 41
"""Of a case: several chunks, and a last one that is not full."""
ALLOWED = 64 * float(torch.finfo(torch.float32).eps)
"""Relative to the largest number of a result: a sum of the cases has at most TOKENS x F = 1312 terms, whose random
roundings add up to 36 units in the last place; a wrong term is thousands of times as large."""


CAP = 2.0
"""Of the logarithm of an input gate."""


@dataclass(frozen=True)
class _Case:
    heads: int
    kv_heads: int
    dim: int
    columns: int
    rule: Rule

    def leaves(self) -> list[Tensor]:
        """q, k, v, query map, key map, mix, a projection of the output, float64."""
        make = torch.Generator().manual_seed(self.dim)
        shapes = [
            *((1, heads, TOKENS, self.dim) for heads in (self.heads, self.kv_heads, self.kv_heads)),
            *((heads, self.dim, self.columns) for heads in (self.heads, self.kv_heads)),
            (self.heads,),
            *((1, self.heads, TOKENS, self.dim),) * 2,
        ]
        return [torch.randn(shape, generator=make, dtype=torch.float64, device="cpu") for shape in shapes]

    def gates(self) -> list[Tensor]:
        """The tensors of `Gates`, float64."""
        make, maps, width = torch.Generator().manual_seed(self.columns), self.kv_heads, 2 * self.columns
        shapes = ((1, TOKENS, width), (self.heads, 3 * self.dim), *((maps, width), (maps,)) * 2)
        return [torch.randn(shape, generator=make, dtype=torch.float64, device="cpu") for shape in shapes]

    def state(self) -> GatedState:
        """That before the first token."""
        sizes = StateSizes(
            kv_heads=self.kv_heads, key_maps=self.kv_heads, key_dim=self.dim, value_dim=self.dim,
            features=2 * self.columns,
        )  # fmt: skip
        return GatedState.beside(StudentState.empty(1, self.rule, sizes, device="cpu"))


CASES = (
    _Case(2, 1, 16, 16, Rule(kind="terrace", window=8, scale=0.25)),
    _Case(2, 2, 5, 3, Rule(kind="terrace", window=3, scale=0.5, softcap=4.0, sinks=2)),
)


@lru_cache
def check() -> None:
    """Raise RuntimeError naming the first result that deviates; a passed check is not repeated in this process.

    It runs in a separate thread, so that the caller's thread-local settings (inference mode, autocast, hooks) do not
    apply.

    Raises:
        Unavailable: the kernels cannot be built here.
        RuntimeError: a result is wrong.
    """
    kernels()
    for case in CASES:
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(deviations, case).result()
        for name, deviation in found.items():
            if not deviation <= ALLOWED:
                raise RuntimeError(
                    f"the compiled kernels failed their self-check: {name} deviates by {deviation:.2g} of its largest "
                    f"number ({ALLOWED:.2g} allowed; {case}); use student.impl=chunkwise, and report the processor and "
                    "the compiler's version"
                )


def deviations(case: _Case) -> dict[str, float]:
    """Largest deviation of each result from the reference, relative to its largest number; infinite if one is not
    finite."""
    exact = case.leaves()
    want = _results(exact, case.rule, kernels=False)
    found = _results([t.float() for t in exact], case.rule, kernels=True)
    tokens, maps, heads = _inputs([t.float() for t in exact], case.rule)
    target = exact[7].float()
    total, grads = transfer_error(tokens, target, maps, heads, case.rule)
    *maps_and_mix, error = _transfer(exact, case.rule)
    want |= {"transfer's error": error}
    found |= {"transfer's error": total}
    for name, grad, exact_grad in zip(NAMES[3:], (grads[0], grads[2], grads[4]), maps_and_mix, strict=True):
        assert grad is not None
        want[f"transfer's gradient of {name}"] = exact_grad
        scale = torch.sigmoid(-exact[5]) if name == NAMES[5] else 1.0
        found[f"transfer's gradient of {name}"] = grad.double() * scale
    found["decoding"] = decode(tokens, maps, heads, [case.state()], case.rule)
    want["decoding"] = want["the output"]
    gates = case.gates()
    x, mix, forget, forget_bias, write, write_bias = (t.float() for t in gates)
    given = Gates(x, mix, forget, forget_bias, write, write_bias, CAP)
    found["gated decoding"] = decode(tokens, maps, heads, [case.state()], case.rule, gates=given)
    want["gated decoding"], rows = _gated(exact, gates, case.rule)
    with torch.no_grad():
        found["the gated output"], _ = attend(tokens, maps, heads, case.rule, gated=rows)
    want["the gated output"] = want["gated decoding"]
    return {name: _deviation(found[name], value) for name, value in want.items()}


def _deviation(found: Tensor, exact: Tensor) -> float:
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp_min(0.25))


def _inputs(leaves: list[Tensor], rule: Rule) -> tuple[Tokens, FusedMaps, HeadWeights]:
    maps = (FusedMap("softmax", True, leaves[3]), FusedMap("softmax", True, leaves[4]))
    return Tokens(*leaves[:3]), maps, HeadWeights(leaves[5])


def _outputs(leaves: list[Tensor], rule: Rule, kernels: bool) -> Tensor:
    if kernels:
        return attend(*_inputs(leaves, rule), rule)[0]
    return attention_outputs(
        Tokens(*leaves[:3]),
        Features(_phi(leaves[0], leaves[3]), _phi(leaves[1], leaves[4])),
        HeadWeights(leaves[5]),
        rule,
    )


def _phi(x: Tensor, matrix: Tensor) -> Tensor:
    u = x @ matrix
    return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1).clamp_min(1e-12)


def _gated(leaves: list[Tensor], gates: list[Tensor], rule: Rule) -> tuple[Tensor, GatedRows]:
    """The output of a gated far part and its window, by their definitions; what depends on `gates` in it."""
    (q, k, v, query, key, bias), (x, mix, *maps) = leaves[:6], gates
    heads, unit = q.shape[1], x / x.norm(dim=-1, keepdim=True)
    near = attention_outputs(Tokens(q, k, v), None, HeadWeights(bias), replace(rule, far=False))
    forget, write = (weight @ unit.mT + offset[:, None] for weight, offset in (maps[:2], maps[2:]))
    write, real = CAP * torch.tanh(write / CAP), torch.ones(1, TOKENS, dtype=torch.bool, device=x.device)
    far = gated_far(_phi(q, query), _phi(k, key), v, forget.sigmoid().log(), write, real, rule)
    parts = [q, *(t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))]
    directions = torch.cat([t / t.norm(dim=-1, keepdim=True) for t in parts], -1)
    o = ((directions * mix[:, None]).sum(-1) + bias[:, None]).sigmoid()
    o[:, :, rule.near_start(torch.arange(TOKENS, device=x.device)) <= rule.sinks] = 0.0
    rows = GatedRows(forget.sigmoid().log()[..., None], write[..., None], o)
    return near + o[..., None] * (far - near), rows


@torch.enable_grad()
def _results(leaves: list[Tensor], rule: Rule, *, kernels: bool) -> dict[str, Tensor]:
    """The output and the gradients of a projection of it."""
    x = [t.clone().requires_grad_() for t in leaves[:6]]
    y = _outputs(x, rule, kernels)
    grads = torch.autograd.grad((y * leaves[6]).sum(), x)
    names = [f"the gradient of {name}" for name in NAMES]
    return {"the output": y.detach(), **dict(zip(names, grads, strict=True))}


@torch.enable_grad()
def _transfer(leaves: list[Tensor], rule: Rule) -> list[Tensor]:
    """Gradients of query map, key map and mix, and the error, by autograd through the reference."""
    x = [*leaves[:3], *(t.clone().requires_grad_() for t in leaves[3:6])]
    error = (leaves[7] - _outputs(x, rule, kernels=False)).square().sum()
    return [*torch.autograd.grad(error, x[3:]), error.detach()]

"""The self-check of a device's first use: a small case of every kind, outputs and gradients, against the reference."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from trenchcoat.ops.reference import attention
from trenchcoat.ops.state import Kind, Rule
from trenchcoat.ops.triton import attend
from trenchcoat.ops.triton_launch import INTERPRETED, FusedMap

NAMES = ("q", "k", "v", "query map", "key map", "mix")
ALLOWED = 8 * 2.0**-8
"""Deviation over the largest value: eight roundings of bfloat16 (one of an operand each, in a row of products)."""


@lru_cache
def check(device: torch.device) -> None:
    """Raise RuntimeError naming the first mismatch; what passed is not checked again in this process."""
    kinds: tuple[Kind, ...] = ("terrace", "sliding", "linear")
    for kind in kinds:
        for name, deviation in deviations(kind, device).items():
            if not deviation <= ALLOWED:
                raise RuntimeError(
                    f"the Triton kernels failed their self-check on {device}: {name} of kind {kind!r} deviates by "
                    f"{deviation:.2g} of its largest value ({ALLOWED:.2g} allowed); use student.impl=chunkwise, and "
                    "report the device with the versions of torch and triton"
                )


def deviations(kind: Kind, device: torch.device) -> dict[str, float]:
    """Largest deviation over the largest value, for the output and every gradient."""
    tokens, window, dim = (9, 4, 8) if INTERPRETED else (200, 64, 64)
    rule = Rule(kind=kind, window=window, scale=dim**-0.5)
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(torch.bfloat16).float().to(device)

    sizes = [(2, tokens, dim), (1, tokens, dim), (1, tokens, dim)]
    leaves = [random(1, *size) for size in sizes]
    leaves += [random(heads, dim, dim) * dim**-0.5 for heads in (2, 1)] + [random(2)]
    projection = random(1, 2, tokens, dim)
    expected = _with_gradients(leaves, projection, lambda x: _reference(x, rule))
    found = _with_gradients(leaves, projection, lambda x: _kernels(x, rule))
    return {
        name: float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) if bool(torch.isfinite(a).all()) else torch.inf
        for name, a, b in zip(("the output", *(f"the gradient of {n}" for n in NAMES)), found, expected, strict=True)
    }


def _with_gradients(leaves: list[Tensor], projection: Tensor, run: object) -> list[Tensor]:
    with torch.enable_grad():
        x = [t.clone().requires_grad_() for t in leaves]
        y: Tensor = run(x)  # type: ignore[operator]
        grads = torch.autograd.grad((y.float() * projection).sum(), x, allow_unused=True)
    return [y.detach().float(), *(torch.zeros_like(t) if g is None else g for t, g in zip(x, grads, strict=True))]


def _kernels(x: list[Tensor], rule: Rule) -> Tensor:
    q, k, v = (t.to(torch.bfloat16) for t in x[:3])
    maps = [FusedMap("hedgehog", t) for t in x[3:5]]
    return attend(q, k, v, maps[0], maps[1], rule.log_ratio(x[5]), rule=rule)[0]


def _reference(x: list[Tensor], rule: Rule) -> Tensor:
    def phi(t: Tensor, matrix: Tensor) -> Tensor:
        u = t @ matrix
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1).clamp_min(1e-12)

    return attention(x[0], x[1], x[2], phi(x[0], x[3]), phi(x[1], x[4]), x[5], rule=rule)

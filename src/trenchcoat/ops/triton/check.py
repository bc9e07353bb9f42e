"""The self-check at a device's first use: a small case of every kind through every pass, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor
from triton.errors import TritonError

from trenchcoat.ops.crossent import attention_cross_entropy
from trenchcoat.ops.reference import attention_outputs
from trenchcoat.ops.state import (
    Features,
    FusedMap,
    FusedMaps,
    HeadWeights,
    Kind,
    Rule,
    StateSizes,
    StudentState,
    Tokens,
)
from trenchcoat.ops.triton.attention import attend, transfer_error
from trenchcoat.ops.triton.crossent_launch import cross_entropy
from trenchcoat.ops.triton.decode import decode

TOKENS, WINDOW, DIM, PREFILLED = 200, 64, 64, 191
"""Sizes of the case: two heads that share keys. Decoding runs from a prefill to the first token of a new chunk."""

NAMES = (
    "the output",
    *(f"the backward's gradient of {name}" for name in ("q", "k", "v", "the query map", "the key map", "the mix")),
    "transfer's squared error",
    *(f"transfer's gradient of {name}" for name in ("the query map", "the key map", "the mix")),
    "the output of two decode steps",
    "the cross-entropy of attention rows",
    *(f"the cross-entropy's gradient of {name}" for name in ("the query map", "the key map", "log(g / l)")),
)
KINDS: tuple[Kind, ...] = ("terrace", "sliding", "linear")
MAPS: dict[Kind, str] = {"terrace": "hedgehog", "sliding": "exp", "linear": "hedgehog"}
ALLOWED: dict[Kind, tuple[float, ...]] = {
    "terrace": (
        0.016, 0.023, 0.032, 0.037, 0.0063, 0.0092, 0.03, 0.66, 0.011, 0.0099, 0.034, 0.0024,
        0.0033, 0.0017, 0.0014, 0.0026,
    ),
    "sliding": (
        0.016, 0.027, 0.045, 0.043, 0.086, 0.14, 0.12, 0.53, 0.33, 0.64, 0.23, 0.0019,
        0.011, 0.014, 0.056, 0.0012,
    ),
    "linear": (0.016, 0.007, 0.011, 0.047, 0.054, 0.045, 0, 0.26, 0.15, 0.26, 0, 0.0019, 0.0082, 0.0083, 0.005, 0),
}  # fmt: skip
"""Tolerances for :data:`NAMES`: twice the largest deviation of an independent bfloat16 run over 24 random calls of this
case (`tests/low_precision.py` explains the factor, `tests/ops/test_triton_check.py` recomputes them). That run rounds
the operands of every product, forward and backward, and stored tensors; everything else is exact."""


@lru_cache
def check(device: torch.device) -> None:
    """Raise RuntimeError naming the first mismatch or the kernel that does not compile. Passed checks are not repeated
    in this process.

    It runs in a separate thread, so that the caller's thread-local settings (inference mode, autocast, saved-tensor
    hooks of a checkpointed layer) do not apply.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the Triton kernels are checked at their first use on {device}, which a CUDA graph cannot capture; run "
            "one step before the capture"
        )
    for kind in KINDS:
        try:
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(deviations, kind, device).result()
        except TritonError as error:
            raise _failure(device, f"a kernel of kind {kind!r} does not compile or start ({error})") from error
        for name, deviation, allowed in zip(NAMES, found, ALLOWED[kind], strict=True):
            if not deviation <= allowed:
                said = f"{name} of kind {kind!r} deviates by {deviation:.2g} ({allowed:.2g} allowed)"
                raise _failure(device, said)


def _failure(device: torch.device, what: str) -> RuntimeError:
    return RuntimeError(
        f"the Triton kernels failed their self-check on {device}: {what}; use student.impl=chunkwise, and report the "
        "device with the versions of torch and triton"
    )


def deviations(kind: Kind, device: torch.device) -> list[float]:
    """Largest deviation of each result in :data:`NAMES` from the reference, which runs in float64 on the CPU; infinite
    if a number is not finite."""
    rule = rule_of(kind)
    exact = [t.double() for t in case(0)]
    expected = passes(exact, lambda x: reference(x, rule))
    expected += [expected[0][:, :, PREFILLED : PREFILLED + 2], *reference_rows(exact, rule)]
    leaves = [t.to(device) for t in case(0)]
    found = passes(leaves, lambda x: _kernels(x, rule))
    found[7:] = _transfer(leaves, rule)
    found += [_decode(leaves, rule), *_rows(leaves, rule)]
    return [
        float((a.cpu() - b).abs().max()) if bool(torch.isfinite(a).all()) else torch.inf
        for a, b in zip(found, expected, strict=True)
    ]


def rule_of(kind: Kind) -> Rule:
    """The case's settings."""
    return Rule(kind=kind, window=WINDOW, scale=DIM**-0.5)


def case(seed: int) -> list[Tensor]:
    """q, k, v, query map, key map, mix, a projection of the output, a teacher's output; float32, but with bfloat16
    values for what the kernels get in 16 bits."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        """Normal numbers, the same on every machine."""
        return torch.randn(*shape, generator=make, device="cpu", dtype=torch.float32)

    q, k, v = (random(1, heads, TOKENS, DIM).bfloat16().float() for heads in (2, 1, 1))
    maps = [random(heads, DIM, DIM) * DIM**-0.5 for heads in (2, 1)]
    outputs = [random(1, 2, TOKENS, DIM).bfloat16().float() for _ in range(2)]
    return [q, k, v, *maps, random(2), *outputs]


def passes(leaves: list[Tensor], run: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
    """The first eleven of :data:`NAMES`, by autograd through `run`, which computes y from the first six leaves."""
    with torch.enable_grad():
        x = [t.clone().requires_grad_() for t in leaves[:6]]
        y = run(x)
        grads = torch.autograd.grad((y * leaves[6]).sum(), x, allow_unused=True, retain_graph=True)
        error = (y - leaves[7]).square().sum()
        learned = torch.autograd.grad(error, x[3:], allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(x + x[3:], (*grads, *learned), strict=True)]
    return [y.detach(), *filled[:6], error.detach(), *filled[6:]]


def _inputs(leaves: list[Tensor], rule: Rule) -> tuple[Tokens, FusedMaps, HeadWeights]:
    act = "softmax" if MAPS[rule.kind] == "hedgehog" else "exp"
    query, key = (FusedMap(act, True, matrix) for matrix in leaves[3:5])
    return Tokens(*(t.to(torch.bfloat16) for t in leaves[:3])), (query, key), HeadWeights(leaves[5])


def _kernels(x: list[Tensor], rule: Rule) -> Tensor:
    return attend(*_inputs(x, rule), rule)[0].float()


def _transfer(leaves: list[Tensor], rule: Rule) -> list[Tensor]:
    tokens, maps, heads = _inputs(leaves, rule)
    error, grads = transfer_error(tokens, leaves[7].to(torch.bfloat16), maps, heads, rule)
    query, _, key, _, dlog = grads
    assert query is not None and key is not None and dlog is not None  # noqa: PT018
    return [error, query, key, dlog * torch.sigmoid(-leaves[5])]


def _decode(leaves: list[Tensor], rule: Rule) -> Tensor:
    """y of two tokens after a prefill."""
    tokens, maps, heads = _inputs(leaves, rule)
    sizes = StateSizes(kv_heads=1, key_maps=1, key_dim=DIM, value_dim=DIM, features=2 * DIM)
    empty = StudentState.empty(1, rule, sizes, dtype=torch.bfloat16, device=leaves[0].device)
    _, state = attend(tokens[:PREFILLED], maps, heads, rule, state=empty)
    assert state is not None
    steps = [decode(tokens[t : t + 1], maps, heads, state, rule) for t in (PREFILLED, PREFILLED + 1)]
    return torch.cat(steps, 2).float()


def _rows(leaves: list[Tensor], rule: Rule) -> list[Tensor]:
    total, grads = cross_entropy(*_inputs(leaves, rule), rule)
    return [total, *(g for g in grads if g is not None)]


def _phi(x: Tensor, matrix: Tensor, rule: Rule) -> Tensor:
    u = x @ matrix
    halves = torch.stack([u, -u])
    if MAPS[rule.kind] == "hedgehog":
        halves = halves.softmax(-1)
    else:
        halves = (halves - halves.amax(-1, keepdim=True)).exp()
    return torch.cat([halves[0], halves[1]], -1).clamp_min(1e-12)


def reference(x: list[Tensor], rule: Rule) -> Tensor:
    """y of the quadratic reference."""
    features = Features(_phi(x[0], x[3], rule), _phi(x[1], x[4], rule))
    return attention_outputs(Tokens(*x[:3]), features, HeadWeights(x[5]), rule)


def reference_rows(leaves: list[Tensor], rule: Rule) -> list[Tensor]:
    """The cross-entropy and its gradients of query map, key map and log(g / l), by the blockwise code."""
    maps = [t.clone().requires_grad_() for t in leaves[3:5]]
    with torch.enable_grad():
        fq, fk = (_phi(x, matrix, rule) for x, matrix in zip(leaves[:2], maps, strict=True))
    features = Features(fq.detach(), fk.detach())
    total, found = attention_cross_entropy(Tokens(*leaves[:3]), features, HeadWeights(leaves[5]), rule)
    assert found is not None
    return [total, *torch.autograd.grad((fq, fk), maps, found[:2]), found[2]]

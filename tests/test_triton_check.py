"""The self-check finds what is wrong with the kernels of a device, and its tolerances are those of an honest run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_kit import DEVICE
from low_precision import DRAWS, LowPrecision, tolerances
from trenchcoat.ops import triton_check
from trenchcoat.ops.state import Kind


def derived(kind: Kind, draws: int) -> list[float]:
    """The tolerances of `kind` from `draws` random calls; with `DRAWS` of them, what ALLOWED says."""
    rule = triton_check.rule_of(kind)
    runs = {store: LowPrecision(rule=rule, map="hedgehog", dtype=torch.bfloat16, store=store) for store in (True, False)}

    def rounded(x: list[Tensor], store: bool) -> Tensor:
        names = ("q", "k", "v", "query_matrix", "key_matrix", "mix")
        leaves = dict(zip(names, x, strict=True))
        none = {f"{side}_bias": x[3][:, 0] for side in ("query", "key")}
        return runs[store]({**leaves, **none})

    pairs = []
    for seed in range(1, draws + 1):
        leaves = [t.double() for t in triton_check.case(seed)]
        exact = triton_check.passes(leaves, lambda x: triton_check.reference(x, rule))
        output = triton_check.passes(leaves, lambda x: rounded(x, True))
        transfer = triton_check.passes(leaves, lambda x: rounded(x, False))
        found = [*output[:7], *transfer[7:]]
        step = slice(triton_check.PREFILLED, triton_check.PREFILLED + 2)
        steps = (x[0][:, :, step] for x in (found, exact))
        both = [[*x, y] for x, y in zip((found, exact), steps, strict=True)]
        pairs.append(tuple(dict(zip(triton_check.NAMES, x, strict=True)) for x in both))
    allowed = tolerances(pairs)  # type: ignore[arg-type]
    return [allowed[name] for name in triton_check.NAMES]

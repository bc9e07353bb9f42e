"""The Triton decode step continues a state as the reference does, one and several tokens at a time, in place."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernel_kit import DEVICE, KernelCase
from operator_kit import budget, error
from trenchcoat.ops import StudentState, triton_decode

BASE = KernelCase(tokens=11, window=3, heads=2, key_maps=1, batch=1)
CASES = [
    BASE,
    replace(BASE, key_maps=2, options={"sinks": 2, "softcap": 2.0}, sink_logit=True, mask="left", batch=2, map="t2r"),
    replace(BASE, kind="sliding", map="exp_half", bias=True, batch=2, mask="odd"),
    replace(BASE, kind="linear", kv_heads=2, key_maps=2),
    replace(BASE, options={"far": False, "sinks": 4}),
]


@pytest.mark.parametrize(("case", "step"), [*((case, 3) for case in CASES), (BASE, 1)])
def test_decoding_from_nothing_equals_the_row(case: KernelCase, step: int) -> None:
    whole, independent = (case.reference(dtype)["y"] for dtype in (torch.float64, torch.float32))
    leaves = {name: t.detach() for name, t in case.leaves(torch.float32).items()}
    mask = case.real()
    paired = 2 if case.map in ("hedgehog", "exp") else 1
    state = StudentState.empty(
        case.batch, rule=case.rule, kv_heads=case.kv_heads, key_map_heads=case.key_maps, key_dim=case.dim,
        value_dim=case.values, features=paired * case.columns, device=DEVICE,
    )  # fmt: skip
    places = {name: t.data_ptr() for name, t in state.tensors().items()}
    for start in range(0, case.tokens, step):
        span = slice(start, start + step)
        y = triton_decode.decode(
            *(leaves[name][:, :, span] for name in "qkv"), *case.maps(leaves), case.rule.log_ratio(leaves["mix"]),
            state, rule=case.rule, sink_logit_H=leaves["sink_logit"] if case.sink_logit else None,
            mask_BT=None if mask is None else mask[:, span],
        )  # fmt: skip
        allowed = budget(error(independent, whole), case.terms)
        assert error(y, whole[:, :, span]) <= allowed, start
    assert places == {name: t.data_ptr() for name, t in state.tensors().items()}


def test_triton_is_imported_only_when_asked_for() -> None:
    code = "import sys, trenchcoat, trenchcoat.students; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

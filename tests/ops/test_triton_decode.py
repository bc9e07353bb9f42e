"""The Triton decode step continues a state like the reference, one or several tokens at a time, in place."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernel_kit import DEVICE, KernelCase, output_tolerances, poison
from operator_kit import budget, error
from trenchcoat.ops import Features, StateSizes, StudentState
from trenchcoat.ops.decode import decode as torch_decode
from trenchcoat.ops.triton import decode

BASE = KernelCase(tokens=11, window=3, heads=2, key_maps=1, batch=1)
CASES = [
    BASE,
    replace(BASE, key_maps=2, options={"sinks": 2, "softcap": 2.0}, sink_logit=True, mask="left", batch=2, map="t2r"),
    replace(BASE, kind="sliding", map="exp_half", bias=True, batch=2, mask="odd"),
    replace(BASE, kind="linear", kv_heads=2, key_maps=2),
    replace(BASE, options={"far": False, "sinks": 4}),
    replace(BASE, tokens=8, dim=200, values=70, columns=200),
]


def _state(case: KernelCase, dtype: torch.dtype = torch.float32, far: torch.dtype | None = None) -> StudentState:
    paired = 2 if case.map in ("hedgehog", "exp") else 1
    sizes = StateSizes(
        kv_heads=case.kv_heads, key_maps=case.key_maps, key_dim=case.dim, value_dim=case.values,
        features=paired * case.columns,
    )  # fmt: skip
    return StudentState.empty(case.batch, case.rule, sizes, dtype=dtype, far_dtype=far, device=DEVICE)


def _decode(
    case: KernelCase, state: StudentState, step: int, dtype: torch.dtype = torch.float32, impl: str = "triton"
) -> torch.Tensor:
    """y of all tokens, `step` tokens per call."""
    leaves = {name: t.detach() for name, t in case.leaves(torch.float32).items()}
    whole, heads, found = case.qkv(leaves, dtype), case.weights(leaves), []
    phi_q, phi_k = (case.phi(leaves, side) for side in ("query", "key"))
    for start in range(0, case.tokens, step):
        tokens = whole[start : start + step]
        if impl == "triton":
            found.append(decode.decode(tokens, case.maps(leaves), heads, state, case.rule))
        else:
            fk = phi_k(tokens.k_BGTD.float()) if case.kind == "linear" else None
            features = Features(phi_q(tokens.q_BHTD.float()), fk, lambda x: phi_k(x.float()))
            found.append(torch_decode(tokens, features, heads, state, case.rule))
    return torch.cat(found, 2)


@pytest.mark.parametrize(
    ("case", "step"), [*((case, 3) for case in CASES), (BASE, 1), (CASES[2], 5), (replace(BASE, window=5), 5)]
)
def test_decoding_from_nothing_equals_the_row(case: KernelCase, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, row by row and in tiles, also more tokens than a window; unwritten memory is NaN."""
    whole, independent = (case.reference(dtype)["y"] for dtype in (torch.float64, torch.float32))
    state = _state(case)
    assert state.positions() == [0] * case.batch
    places = {name: t.data_ptr() for name, t in state.tensors().items()}
    poison(monkeypatch)
    y = _decode(case, state, step)
    assert error(y, whole) <= budget(error(independent, whole), case.terms)
    assert places == {name: t.data_ptr() for name, t in state.tensors().items()}
    assert state.positions() == state.seen_B.tolist()


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_low_precision(kind: str, step: int) -> None:
    """Inputs and buffers in bfloat16, the sum in float32; tolerances from the independent 16-bit run."""
    case = KernelCase(kind=kind, tokens=20, window=4, batch=1, heads=4, key_maps=1, dim=16, values=16, columns=16)
    y = _decode(case, _state(case, torch.bfloat16), step, torch.bfloat16)
    assert float((y - case.reference(torch.float64)["y"]).abs().max()) <= output_tolerances(case, torch.bfloat16)["y"]


@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_a_bfloat16_sum_is_rounded_as_elsewhere(kind: str) -> None:
    """The same values as the PyTorch step at every token, except where float32 round-off crosses a rounding
    threshold."""
    case = KernelCase(kind=kind, tokens=13, window=3, batch=1, heads=1, key_maps=1)
    states = [_state(case, torch.bfloat16, torch.bfloat16) for _ in range(2)]
    for state, impl in zip(states, ("triton", "torch"), strict=True):
        _decode(case, state, 1, impl=impl)
        assert state.far_s_BKFE.dtype == torch.bfloat16
    found, expected = (state.far_s_BKFE.float() for state in states)
    assert float((found == expected).float().mean()) >= 0.95
    assert float((found - expected).abs().max()) <= 2.0**-7 * float(expected.abs().max())


def test_triton_is_imported_only_on_request() -> None:
    code = "import sys, trenchcoat, trenchcoat.students; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The self-check finds errors of the kernels on a device, and its tolerances are those of the independent run."""

from __future__ import annotations

import re

import pytest
import torch
import triton
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernel_kit import DEVICE
from low_precision import DRAWS, LowPrecision, tolerances
from trenchcoat.ops.state import Kind
from trenchcoat.ops.triton import check


def _gradients(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


def derived(kind: Kind, draws: int) -> list[float]:
    """The tolerances of `kind` from `draws` random calls; with `DRAWS` of them, the values in ALLOWED."""
    rule = check.rule_of(kind)
    runs = {
        store: LowPrecision(rule=rule, map=check.MAPS[kind], dtype=torch.bfloat16, store=store)
        for store in (True, False)
    }

    def rounded(x: list[Tensor], store: bool) -> Tensor:
        names = ("q", "k", "v", "query_matrix", "key_matrix", "mix")
        leaves = dict(zip(names, x, strict=True))
        none = {f"{side}_bias": x[3][:, 0] for side in ("query", "key")}
        return runs[store]({**leaves, **none})

    pairs = []
    for seed in range(1, draws + 1):
        leaves = [t.double() for t in check.case(seed)]
        exact = check.passes(leaves, lambda x: check.reference(x, rule))
        exact_rows = check.reference_rows(leaves, rule)
        output = check.passes(leaves, lambda x: rounded(x, True))
        transfer = check.passes(leaves, lambda x: rounded(x, False))
        found = [*output[:7], *transfer[7:]]
        # in float32: a sum of 400 terms is accurate to six digits in any float32 implementation
        leaves, log_ratio = [t.float() for t in leaves], rule.log_ratio(leaves[5]).float()
        rows = [t.clone().requires_grad_() for t in (*leaves[3:5], log_ratio)]
        named = {"q": leaves[0], "k": leaves[1], "query_matrix": rows[0], "key_matrix": rows[1]}
        total = runs[True].cross_entropy({**named, "query_bias": rows[0][:, 0], "key_bias": rows[1][:, 0]}, rows[2])
        learned = [total.detach(), *_gradients(total, rows)]
        step = slice(check.PREFILLED, check.PREFILLED + 2)
        steps = (x[0][:, :, step] for x in (found, exact))
        lists = zip((found, exact), steps, (learned, exact_rows), strict=True)
        both = [[*x, y, *z] for x, y, z in lists]
        pairs.append(tuple(dict(zip(check.NAMES, x, strict=True)) for x in both))
    allowed = tolerances(pairs)  # type: ignore[arg-type]
    return [allowed[name] for name in check.NAMES]


def test_the_self_check_passes() -> None:
    check.check.cache_clear()
    check.check(torch.device(DEVICE))


def test_a_wrong_result_of_any_pass_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """All outputs are 10 % too large."""
    kernels, transfer = check._kernels, check._transfer
    decode, rows = check._decode, check._rows
    monkeypatch.setattr(check, "_kernels", lambda x, rule: 1.1 * kernels(x, rule))
    monkeypatch.setattr(check, "_transfer", lambda x, rule: [1.1 * t for t in transfer(x, rule)])
    monkeypatch.setattr(check, "_decode", lambda x, rule: 1.1 * decode(x, rule))
    monkeypatch.setattr(check, "_rows", lambda x, rule: [1.1 * t for t in rows(x, rule)])
    found = check.deviations("terrace", torch.device(DEVICE))
    for name, deviation, allowed in zip(check.NAMES, found, check.ALLOWED["terrace"], strict=True):
        assert deviation > allowed, name


@pytest.mark.parametrize("name", check.NAMES)
def test_the_error_says_which_pass_deviates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [float("inf") if n == name else 0.0 for n in check.NAMES]
    monkeypatch.setattr(check, "deviations", lambda kind, device: [0.0] * len(wrong) if kind != "linear" else wrong)
    check.check.cache_clear()
    with pytest.raises(RuntimeError, match=rf"self-check.*{re.escape(name)} of kind 'linear'.*chunkwise"):
        check.check(torch.device(DEVICE))
    check.check.cache_clear()


def test_the_error_names_what_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(kind: Kind, device: torch.device) -> list[float]:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(check, "deviations", fails)
    check.check.cache_clear()
    with pytest.raises(RuntimeError, match=r"self-check.*'terrace' does not compile or start.*300000.*chunkwise"):
        check.check(torch.device(DEVICE))
    check.check.cache_clear()


def test_the_tolerances_are_derived() -> None:
    """All draws for the fast kind; some draws for the others, which must be below the stored values, but not far
    below."""
    assert derived("terrace", DRAWS) == pytest.approx(check.ALLOWED["terrace"], rel=0.1)
    for kind in ("sliding", "linear"):
        for name, some, written in zip(check.NAMES, derived(kind, 3), check.ALLOWED[kind], strict=True):
            assert some <= 1.1 * written, (kind, name)
            assert some >= 0.05 * written, (kind, name)


def test_the_callers_settings_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check also does not affect a checkpointed layer, which would count the tensors saved by it. One kind is
    enough: they all run in one way."""
    monkeypatch.setattr(check, "KINDS", ("linear",))
    check.check.cache_clear()
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        check.check(torch.device(DEVICE))
    check.check.cache_clear()

    def layer(x: Tensor) -> Tensor:
        check.check(torch.device(DEVICE))
        return x.square().sum()

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).backward()
    assert torch.equal(x.grad, 2 * x.detach())
    check.check.cache_clear()

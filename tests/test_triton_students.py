"""Students on the Triton kernels compute, learn and generate as on the chunkwise implementation."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from kernel_kit import DEVICE
from operator_kit import error
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.ops import triton_check
from trenchcoat.ops.triton_launch import INTERPRETED
from trenchcoat.students import StudentAttention, TransferRequest, build_student, fused

TOLERANCE = 1e-5
"""float32 inputs: both are within their own budgets of the exact result; scores here are of unit size."""
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def _pair(kind: str, **more: object) -> tuple[StudentAttention, StudentAttention]:
    students = []
    for impl in ("chunkwise", "triton"):
        torch.manual_seed(1)
        phi = FeatureMapConfig(feature_dim=6, skip=True, init="kaiming", bias=True)
        cfg = StudentConfig(name=kind, window=3, feature_map=phi, impl=impl, **more)  # type: ignore[arg-type]
        students.append(build_student(cfg, num_heads=2, num_kv_heads=1, head_dim=6).to(DEVICE))
    return students[0], students[1]


def _inputs(tokens: int) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(1, heads, tokens, 6, device=DEVICE) for heads in (2, 1, 1, 2)]


@pytest.fixture
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "check", lambda device: None)


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("kind", ["terrace", "linear"])
def test_one_function(kind: str) -> None:
    q, k, v, y = _inputs(8)
    found = []
    for student in _pair(kind, key_maps="per_kv_head"):
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        out, _ = student(*x, scale=0.4)
        out.square().sum().backward()
        learned = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        student.zero_grad()
        student.request = TransferRequest(mse_weight=10.0)
        student.transfer(q, k, v, y, scale=0.4)
        learned += [p.grad for p in student.parameters() if p.grad is not None]
        found.append([out, *(t.grad for t in x), *learned, student.metrics["mse"]])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert error(b, a) <= TOLERANCE


@pytest.mark.usefixtures("_checked")
def test_prefill_and_decode() -> None:
    q, k, v, _ = _inputs(11)
    found = []
    for student in _pair("terrace", sinks=1):
        y, state = student(q[:, :, :7], k[:, :, :7], v[:, :, :7], scale=0.4, return_state=True)
        steps = [student.decode(*(x[:, :, 7:] for x in (q, k, v)), state=state, scale=0.4)]
        found.append(torch.cat([y, *steps], 2))
    assert error(found[1], found[0]) <= TOLERANCE


def test_the_choice_is_said_and_refusals_too(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "check", lambda device: None)
    monkeypatch.setattr(fused, "_told", set())
    student = build_student(
        StudentConfig(impl="triton", feature_map=FeatureMapConfig(feature_dim=6, adapter_dim=2)),
        num_heads=2, num_kv_heads=1, head_dim=6,
    ).to(DEVICE)  # fmt: skip
    q, k, v, _ = _inputs(4)
    with pytest.raises(ValueError, match="adapter"):
        student(q, k, v, scale=1.0)
    with caplog.at_level(logging.INFO, logger="trenchcoat"):
        assert fused.implementation("auto", torch.device(DEVICE)) == "triton"
        assert fused.implementation("auto", torch.device(DEVICE), student.query_map) == "chunkwise"
    assert "triton" in caplog.text
    assert "adapter" in caplog.text
    monkeypatch.setattr(fused, "_installed", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        fused.implementation("triton", torch.device(DEVICE))
    assert fused.implementation("chunkwise", torch.device(DEVICE)) == "chunkwise"


@NEEDS_GPU
@pytest.mark.gpu
def test_twenty_runs_are_equal() -> None:
    """No race: twenty runs of a larger case give the same bits."""
    assert not INTERPRETED
    torch.manual_seed(0)
    phi = FeatureMapConfig(feature_dim=64)
    cfg = StudentConfig(feature_map=phi, impl="triton")
    student = build_student(cfg, num_heads=8, num_kv_heads=2, head_dim=128).to(DEVICE)
    x = [torch.randn(2, h, 1500, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2)]
    first: list[Tensor] = []
    for _ in range(20):
        y, _ = student(*x, scale=128**-0.5)
        grads = torch.autograd.grad(y.float().square().sum(), [*x, *student.parameters()])
        if first:
            assert all(torch.equal(a, b) for a, b in zip((y, *grads), first, strict=True))
        first = [y, *grads]

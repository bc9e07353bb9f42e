"""Students on the Triton kernels compute, learn and generate the same as on the chunkwise implementation."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_kit import DEVICE
from operator_kit import error
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.ops.compiled.build import compiler
from trenchcoat.ops.triton import assembler, check
from trenchcoat.ops.triton.launch import INTERPRETED
from trenchcoat.students import StudentAttention, TransferRequest, build_student, fused, operator_of

TOLERANCE = 1e-5
"""float32 inputs: both are within their error budgets of the exact result; scores are of unit size here."""
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
    monkeypatch.setattr(check, "check", lambda device: None)


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
        empty = student.empty_state(1, dtype=q.dtype, device=DEVICE)
        y, state = student(q[:, :, :7], k[:, :, :7], v[:, :, :7], scale=0.4, state=empty)
        steps = [student.decode(*(x[:, :, 7:] for x in (q, k, v)), state=state, scale=0.4)]
        found.append(torch.cat([y, *steps], 2))
    assert error(found[1], found[0]) <= TOLERANCE


def test_the_choice_is_logged_and_unsupported_options_are_errors(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "check", lambda device: None)
    monkeypatch.setattr(fused, "_reported", set())
    student = build_student(
        StudentConfig(impl="triton", feature_map=FeatureMapConfig(feature_dim=6, adapter_dim=2)),
        num_heads=2, num_kv_heads=1, head_dim=6,
    ).to(DEVICE)  # fmt: skip
    q, k, v, _ = _inputs(4)
    with pytest.raises(ValueError, match="adapter"):
        student(q, k, v, scale=1.0)
    with caplog.at_level(logging.INFO, logger="trenchcoat"):
        plain = build_student(StudentConfig(impl="triton"), num_heads=2, num_kv_heads=1, head_dim=6)
        assert plain.implementation(torch.float32, torch.device(DEVICE)) == "triton"
    assert f"{DEVICE}: triton" in caplog.text.replace("cuda:0", "cuda")
    monkeypatch.setattr(fused, "_installed", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        plain.implementation(torch.float32, torch.device(DEVICE))


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        ({}, torch.bfloat16, None),
        ({"feature_map": FeatureMapConfig(adapter_dim=2)}, torch.bfloat16, "adapter"),
        ({"window": 129}, torch.bfloat16, "window is 129"),
        ({"feature_map": FeatureMapConfig(feature_dim=256)}, torch.bfloat16, None),
        ({"feature_map": FeatureMapConfig(feature_dim=300)}, torch.bfloat16, "feature_dim is 300"),
        ({}, torch.float64, "float64"),
        ({}, torch.float32, "in float32 the kernels multiply without tensor cores"),
        ({"name": "window_sinks", "sinks": 65}, torch.bfloat16, "sinks is 65"),
    ],
)
def test_auto_uses_what_can_run_and_logs_why(
    change: dict[str, Any],
    dtype: torch.dtype,
    reason: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`meta` acts as a GPU with the capability and shared memory of Hopper."""

    class FakeDevice:
        type, index = "cuda", 0

        def __str__(self) -> str:
            return "cuda:0"

    monkeypatch.setattr(fused, "_reported", set())
    monkeypatch.setattr(check, "check", lambda device: None)
    monkeypatch.setattr(assembler, "obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    empty = torch.empty
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="trenchcoat"):
        patch.setattr(torch, "empty", lambda *size, device=None, **k: empty(*size, device="meta", **k))
        student = build_student(StudentConfig(**change), num_heads=2, num_kv_heads=1, head_dim=128)
        found = student.implementation(dtype, FakeDevice())  # type: ignore[arg-type]
    assert found == ("triton" if reason is None else "chunkwise")
    assert f"cuda:0: {found}" in caplog.text
    assert reason is None or reason in caplog.text


def test_auto_is_not_triton_on_cpus_even_where_its_kernels_are_interpreted() -> None:
    chosen = "chunkwise" if compiler() is None else "compiled"
    student = build_student(StudentConfig(), num_heads=2, num_kv_heads=1, head_dim=6)
    assert student.implementation(torch.float32, torch.device("cpu")) == chosen
    assert student.implementation(torch.float64, torch.device("cpu")) == "chunkwise"
    settings: dict[str, Any] = {"head_dim": 6, "dtype": torch.float32, "device": torch.device("cpu")}
    assert operator_of(StudentConfig(), **settings) == chosen
    assert operator_of(StudentConfig(impl="reference"), **settings) == "reference"


@NEEDS_GPU
@pytest.mark.gpu
def test_twenty_runs_are_equal() -> None:
    """No race: twenty runs of a larger case are bitwise equal."""
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

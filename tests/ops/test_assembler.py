"""The kernels are assembled for Hopper by a ptxas that does not miscompile them, and the scan that shows it."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; pip install triton")

from conftest import REPOSITORY, script_module
from trenchcoat.ops.triton import assembler, launch
from trenchcoat.students import fused

SCRIPT = REPOSITORY / "scripts" / "compile_kernels.py"


class Tools:
    """Stand-ins for Triton's two assemblers and its record of their versions, and for the driver."""

    def __init__(self, usual: str, other: str | None, driver: tuple[int, int] | None) -> None:
        self.driver, self.cleared = driver, 0
        self.ptxas: Any = SimpleNamespace(path="usual", version=usual)
        self.other = None if other is None else SimpleNamespace(path="other", version=other)

    @property
    def ptxas_blackwell(self) -> SimpleNamespace:
        """As Triton's knob."""
        if self.other is None:
            raise RuntimeError("Cannot find ptxas-blackwell")
        return self.other

    def cache_clear(self) -> None:
        """That of a function which keeps the version."""
        self.cleared += 1

    def driver_release(self) -> tuple[int, int]:
        """As the assembler's."""
        if self.driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return self.driver


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tools]:
    """Replaces Triton's assemblers by ones of these releases."""
    monkeypatch.delenv(assembler.SETTING, raising=False)

    def replaced(usual: str, other: str | None, driver: tuple[int, int] | None = (13, 0)) -> Tools:
        found = Tools(usual, other, driver)
        monkeypatch.setattr(assembler, "knobs", SimpleNamespace(nvidia=found))
        monkeypatch.setattr(assembler, "driver_release", found.driver_release)
        kept = SimpleNamespace(hash=found)
        compiler = SimpleNamespace(get_ptxas=lambda arch: found.ptxas, get_ptxas_version=found, CUDABackend=kept)
        monkeypatch.setattr(assembler, "compiler", compiler)
        return found

    return replaced


@pytest.mark.parametrize("other", ["12.9", "13.1"])
def test_the_newer_assembler_is_used_and_the_log_says_so(
    other: str, tools: Callable[..., Tools], caplog: pytest.LogCaptureFixture
) -> None:
    """What Triton remembers of the old one's version is forgotten, so that stored programs are not mixed up."""
    chosen = tools("12.8", other)
    with caplog.at_level(logging.INFO, logger="trenchcoat"):
        assert assembler.choose() is None
    assert chosen.ptxas == "other"
    assert chosen.cleared == 2
    assert f"assembled by ptxas {other}, as ptxas 12.8 miscompiles the kernels" in caplog.text


def test_one_without_the_fault_stays(tools: Callable[..., Tools]) -> None:
    """Whatever the other and the driver are."""
    chosen = tools("12.9", None, None)
    assert assembler.choose() is None
    assert chosen.ptxas.path == "usual"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("12.8", "13.1", (12, 8)), "its 13.1 for newer GPUs does not go with this driver (CUDA 12.8); set"),
        (("12.4", "12.8"), "Triton's ptxas 12.4 miscompiles the kernels"),
        (("12.8", None), "there is no other (Cannot find ptxas-blackwell)"),
        (("12.8", "13.1", None), "there is no other (libcuda.so.1: cannot open"),
    ],
)
def test_why_there_is_none(given: tuple[Any, ...], said: str, tools: Callable[..., Tools]) -> None:
    chosen = tools(*given)
    assert said in str(assembler.choose())
    assert chosen.ptxas.path == "usual"


def test_what_the_user_set_stays(tools: Callable[..., Tools], monkeypatch: pytest.MonkeyPatch) -> None:
    tools("12.8", "13.1")
    monkeypatch.setenv(assembler.SETTING, "usual")
    assert f"{assembler.SETTING} is usual, and ptxas 12.8 miscompiles" in str(assembler.choose())
    monkeypatch.setenv(assembler.SETTING, "/no/such/ptxas")
    assert "is /no/such/ptxas, which cannot be run" in str(assembler.choose())


def test_only_hopper_is_concerned_and_the_reason_reaches_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler, "choose", lambda: "a reason")
    assembler.obstacle.cache_clear()
    for capability, reason in (((8, 0), None), ((9, 0), "a reason"), ((10, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=capability: is_)
        assert assembler.obstacle(torch.device("cuda", capability[0])) == reason
    assert assembler.obstacle(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hopper = torch.device("cuda", 1)
    assert fused._triton_obstacle(hopper) == "a reason"
    call: Any = SimpleNamespace(rule=None, q=SimpleNamespace(device=hopper), v=None)
    monkeypatch.setattr(launch, "on_gpu", lambda device: True)
    assert launch.refusal(call) == "a reason"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert assembler.obstacle(torch.device("cuda", 2)) is None
    assembler.obstacle.cache_clear()


MACHINE_CODE = """
        /*06d0*/                   LDG.E R0, desc[UR40][R2.64] ;
        /*06e0*/                   IMAD.MOV.U32 R7, RZ, RZ, RZ ;
        /*09d0*/                   IADD3 R5, P0, R0, 0x20, RZ ;
        /*0df0*/                   IADD3.X R12, R0.reuse, -0x3ffffff0, RZ, P0, !PT ;
        /*0e00*/                   IADD3.X R13, R7, 0x40000040, RZ, P1, !PT ;
        /*0e10*/              @!P0 CS2R R8, SRZ ;
        /*0e20*/                   IADD3.X R14, R9, 0x40000040, RZ, P1, !PT ;
        /*0e30*/                   IADD3.X R15, R0, 0x12, RZ, P1, !PT ;
        /*6440*/                   HGMMA.64x16x16.F32.BF16 R152, R180, gdesc[UR40].tnspB, R152 ;
        /*6450*/                   HGMMA.64x16x16.F32.BF16 R152, R184, gdesc[UR28].tnspB, R152, gsb0 ;
        /*6460*/                   MOV R182, RZ ;
        /*6470*/                   LDS.64 R158, [R3] ;
        /*6480*/                   LDS.64 R160, [R3] ;
        /*6490*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*64a0*/                   MOV R182, RZ ;
"""
"""The first, third and fourth of these instructions ended in an illegal memory access on an H200."""


def test_wrong_addresses_and_early_writes_are_found() -> None:
    script = script_module("compile_kernels")
    wrong = ["IADD3.X R12, R0, -0x3ffffff0, RZ, P0, !PT after LDG.E R0, desc[UR40][R2.64]"]
    assert script.wrong_addresses(MACHINE_CODE) == wrong
    assert script.early_writes(MACHINE_CODE) == ["MOV R182, RZ", "LDS.64 R158, [R3]"]


def test_the_program_that_failed_is_right_now() -> None:
    """`outputs` at the size of the self-check, in a process of its own: here Triton is in its interpreter."""
    ours = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", assembler.SETTING)}
    command = [sys.executable, SCRIPT, "--kinds", "terrace", "--only", "reading", "--dim", "64"]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    columns, *rows = done.stdout.splitlines()
    names = columns.split()
    places = [names.index(name) - len(names) for name in ("wrong_addresses", "early_writes")]
    found = {re.split(r"\s{2,}", row)[0]: [row.split()[place] for place in places] for row in rows}
    assert found["terrace outputs"] == ["0", "0"]
    assert all(row == ["0", "0"] for row in found.values())

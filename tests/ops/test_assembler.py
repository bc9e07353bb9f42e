"""The kernels are assembled for Hopper by a ptxas that does not miscompile them, and the scan that shows it."""

from __future__ import annotations

import importlib.util
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

from conftest import REPOSITORY
from trenchcoat.ops.triton import assembler

SCRIPT = REPOSITORY / "scripts" / "compile_kernels.py"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], SimpleNamespace]:
    """Replaces Triton's two assemblers by ones of these releases; returns where the choice is made."""
    monkeypatch.delenv(assembler.SETTING, raising=False)

    def replaced(usual: str, other: str) -> SimpleNamespace:
        chosen = SimpleNamespace(
            ptxas=SimpleNamespace(path="usual", version=usual),
            ptxas_blackwell=SimpleNamespace(path="other", version=other),
        )
        monkeypatch.setattr(assembler, "knobs", SimpleNamespace(nvidia=chosen))
        return chosen

    return replaced


def test_the_newer_assembler_is_used_and_the_log_says_so(tools: Any, caplog: pytest.LogCaptureFixture) -> None:
    for other in ("12.9", "13.1"):
        chosen = tools("12.8", other)
        with caplog.at_level(logging.INFO, logger="trenchcoat"):
            assert assembler.choose((13, 0)) is None
        assert chosen.ptxas == "other"
        assert f"assembled by ptxas {other}, as ptxas 12.8 miscompiles the kernels" in caplog.text


def test_a_correct_one_stays(tools: Any) -> None:
    chosen = tools("12.9", "13.1")
    assert assembler.choose((12, 4)) is None
    assert chosen.ptxas.path == "usual"


@pytest.mark.parametrize(
    ("releases", "driver", "said"),
    [
        (("12.8", "13.1"), (12, 8), "its 13.1 for newer GPUs does not go with this driver (CUDA 12.8); set"),
        (("12.4", "12.8"), (13, 0), "Triton's ptxas 12.4 miscompiles the kernels"),
    ],
)
def test_why_there_is_none(tools: Any, releases: tuple[str, str], driver: tuple[int, int], said: str) -> None:
    chosen = tools(*releases)
    assert said in str(assembler.choose(driver))
    assert chosen.ptxas.path == "usual"


def test_what_the_user_set_stays(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tools("12.8", "13.1")
    monkeypatch.setenv(assembler.SETTING, "/somewhere/ptxas")
    assert f"{assembler.SETTING} is usual, and ptxas 12.8 miscompiles" in str(assembler.choose((13, 0)))


def test_only_hopper_is_concerned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(assembler, "choose", lambda driver: asked.append(driver) or "a reason")
    monkeypatch.setattr(assembler, "driver_release", lambda: (13, 0))
    assembler.obstacle.cache_clear()
    for capability, reason in (((8, 0), None), ((9, 0), "a reason"), ((10, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=capability: is_)
        assert assembler.obstacle(torch.device("cuda", capability[0])) == reason
    assert assembler.obstacle(torch.device("cpu")) is None
    assert asked == [(13, 0)]
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
"""
"""The first, third and fourth of these instructions ended in an illegal memory access on an H200."""


def test_wrong_addresses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    wrong = ["IADD3.X R12, R0, -0x3ffffff0, RZ, P0, !PT after LDG.E R0, desc[UR40][R2.64]"]
    assert script.wrong_addresses(MACHINE_CODE) == wrong


def test_the_program_that_failed_is_right_now() -> None:
    """`outputs` at the size of the self-check, in a process of its own: here Triton is in its interpreter."""
    ours = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", assembler.SETTING)}
    command = [sys.executable, SCRIPT, "--kinds", "terrace", "--only", "reading", "--dim", "64"]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    columns, *rows = done.stdout.splitlines()
    place = columns.split().index("wrong_addresses") - len(columns.split())
    found = {re.split(r"\s{2,}", row)[0]: row.split()[place] for row in rows}
    assert found["terrace outputs"] == "0"
    assert set(found.values()) == {"0"}

"""scripts/gpu_check.sh runs its steps and reports what passed; scripts/launch_kernels.py launches every kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernel_kit import DEVICE
from trenchcoat.cli import app as cli
from trenchcoat.ops.triton import check, launch

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"
TOOLS = ["memcheck", "racecheck", "initcheck"]
PARTS = ["operator", "model", "decode"]


def _check(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    ours = ("STEPS", "OUT", "PYTHON", "SANITIZER", "DRY_RUN")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, cwd="/", env={**kept, **settings}, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_commands_are_accepted() -> None:
    done = _check("--quick", "--layers", "2", DRY_RUN="1", OUT="somewhere")
    assert done.returncode == 0, done.stderr
    tests, *rest = (shlex.split(line) for line in done.stdout.splitlines())
    assert tests[:3] == ["python3", "-m", "pytest"]
    assert {"tests/ops/test_triton_gpu.py", "tests/ops/test_triton_model.py", "tests/ops/test_triton.py"} <= set(tests)
    checks, measured = rest[:3], rest[3:]
    for words, tool in zip(checks, TOOLS, strict=True):
        assert words[2:5] == ["compute-sanitizer", "--tool", tool]
        assert (REPOSITORY / words[-1]).is_file()
    for words, part in zip(measured, PARTS, strict=True):
        args = cli._parse(words[words.index("trenchcoat") + 1 :])
        assert (args.what, args.only, args.device, args.quick, args.layers) == ("kernels", part, "cuda", True, 2)
        assert args.out == f"somewhere/kernels_{part}.json"


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """A fake Python that finds a GPU and whose decoding benchmark fails; a fake sanitizer that finds races."""
    python, sanitizer = tmp_path / "python", tmp_path / "sanitizer"
    python.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *--only\\ decode*) exit 3;; esac\n')
    sanitizer.write_text('#!/bin/sh\ntest "$2" != racecheck\n')
    for script in (python, sanitizer):
        script.chmod(0o755)
    return {"PYTHON": str(python), "SANITIZER": str(sanitizer), "OUT": str(tmp_path / "out")}


def test_results_are_reported_and_one_failure_does_not_stop_the_rest(fakes: dict[str, str]) -> None:
    done = _check(**fakes)
    assert done.returncode == 1
    out = Path(fakes["OUT"])
    lines = (out / "summary.txt").read_text().splitlines()
    assert lines == done.stdout.splitlines()[-7:]
    steps = ["tests", *TOOLS, *PARTS]
    failed = {"racecheck", "decode"}
    wanted = [f"{step}: FAILED, see {out}/{step}.log" if step in failed else f"{step}: passed" for step in steps]
    assert lines == wanted
    assert "bench kernels --device cuda --only operator" in (out / "operator.log").read_text()
    assert _check(**fakes, STEPS="tests model").returncode == 0
    absent = _check(**{**fakes, "SANITIZER": "no-such-sanitizer"}, STEPS="memcheck")
    assert absent.returncode == 1
    assert "no-such-sanitizer" in (out / "memcheck.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    done = _check(PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert done.returncode == 1
    assert "no CUDA device was found" in done.stderr
    wrong = _check(STEPS="tests everything", DRY_RUN="1")
    assert wrong.returncode == 2
    assert "STEPS has 'everything'" in wrong.stderr


@pytest.mark.skipif(not launch.INTERPRETED, reason="launches are counted in Triton's interpreter")
def test_every_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    place = REPOSITORY / "scripts" / "launch_kernels.py"
    spec = importlib.util.spec_from_file_location("launch_kernels", place)
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    launched: set[str] = set()
    real = InterpretedFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        launched.add(self.fn.__name__)
        return real(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(check, "check", lambda device: None)
    monkeypatch.setattr(launch, "SHORTEST_GROUP", launch.SHORTEST_GROUP)
    monkeypatch.setattr(launch, "wanted_programs", launch.wanted_programs)
    script.run_all(script.SMALL, ["terrace"], [torch.bfloat16], DEVICE)
    compiled = json.loads((REPOSITORY / "benchmarks" / "kernels_sm90.json").read_text())["terrace"]
    assert {name.split()[0] for name in compiled} | {"running_totals"} <= launched

"""scripts/gpu_check.sh runs its steps and reports what passed; scripts/launch_kernels.py launches every kernel."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import script_module
from kernel_kit import DEVICE
from trenchcoat.cli import app as cli
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.ops.triton import check, launch

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"
PARTS = ["operator", "layer", "decode"]
ALL = "selfcheck tests memcheck operator layer decode reference racecheck initcheck model"


def _check(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    ours = (
        "STEPS",
        "OUT",
        "PYTHON",
        "SANITIZER",
        "DRY_RUN",
        "DEVICE",
        "LIMIT",
        "MODEL",
        "DATA",
        "VALIDATION",
        "WHEELS",
    )
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, cwd="/", env={**kept, **settings}, capture_output=True, text=True, timeout=300, check=False
    )


def _commands(*arguments: str, **settings: str) -> list[list[str]]:
    done = _check(*arguments, DRY_RUN="1", OUT="somewhere", **settings)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_commands_are_accepted() -> None:
    selfcheck, tests, memcheck, *measured = _commands("--quick", "--layers", "2")
    assert selfcheck == ["python3", "scripts/launch_kernels.py", "--device", "cuda", "--selfcheck"]
    assert tests[:3] == ["python3", "-m", "pytest"]
    assert {"tests/ops/test_triton_gpu.py", "tests/ops/test_triton_model.py", "tests/ops/test_triton.py"} <= set(tests)
    assert memcheck[2:5] == ["compute-sanitizer", "--tool", "memcheck"]
    for words, part in zip(measured, PARTS, strict=True):
        args = cli._parse(words[words.index("trenchcoat") + 1 :])
        assert (args.what, args.only, args.device, args.quick, args.layers) == ("kernels", part, "cuda", True, 2)
        assert args.out == f"somewhere/kernels_{part}.json"


def test_the_reference_is_a_recipe_that_is_accepted(tiny_model_dir: Path, text_file: Path) -> None:
    given = {"MODEL": str(tiny_model_dir), "DATA": str(text_file), "STEPS": "reference"}
    for device in ("cuda", "cpu"):
        [words] = _commands(**given, DEVICE=device)
        recipe = load_recipe(words[4], words[5:])
        assert (recipe.model.path, recipe.data.path, recipe.model.device) == (
            *map(str, (tiny_model_dir, text_file)),
            device,
        )
    [words] = _commands(**given, VALIDATION=str(text_file))
    recipe, ours = load_recipe(words[4], words[5:]), load_recipe("smollm2_135m")
    assert recipe.data.validation_path == str(text_file)
    for stage in ("transfer", "lora"):
        ten, one = getattr(recipe, stage), getattr(ours, stage)
        assert (ten.max_steps, ten.batch_size) == (one.max_steps, 10 * one.batch_size)


def test_a_rehearsal_needs_no_sanitizer() -> None:
    commands = _commands(DEVICE="cpu", STEPS="memcheck operator")
    assert commands[0] == ["python3", "scripts/launch_kernels.py", "--device", "cpu"]
    assert commands[1][4:7] == ["kernels", "--device", "cpu"]


def test_kernels_need_neither_omegaconf_nor_datasets() -> None:
    """What is imported for the kernels, their tests and their benchmark, on a machine that lacks both."""
    code = """
import sys
for name in ("omegaconf", "datasets", "matplotlib", "pyarrow"):
    sys.modules[name] = None
sys.path[:0] = ["scripts", "tests"]
import launch_kernels, conftest, kernel_kit, operator_kit, low_precision
from trenchcoat.cli.app import main
sys.exit(main(["bench", "kernels", "--only", "everything"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "its parts are operator, layer, model, decode" in done.stderr


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """A fake Python that finds a GPU, whose tests hang and whose decoding benchmark fails; a fake sanitizer."""
    python, sanitizer, found = tmp_path / "python", tmp_path / "sanitizer", tmp_path / "found"
    found.mkdir()
    (found / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    record = {"parts": {"operator": {"forward 8": {"seconds": 0.001, "share": 0.5, "others": {"sdpa": 0.002}}}}}
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  *gpu_summary.py*) exec {shlex.quote(sys.executable)} "$@" ;;
  *is_available*) PYTHONPATH={found} exec {shlex.quote(sys.executable)} "$@" ;;
esac
echo "ran $*"
case "$*" in
  *selfcheck) echo "terrace  0.50 of the tolerance (the output), 1 s" ;;
  *find_spec*) exit ${{NO_FLA:-0}} ;;
  *test_fla_gpu.py*) echo "ERROR tests/ops/test_fla_gpu.py - ImportError: no" ; exit 2 ;;
  *-n\\ 3*) echo "[gw1] [  9%] PASSED tests/a.py::one "; echo "[gw2] [ 10%] FAILED tests/a.py::two[a b] "; exit 1 ;;
  *-m\\ pytest*) echo "tests/a.py::one PASSED"; sleep 60 ;;
  *--only\\ operator*) echo {shlex.quote(json.dumps(record))} > {tmp_path}/out/kernels_operator.json ;;
  *--only\\ decode*) exit 3 ;;
esac
"""
    )
    sanitizer.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors"\n')
    for script in (python, sanitizer):
        script.chmod(0o755)
    return {"PYTHON": str(python), "SANITIZER": str(sanitizer), "OUT": str(tmp_path / "out")}


def test_one_table_says_how_each_step_ended(fakes: dict[str, str]) -> None:
    done = _check(**fakes, STEPS=ALL.replace("tests ", ""))
    assert done.returncode == 1
    out = Path(fakes["OUT"])
    text = (out / "summary.txt").read_text()
    assert done.stdout.endswith(text)
    lines = text.splitlines()
    results = {line.split()[0]: " ".join(line.split()[2:]) for line in lines[1:] if not line.startswith(" ")}
    assert list(results) == ALL.replace("tests ", "").split()
    passed = {"selfcheck", "memcheck", "operator", "layer", "racecheck", "initcheck", "model"}
    assert {step for step, result in results.items() if result == "passed"} == passed
    assert results["decode"] == f"FAILED ({out}/decode.log)"
    assert results["reference"].startswith("not run: MODEL and DATA were not given")
    figures = {line.strip() for line in lines if line.startswith(" ")}
    assert {"terrace  0.50 of the tolerance (the output), 1 s", "ERROR SUMMARY: 0 errors"} <= figures
    assert "forward 8: 1 ms, 50% of the roofline, sdpa 2 ms (2.00x)" in figures
    assert "bench kernels --device cuda --only operator" in (out / "operator.log").read_text()


def test_results_of_several_processes_are_counted(fakes: dict[str, str]) -> None:
    done = _check(**fakes, WORKERS="3", STEPS="tests")
    assert done.returncode == 1
    assert [line.strip() for line in done.stdout.splitlines()[2:]] == ["1 passed, 1 failed", "tests/a.py::two[a b]"]


def test_the_kernels_of_flash_linear_attention_are_a_step_of_their_own(fakes: dict[str, str]) -> None:
    """With a file that cannot be imported, without the package, and without a GPU."""
    shown = [_check(**fakes, **more, STEPS="fla").stdout for more in ({}, {"NO_FLA": "1"}, {"DEVICE": "cpu"})]
    assert "1 error" in shown[0]
    assert "tests/ops/test_fla_gpu.py" in shown[0].split("1 error")[1]
    assert "not run: fla-core is missing" in shown[1]
    assert "not run: these kernels need a GPU" in shown[2]


def test_a_step_ends_at_its_limit_and_keeps_its_figures(fakes: dict[str, str]) -> None:
    done = _check(**fakes, LIMIT="3", STEPS="tests operator")
    assert done.returncode == 1
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert any(line.startswith("tests 2 stopped at its limit") for line in lines)
    assert "1 passed" in lines
    assert any("not run: no time left" in line for line in lines)
    absent = _check(**{**fakes, "SANITIZER": "no-such-sanitizer"}, STEPS="memcheck")
    assert absent.returncode == 1
    assert "no-such-sanitizer" in (Path(fakes["OUT"]) / "memcheck.log").read_text()


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

    script = script_module("launch_kernels")
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

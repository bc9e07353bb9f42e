"""A run killed with SIGKILL in either stage and restarted ends with the same numbers as an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training_kit import numbers_of, two_stages
from trenchcoat.runtime.runlog import read_metrics

WORKER = Path(__file__).parents[1] / "resume_worker.py"
PATIENCE = 300.0


def start(run_dir: Path, delay: float) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(WORKER), str(run_dir), str(delay)], env=environment)


def kill_after(process: subprocess.Popen[bytes], run_dir: Path, stage: str, step: int, kind: int) -> int:
    """Send ``kind`` once the log shows ``step`` of ``stage``; returns the exit code."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        lines = [line for line in read_metrics(run_dir) if line.get("stage") == stage and line["kind"] == "train"]
        if lines and lines[-1]["step"] >= step:
            process.send_signal(kind)
            return process.wait(PATIENCE)
        assert process.poll() is None, "the worker ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"{stage} did not reach step {step}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    return run_dir, json.loads(json.dumps(two_stages(run_dir)))


def test_killed_in_both_stages(tmp_path: Path, uninterrupted: tuple[Path, dict[str, object]]) -> None:
    first = start(tmp_path, 0.1)
    assert kill_after(first, tmp_path, "transfer", 6, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "checkpoints" / "lora").exists()
    second = start(tmp_path, 0.1)
    assert kill_after(second, tmp_path, "lora", 9, signal.SIGKILL) == -signal.SIGKILL
    assert start(tmp_path, 0.0).wait(PATIENCE) == 0

    expected_dir, expected = uninterrupted
    assert json.loads((tmp_path / "weights.json").read_text()) == expected
    assert numbers_of(tmp_path) == numbers_of(expected_dir)
    resumed = [line["text"] for line in read_metrics(tmp_path) if line["kind"] == "info"]
    assert any("transfer: continuing from step 4 of 12" in text for text in resumed)
    assert any("lora: continuing from step 8 of 12" in text for text in resumed)


def test_ctrl_c_stops_cleanly_and_continues(tmp_path: Path, uninterrupted: tuple[Path, dict[str, object]]) -> None:
    first = start(tmp_path, 0.1)
    assert kill_after(first, tmp_path, "transfer", 5, signal.SIGINT) == 130
    steps = [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert (tmp_path / "checkpoints" / "transfer" / f"step-{steps[-1]:08d}").is_dir()
    expected_dir, expected = uninterrupted
    outcome = two_stages(tmp_path)
    assert json.loads(json.dumps(outcome)) == expected
    assert numbers_of(tmp_path) == numbers_of(expected_dir)

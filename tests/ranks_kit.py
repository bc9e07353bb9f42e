"""Runs ``ranks_worker.py`` under torchrun on this machine with a list of jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trenchcoat.runtime.runlog import read_metrics

WORKER = Path(__file__).parent / "ranks_worker.py"

Job = dict[str, Any]


def start(
    processes: int, jobs: list[Job], out: Path, *, delay: float = 0.0, restarts: int = 0
) -> subprocess.Popen[str]:
    """torchrun with the worker on ``jobs``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        "--max-restarts", str(restarts), str(WORKER), str(out / "jobs.json"), str(out), str(delay),
    ]  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(processes: int, jobs: list[Job], out: Path) -> list[list[Any]]:
    """Every process's report for each job."""
    job = start(processes, jobs, out)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def run_with_a_kill(job: Job, out: Path, folder: Path, lines: int) -> None:
    """Two processes; the second is killed once ``folder``'s log has ``lines`` numbers, then both are restarted."""
    process = start(2, [job], out, delay=0.15, restarts=1)
    deadline = time.monotonic() + 120
    while sum(line["kind"] in ("train", "eval") for line in read_metrics(folder)) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int((out / "pid-1-0").read_text()), signal.SIGKILL)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "process 1 (on " in said
    assert "is gone" in said

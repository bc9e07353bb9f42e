"""Several processes on this machine: torchrun with ``ranks_worker.py`` on a list of jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    """What every process reports of each job."""
    job = start(processes, jobs, out)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]

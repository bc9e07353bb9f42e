"""A fake Slurm: `sbatch`, `srun`, `squeue`, `sacct`, `scancel` and `scontrol` on one machine.

    python slurm_stand_in.py TOOL ARGUMENT...        state in the folder $SLURM_STAND_IN

It runs the tasks of a job array as processes, at most as many at a time as the array allows, requeues a task on
`scontrol requeue` (sending it SIGTERM, as Slurm does), and can preempt one task once: the file `preempt` in the state
folder holds a task id and a glob pattern; as soon as a file matches, the task gets SIGTERM and SIGUSR2, like Slurm's
`send_user_signal`. Not implemented: queues, limits, nodes, accounts.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")
SIGNALS = {"TERM": signal.SIGTERM, "USR2": signal.SIGUSR2}


def install(folder: Path) -> Path:
    """Write the tools into ``folder``/bin; returns it. The state is in ``folder``."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    for tool in TOOLS:
        script = binaries / tool
        script.write_text(
            f"#!/bin/sh\nSLURM_STAND_IN={shlex.quote(str(folder))} exec {shlex.quote(sys.executable)} "
            f'{shlex.quote(__file__)} {tool} "$@"\n'
        )
        script.chmod(0o755)
    return binaries


def place() -> Path:
    """The state folder."""
    return Path(os.environ["SLURM_STAND_IN"])


def states() -> dict[str, str]:
    """{task id: state} of all tasks so far."""
    return {path.name.removesuffix(".state"): path.read_text() for path in sorted(place().glob("*.state"))}


def put(task: str, state: str) -> None:
    """Write a task's state."""
    partial = place() / f"{task}.partial"
    partial.write_text(state)
    partial.rename(place() / f"{task}.state")


def sbatch(arguments: list[str]) -> int:
    """Queue a script; a separate process runs it."""
    (script,) = arguments
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", Path(script).read_text(), flags=re.MULTILINE))
    if options.get("partition") == "nowhere":
        sys.stderr.write("sbatch: error: invalid partition specified: nowhere\n")
        return 1
    number = str(100 + len(list(place().glob("*.options"))))
    (place() / f"{number}.options").write_text(json.dumps(options))
    (place() / f"{number}.sh").write_text(Path(script).read_text())
    array = re.fullmatch(r"0-(\d+)%(\d+)", shlex.split(options["array"])[0]) if "array" in options else None
    for task in tasks(number, array):
        put(task, "PENDING")
    at_once = array.group(2) if array else "1"
    command = [sys.executable, __file__, "controller", number, at_once, *tasks(number, array)]
    with open(place() / "errors", "ab") as errors:
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=errors)
    sys.stdout.write(f"Submitted batch job {number}\n")
    return 0


def tasks(number: str, array: re.Match[str] | None) -> list[str]:
    """Ids of a job's tasks."""
    return [f"{number}_{index}" for index in range(int(array.group(1)) + 1)] if array else [number]


def controller(arguments: list[str]) -> int:
    """Run the tasks of one job until none is left."""
    number, at_once, *waiting = arguments
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < int(at_once):
            task = waiting.pop(0)
            running[task] = launch(number, task)
        for task, process in list(running.items()):
            code = process.poll()
            preempt(task, process)
            again = place() / f"{task}.requeue"
            if code is None:
                if again.exists() and not (place() / f"{task}.told").exists():
                    (place() / f"{task}.told").touch()
                    os.killpg(process.pid, signal.SIGTERM)
                continue
            del running[task]
            if again.exists():
                again.unlink()
                put(task, "PENDING")
                waiting.append(task)
            elif states()[task] != "CANCELLED":
                put(task, "COMPLETED" if code == 0 else "FAILED")
        time.sleep(0.05)
    return 0


def launch(number: str, task: str) -> subprocess.Popen[bytes]:
    """Start a task's script."""
    put(task, "RUNNING")
    environment = {
        **os.environ, "SLURM_JOB_ID": str(int(number) * 1000 + int(task.partition("_")[2] or 0)), "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    if "_" in task:
        environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task.partition("_")[2]}
    else:
        environment["SLURM_JOB_ID"] = number
    with open(place() / f"{task}.output", "ab") as output:
        return subprocess.Popen(
            ["bash", str(place() / f"{number}.sh")], env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip


def preempt(task: str, process: subprocess.Popen[bytes]) -> None:
    """Send the preemption signals when the pattern matches."""
    order = place() / "preempt"
    if not order.exists():
        return
    wanted, pattern, *names = order.read_text().split()
    if wanted == task and glob.glob(pattern):
        order.unlink()
        for name in names:
            os.kill(int((place() / f"{task}.pid").read_text()), SIGNALS[name])


def srun(arguments: list[str]) -> int:
    """Replace this process with the command, writing its output to the given file."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    task = f"{array}_{index}" if array else os.environ["SLURM_JOB_ID"]
    position = arguments.index("--output")
    output = arguments[position + 1]
    for mark, value in (("%j", task), ("%A", array or ""), ("%a", index or ""), ("%t", "0")):
        output = output.replace(mark, value)
    first = next(i for i in range(position + 2, len(arguments)) if not arguments[i].startswith("-"))
    (place() / f"{task}.pid").write_text(str(os.getpid()))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.execvp(arguments[first], arguments[first:])


def _chosen(arguments: list[str], option: str) -> set[str]:
    given = [value for item in arguments if item.startswith(f"{option}=") for value in item.split("=")[1].split(",")]
    given += [arguments[i + 1] for i, item in enumerate(arguments[:-1]) if item == "-j"]
    return set(given)


def squeue(arguments: list[str]) -> int:
    """Print queued and running tasks."""
    wanted = _chosen(arguments, "--jobs")
    known = {task.partition("_")[0] for task in states()}
    if not wanted & known:
        sys.stderr.write("slurm_load_jobs error: Invalid job id specified\n")
        return 1
    for task, state in states().items():
        if task.partition("_")[0] in wanted and state in ("PENDING", "RUNNING"):
            sys.stdout.write(f"{task}\n")
    return 0


def sacct(arguments: list[str]) -> int:
    """Print the states of tasks."""
    sys.stdout.write("JobID|State|NodeList\n")
    for task, state in states().items():
        if task.partition("_")[0] in _chosen(arguments, "--jobs"):
            sys.stdout.write(f"{task}|{state}|node1\n")
    return 0


def scancel(arguments: list[str]) -> int:
    """End tasks."""
    for task in states():
        if (task in arguments or task.partition("_")[0] in arguments) and states()[task] == "RUNNING":
            put(task, "CANCELLED")
            pid = place() / f"{task}.pid"
            if pid.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid.read_text()), signal.SIGKILL)
    return 0


def scontrol(arguments: list[str]) -> int:
    """`scontrol requeue TASK`."""
    action, task = arguments
    if action != "requeue" or states().get(task) != "RUNNING":
        sys.stderr.write(f"scontrol: error: cannot {action} {task}\n")
        return 1
    (place() / f"{task}.requeue").touch()
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))

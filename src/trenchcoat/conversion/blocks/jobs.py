"""The launcher's jobs: local processes or Slurm jobs, both through submitit.

:class:`LocalJobs` and :class:`SlurmJobs` start tasks (:class:`Task`) and monitor them. Running jobs are recorded in the
run's folder, so that a later launcher finds them instead of starting them twice.

submitit (https://github.com/facebookincubator/submitit) pickles a task and calls it in the job:

    it returns, or raises        submitit writes a result
    SIGTERM                      training saves a checkpoint after its step and stops; then local: the job ends;
                                 Slurm: the job requeues itself (`scontrol requeue`)
    Slurm's preemption signal    (SIGUSR2, also sent some time before the time limit) the same; if saving takes longer
                                 than ``SAVE_SECONDS``, the job continues from the previous checkpoint
    killed, machine lost         no result: the launcher counts it as failed
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal

import submitit

from trenchcoat.config import Recipe, UserError
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.blocks.slurmoptions import SlurmOptions
from trenchcoat.conversion.run import Stopped
from trenchcoat.runtime.files import InUse, read_json, write_json
from trenchcoat.runtime.runlog import RunLog

Step = Literal["collect", "train", "stitch"]
STEPS = {"collect": blockstages.collect_inputs, "stitch": blockstages.stitch_blocks}
"""The steps before and after the blocks are trained."""

SIGNAL_SECONDS = 120
"""How long before its time limit a Slurm job gets the preemption signal."""
STOP_SECONDS = 120.0
"""Time that local jobs have to save a checkpoint when their launcher is stopped."""
MAX_TIMEOUTS = 50
"""How often a Slurm job is requeued because of its time limit."""
SAVE_SECONDS = 60
"""Time a Slurm job has for its step and a checkpoint after the preemption signal."""
LOCK_SECONDS = 2.0
"""Time between two attempts to lock a block that another process holds."""
FOREVER_MINUTES = 10 * 365 * 24 * 60
"""Time limit of local jobs (submitit requires one)."""


# In the job


@dataclass(frozen=True)
class Task:
    """The work of one job; called in the job's process."""

    recipe: Recipe
    step: Step
    number: int = 0
    """Number of the block to train."""
    device: str | None = None
    """For CUDA_VISIBLE_DEVICES; None leaves it as the scheduler set it."""

    def __call__(self) -> Any:
        """Run the step; returns what ``trenchcoat blocks`` would show."""
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device
        with _stoppable():
            return self._train() if self.step == "train" else STEPS[self.step](self.recipe)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit when it requeues the job: the same task, which continues from its checkpoint."""
        return submitit.helpers.DelayedSubmission(self)

    def _train(self) -> Any:
        warned = False
        while True:
            try:
                return blockstages.train_block(self.recipe, self.number)
            except InUse as error:
                if not warned:
                    logging.getLogger(__name__).warning("%s Waiting for it.", error)
                warned = True
                time.sleep(LOCK_SECONDS)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside a job: end it or requeue it on a signal, as described at the top of this file."""
    requeue = signal.getsignal(signal.SIGUSR2)
    on_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"

    def stop(number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM outside training."""
        raise Stopped

    def run_again(number: int, frame: FrameType | None) -> None:
        """Ask submitit to requeue the job."""
        for kind in (signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM):  # Slurm will send some of these now
            signal.signal(kind, signal.SIG_IGN)
        assert callable(requeue)
        requeue(signal.SIGUSR2, None)

    def save_then_stop(number: int, frame: FrameType | None) -> None:
        """Let training save a checkpoint, for at most ``SAVE_SECONDS``."""
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, run_again)
        signal.alarm(SAVE_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    if on_slurm:
        signal.signal(signal.SIGUSR2, save_then_stop)
    else:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except Stopped:
        if not on_slurm:
            raise SystemExit("stopped; everything is saved") from None
        run_again(signal.SIGUSR2, None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR2, requeue)


def _end_with(parent: int) -> None:
    """End this process when its parent, submitit's controller, has died: nothing would track it anymore."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# In the launcher


@dataclass
class Job:
    """A job started by this launcher or an earlier one."""

    name: str
    """Name of its block or step."""
    id: str
    folder: str
    """Submitit's folder with the call, the log and the result."""
    device: str | None = None
    handle: Any = None
    """Submitit's job."""
    missed: int = 0
    """Number of consecutive polls that did not list it."""

    @property
    def paths(self) -> Any:
        """Submitit's files."""
        return self.handle.paths

    @property
    def log(self) -> Path:
        """Its output."""
        return Path(self.paths.stdout)

    def record(self) -> dict[str, Any]:
        """What a later launcher needs to find it again."""
        return {"name": self.name, "id": self.id, "folder": self.folder, "device": self.device}

    def has_result(self) -> bool:
        """Whether it ended, with success or an error."""
        return bool(self.paths.result_pickle.is_file())

    def error(self) -> str | None:
        """The last line of the error in its result; None when it succeeded."""
        error = self.handle.exception()
        if error is None:
            return None
        parts = str(error).split("-" * 22)  # submitit puts the traceback between two such lines
        lines = [line for line in parts[min(1, len(parts) - 1)].splitlines() if line.strip()]
        return re.sub(r"^(?:\w+\.)*(\w+): ", r"\1: ", lines[-1]) if lines else "no error message"


class Jobs(ABC):
    """The running jobs of one run."""

    kind: ClassVar[str]
    poll_seconds: ClassVar[float]
    """Time between two polls."""
    settle_seconds: ClassVar[float]
    """How long a file that a job wrote may take to become visible on this machine."""
    _handle_class: ClassVar[Any]

    def __init__(self, folder: Path, log: RunLog) -> None:
        self.folder, self.log = folder.absolute(), log
        self.running: dict[str, Job] = {}

    @abstractmethod
    def free_slots(self) -> int | None:
        """How many more jobs can be started now; None means no limit."""

    @abstractmethod
    def start(self, tasks: Mapping[str, Task]) -> None:
        """Start tasks by name, at most as many as there are free slots."""

    @abstractmethod
    def _alive(self) -> dict[str, bool]:
        """For each job in ``running``, whether it is still running."""

    @abstractmethod
    def stop(self) -> None:
        """Called when the launcher stops: end the jobs that depend on it, and log which ones continue."""

    def ended(self) -> list[Job]:
        """Jobs that have ended since the last call; removes them from ``running``."""
        alive = self._alive()
        gone = [job for name, job in self.running.items() if not alive[name]]
        for job in gone:
            del self.running[job.name]
        if gone:
            self._save()
        return gone

    def find_earlier(self) -> None:
        """Find the jobs of an earlier launcher that are still running."""
        if self._record.is_file():
            record = read_json(self._record)
            if self._same_place(record["host"]):
                for one in record["jobs"]:
                    job = Job(**one, handle=self._handle_class(folder=one["folder"], job_id=one["id"]))
                    self.running[job.name] = job
                alive = self._alive()
                self.running = {n: job for n, job in self.running.items() if alive[n] and not job.missed}
            self._save()

    def failure(self, job: Job) -> str | None:
        """Why a job failed, in one line; None if it succeeded."""
        if self.appears(job.has_result, Path(job.folder)):
            return job.error()
        return f"it ended without a result{self._state(job)}: killed, or out of memory"

    def appears(self, check: Callable[[], bool], folder: Path) -> bool:
        """Whether ``check`` (of a file in ``folder``) is true, or becomes true within ``settle_seconds``."""
        until = time.monotonic() + self.settle_seconds
        while not check():
            if time.monotonic() >= until:
                return False
            with suppress(OSError):
                folder.chmod(folder.stat().st_mode)  # invalidates the NFS client cache
            time.sleep(0.5)
        return True

    def _state(self, job: Job) -> str:
        return ""

    def _same_place(self, host: str) -> bool:
        return True

    @property
    def _record(self) -> Path:
        return self.folder / f"{self.kind}.json"

    def _save(self) -> None:
        write_json(self._record, {"host": platform.node(), "jobs": [job.record() for job in self.running.values()]})


class LocalJobs(Jobs):
    """Local processes, at most one per device of ``devices`` (names for CUDA_VISIBLE_DEVICES; "" is the CPU).

    They are started so that Ctrl-C reaches only the launcher, which then ends them. If the launcher is killed, they
    continue to the end of their block.
    """

    kind = "local"
    poll_seconds = 0.5
    settle_seconds = 0.0
    _handle_class = submitit.LocalJob

    def __init__(self, folder: Path, log: RunLog, devices: Sequence[str]) -> None:
        super().__init__(folder, log)
        self.devices = list(devices)

    def _free(self) -> list[str]:
        free = list(self.devices)
        for job in self.running.values():
            if job.device in free:
                free.remove(job.device)
        return free

    def free_slots(self) -> int:
        """Free devices."""
        return len(self._free())

    def start(self, tasks: Mapping[str, Task]) -> None:
        """Start one process per task."""
        for device, (name, task) in zip(self._free(), tasks.items(), strict=False):
            number = sum(1 for _ in self.folder.glob(f"{name}-*"))
            folder = self.folder / f"{name}-{number}"
            executor = submitit.LocalExecutor(folder)
            executor.update_parameters(timeout_min=FOREVER_MINUTES, stderr_to_stdout=True)
            with _interrupts_held():
                handle = executor.submit(dataclasses.replace(task, device=device))
                self.running[name] = job = Job(name, handle.job_id, str(folder), device, handle)
                self._save()
            where = f" on GPU {device}" if device else ""
            self.log.info(f"{name}: process {job.id}{where}, log {job.log}")

    def _same_place(self, host: str) -> bool:
        return host == platform.node()

    def _alive(self) -> dict[str, bool]:
        return {name: self._is_running(job) for name, job in self.running.items()}

    def _is_running(self, job: Job) -> bool:
        """Whether its controller runs; process ids are reused, so the command line is compared."""
        if not job.handle.done():
            return True
        try:
            return job.folder.encode() in Path(f"/proc/{job.id}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False

    def _still_running(self) -> list[Job]:
        alive = self._alive()
        return [job for name, job in self.running.items() if alive[name]]

    def stop(self) -> None:
        """End all jobs: they have ``STOP_SECONDS`` to save a checkpoint, or until Ctrl-C is pressed again."""
        running = self._still_running()
        if running:
            self.log.info(f"ending {len(running)} jobs, which save a checkpoint first (Ctrl-C again kills them)")
            self._signal(running, signal.SIGTERM)
            try:
                until = time.monotonic() + STOP_SECONDS
                while self._still_running() and time.monotonic() < until:
                    time.sleep(0.1)
            except KeyboardInterrupt:
                pass
            late = self._still_running()
            if late:
                self._signal(late, signal.SIGKILL)
                self.log.warning(f"{len(late)} jobs were killed; they will continue from the previous checkpoint")
                while self._still_running():
                    time.sleep(0.1)
        self.running.clear()
        self._save()

    @staticmethod
    def _signal(jobs: Sequence[Job], number: signal.Signals) -> None:
        for job in jobs:
            try:
                os.kill(int(job.id), number)
            except ProcessLookupError:
                continue


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C; if it is pressed meanwhile, this process gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SlurmJobs(Jobs):
    """Slurm jobs, several as one array. They outlive their launcher; the next launcher finds them."""

    kind = "slurm"
    poll_seconds = 10.0
    settle_seconds = 15.0
    _handle_class = submitit.SlurmJob

    def __init__(self, folder: Path, log: RunLog, options: SlurmOptions, *, name: str, at_once: int | None) -> None:
        super().__init__(folder, log)
        self.options, self.name, self.at_once = options, name, at_once
        missing = [tool for tool in ("sbatch", "srun", "squeue") if shutil.which(tool) is None]
        if missing:
            raise UserError(
                f"--launcher slurm: `{missing[0]}` is not installed on this machine; run on a login node of the "
                "cluster, or use --launcher local"
            )

    def free_slots(self) -> int | None:
        """The first array may have any size, as Slurm queues it; later jobs count against ``at_once``."""
        if self.at_once is None or not self.running:
            return None
        return max(0, self.at_once - len(self.running))

    def start(self, tasks: Mapping[str, Task]) -> None:
        """Submit one job, or one array of jobs of which ``at_once`` run at a time."""
        folder = self.folder / "slurm"
        executor = submitit.SlurmExecutor(folder, max_num_timeout=MAX_TIMEOUTS)
        options, further = self.options, dict(self.options.further)
        settings: dict[str, Any] = {"gpus_per_node": options.gpus, "setup": list(options.setup) or None}
        if options.cpus is not None:  # srun does not inherit it from sbatch
            settings |= {"cpus_per_task": options.cpus, "srun_args": [f"--cpus-per-task={options.cpus}"]}
        executor.update_parameters(
            job_name=further.pop("job-name", self.name),
            time=options.minutes,
            signal_delay_s=SIGNAL_SECONDS,
            array_parallelism=self.at_once or len(tasks),
            stderr_to_stdout=True,
            additional_parameters={"requeue": True, **further},
            **{name: value for name, value in settings.items() if value is not None},
        )
        try:
            handles = executor.submit_array(list(tasks.values()))
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            raise UserError(f"sbatch refused the job: {' '.join(last) or 'no message'} (see blocks.slurm)") from error
        for name, handle in zip(tasks, handles, strict=True):
            self.running[name] = Job(name, handle.job_id, str(folder), None, handle)
        self._save()
        array = handles[0].job_id.split("_")[0]
        self.log.info(f"{', '.join(tasks)}: Slurm job {array}, logs {folder}/{array}*")

    def _state(self, job: Job) -> str:
        return f" (Slurm state {job.handle.state})"

    def _alive(self) -> dict[str, bool]:
        open_ = [job for job in self.running.values() if not job.has_result()]
        listed = self._listed(open_) if open_ else set()
        for job in open_:
            if listed is not None:
                job.missed = 0 if job.id in listed else job.missed + 1
        return {job.name: not job.has_result() and job.missed < 2 for job in self.running.values()}

    def _listed(self, jobs: Sequence[Job]) -> set[str] | None:
        """Ids of the ``jobs`` that are queued or running; None when Slurm does not answer."""
        ids = sorted({job.id.split("_")[0] for job in jobs})
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(ids)}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 and "invalid job id" not in done.stderr.lower():
            self.log.warning(f"squeue does not answer, still waiting: {' '.join(done.stderr.split())[:200]}")
            return None
        return set(done.stdout.split())

    def stop(self) -> None:
        """Log that the jobs continue; nothing is cancelled."""
        if self.running:
            ids = " ".join(sorted({job.id.split("_")[0] for job in self.running.values()}))
            self.log.info(
                f"Slurm jobs {ids} continue: the same command waits for them again, `scancel {ids}` ends them"
            )

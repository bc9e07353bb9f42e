"""Blocks as jobs: same students as in one process; failed, killed, preempted and abandoned jobs; Slurm options."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import submitit
from torch import Tensor

import slurm_stand_in
from blocks_kit import LAYERS, block_overrides, learned, recipe, require_same
from conftest import REPOSITORY, save_tiny_model
from sleeper import Failing, Sleeper
from trenchcoat.cli import app as cli
from trenchcoat.config import Recipe, UsageError, UserError
from trenchcoat.conversion.blocks import jobs, launch
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.blocks.jobs import LocalJobs, Task
from trenchcoat.conversion.blocks.slurmoptions import SlurmOptions, parse_slurm
from trenchcoat.conversion.run import Stopped
from trenchcoat.runtime.files import holder, locked
from trenchcoat.runtime.runlog import RunLog, read_metrics

PATHS = f"{REPOSITORY / 'src'}:{REPOSITORY / 'tests'}"
FIRST, SECOND = "layers-000-002", "layers-003-004"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("five-layers"), seed=0, num_hidden_layers=LAYERS)


@pytest.fixture
def overrides(model_dir: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two blocks, of three and two layers."""
    monkeypatch.setenv("PYTHONPATH", PATHS)
    return [*block_overrides(model_dir, tiny_overrides), "blocks.size=3", "eval.rows=2"]


@pytest.fixture
def streamed(overrides: list[str], tmp_path: Path) -> dict[str, Tensor]:
    """Weights trained by `blocks run` in one process."""
    blockstages.run_blocks(recipe(overrides, tmp_path / "streamed", "blocks.hidden=memory"))
    return learned(tmp_path / "streamed")


def log_texts(folder: Path) -> list[str]:
    """The log of a run's launcher."""
    return [line["text"] for line in read_metrics(folder / "blocks" / "jobs") if "text" in line]


def until(check: Callable[[], Any], what: str, seconds: float = 100) -> Any:
    """Wait until ``check`` returns something true; returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


def checkpoints(folder: Path, block: str) -> list[Path]:
    return list((folder / "blocks" / block / "checkpoints" / "transfer").glob("step-*/manifest.json"))


def held(folder: Path, block: str) -> bool:
    return holder(folder / "blocks" / block) is not None


def trainer(folder: Path, block: str) -> int:
    """The process that holds a block."""
    found = re.search(r"process (\d+)", holder(folder / "blocks" / block) or "")
    assert found, f"nobody holds {block}"
    return int(found.group(1))


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Run ``act`` in a thread during the block; re-raises its exception at the end."""
    wrong: list[AssertionError] = []

    def run() -> None:
        try:
            act()
        except AssertionError as error:
            wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if wrong:
        raise wrong[0]


def test_local_jobs_stopped_and_killed(overrides: list[str], tmp_path: Path) -> None:
    """Ctrl-C ends a launcher and its jobs, which save; then one job is killed and retried. Bit-identical result."""
    run, overrides = tmp_path / "run", [*overrides, "transfer.epochs=20"]  # time enough to stop it
    blockstages.run_blocks(recipe(overrides, tmp_path / "streamed", "blocks.hidden=memory"))
    command = [sys.executable, "-m", "trenchcoat", "blocks", "run", "lolcats_llama3_1_8b", "--parallel"]
    words = [*overrides, f"run.dir={run}", "blocks.jobs=1", "run.progress=plain"]
    first = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until(lambda: checkpoints(run, FIRST) and held(run, FIRST), "a checkpoint")
        pid = trainer(run, FIRST)
        with pytest.raises(
            UserError, match=r"jobs is in use by process \d+ on .*: trenchcoat blocks run lolcats_llama"
        ):
            launch.launch_blocks(recipe(overrides, run))
    finally:
        os.killpg(first.pid, signal.SIGINT)  # like a terminal: every process in the launcher's group gets it
    errors = first.communicate()[1]
    assert first.returncode == 130, errors
    assert "ending 1 jobs, which save a checkpoint first" in errors
    assert errors.splitlines()[-1].startswith("trenchcoat: stopped; run the same command again")
    assert not Path(f"/proc/{pid}").exists()
    logs = "".join(path.read_text() for path in (run / "blocks" / "jobs").glob("*/*_log.out"))
    assert "stopped; everything is saved" in logs
    assert json.loads((run / "blocks" / "jobs" / "local.json").read_text())["jobs"] == []

    def kill() -> None:
        until(lambda: held(run, FIRST), "its next job")
        os.kill(trainer(run, FIRST), signal.SIGKILL)

    with meanwhile(kill):
        found = launch.launch_blocks(recipe(overrides, run, "blocks.jobs=2"))
    require_same(learned(run), learned(tmp_path / "streamed"))
    assert found.results is not None
    failed = [text for text in log_texts(run) if "failed" in text]
    assert len(failed) == 1
    assert re.match(
        r"block 0 \(layers 0 to 2\) failed: it ended without a result: killed, or out of memory \(log .*_log.out\); "
        "retrying",
        failed[0],
    )


def test_local_jobs_are_found_again_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later launcher finds running jobs with their devices, and can also end one that ignores SIGTERM."""
    monkeypatch.setattr(jobs, "STOP_SECONDS", 3.0)
    monkeypatch.setenv("PYTHONPATH", PATHS)
    with RunLog(tmp_path, progress="off") as log:
        before = LocalJobs(tmp_path / "jobs", log, ["0", "5"])
        before.start({"a": Sleeper(), "b": Sleeper(True)})  # type: ignore[dict-item]
        until(lambda: len(list(tmp_path.glob("jobs/*/awake"))) == 2, "both jobs")
        assert before.free_slots() == 0
        later = LocalJobs(tmp_path / "jobs", log, ["0", "5", "7"])
        later.find_earlier()
        assert {name: job.device for name, job in later.running.items()} == {"a": "0", "b": "5"}
        assert later._free() == ["7"]
        assert later.ended() == []
        pids = [int(path.read_text()) for path in tmp_path.glob("jobs/*/awake")]
        threading.Timer(
            0.05, lambda: until(lambda: not before._still_running(), "the end")
        ).start()  # reaps its children
        later.stop()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of both processes")
        assert any("1 jobs were killed" in line["text"] for line in read_metrics(tmp_path))
        after = LocalJobs(tmp_path / "jobs", log, ["0"])
        after.find_earlier()
        assert after.running == {}


def test_a_block_held_by_another_process_is_waited_for(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both by the launcher, which starts no job for it, and by a job that finds its block locked."""
    monkeypatch.setattr(jobs, "LOCK_SECONDS", 0.05)
    made = recipe([*overrides, "transfer.max_steps=1", "transfer.epochs=2"], tmp_path / "run", "blocks.size=5")
    blockstages.collect_inputs(made)
    block = tmp_path / "run" / "blocks" / "layers-000-004"
    taken = threading.Event()

    def hold() -> None:
        with locked(block):
            taken.set()
            time.sleep(0.3)

    with meanwhile(hold):
        taken.wait()
        Task(made, "train", 0)()
        assert holder(block) is None
    taken.clear()
    (block / "stages" / "transfer" / "result.json").rename(tmp_path / "result.json")

    def finish() -> None:
        with locked(block):
            taken.set()
            until(lambda: any("is in use by process" in text for text in log_texts(tmp_path / "run")), "the message")
            (tmp_path / "result.json").rename(block / "stages" / "transfer" / "result.json")

    with meanwhile(finish):
        taken.wait()
        with pytest.raises(UserError, match=r"block 0 \(layers 0 to 4\) is in use by process \d+.*Stop it"):
            blockstages.run_blocks(made)
        launch.launch_blocks(made)
    assert not list((tmp_path / "run" / "blocks" / "jobs").glob("layers-*"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the fake Slurm on PATH; returns the folder of its state."""
    binaries = slurm_stand_in.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setenv("SLURM_STAND_IN", str(tmp_path / "slurm"))
    monkeypatch.setattr(jobs.SlurmJobs, "poll_seconds", 0.2)
    monkeypatch.setattr(jobs.SlurmJobs, "settle_seconds", 0.5)
    monkeypatch.setattr(submitit.SlurmJob, "watcher", type(submitit.SlurmJob.watcher)(delay_s=1))
    yield tmp_path / "slurm"
    assert (tmp_path / "slurm" / "errors").read_text() == ""


def test_slurm_jobs_left_preempted_and_found_again(
    overrides: list[str], streamed: dict[str, Tensor], slurm: Path, tmp_path: Path
) -> None:
    """Collected, trained and stitched by jobs; the launcher stops, another finds them; one hits its time limit."""
    run = tmp_path / "run"
    made = recipe(
        overrides, run, "blocks.launcher=slurm", "blocks.jobs=2",
        "blocks.slurm=[partition=gpu,time=5,cpus-per-task=4,mail-user=me]",
    )  # fmt: skip
    (slurm / "preempt").write_text(
        f"101_0 {run}/blocks/{FIRST}/checkpoints/transfer/step-*[1-9]/manifest.json TERM USR2"
    )

    def interrupt() -> None:
        until(lambda: (slurm / "101_1.pid").exists(), "the array")
        until(lambda: '"101_1"' in (run / "blocks" / "jobs" / "slurm.json").read_text(), "its record")
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(interrupt), pytest.raises(Stopped):
        launch.launch_blocks(made)
    assert "Slurm jobs 101 continue: the same command waits for them again, `scancel 101` ends them" in log_texts(run)
    found = launch.launch_blocks(made)
    require_same(learned(run), streamed)
    assert found.results is not None
    assert any("jobs of an earlier launcher are still running" in text for text in log_texts(run))
    options = {path.stem: json.loads(path.read_text()) for path in slurm.glob("*.options")}
    assert sorted(options) == ["100", "101", "102"]
    assert options["101"]["array"] == "0-1%2"
    assert all(one["gpus-per-node"] == "1" and one["time"] == "5" for one in options.values())
    assert options["101"]["partition"] == "gpu"
    assert options["101"]["mail-user"] == "me"
    assert "srun --unbuffered" in (slurm / "101.sh").read_text()
    assert " --cpus-per-task=4 " in (slurm / "101.sh").read_text()
    log = (run / "blocks" / "jobs" / "slurm" / "101_0_0_log.out").read_text()
    assert log.count("Starting with JobEnvironment") == 2
    assert "this job is timed-out" in log  # submitit counts the last five minutes as timed out
    assert log.count("Requeued job 101_0 (49 remaining timeouts)") == 1
    assert not any("failed" in text for text in log_texts(run))


def test_slurm_jobs_that_fail(
    overrides: list[str], slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of the error is reported, the job retried and the rest kept; sbatch errors are reported too."""
    made = recipe(overrides, tmp_path / "run", "blocks.launcher=slurm")
    monkeypatch.setattr(launch, "Task", lambda *given: Failing())
    with pytest.raises(UserError) as caught:
        launch.launch_blocks(made)
    assert re.match(
        r"1 of 1 jobs failed 2 times: collect: the disk is full \(log .*/101_0_log.out\)\. Finished blocks are kept",
        str(caught.value),
    )
    first = next(text for text in log_texts(tmp_path / "run") if "failed" in text)
    assert re.match(r"collect failed: the disk is full \(log .*/100_0_log.out\); retrying", first)
    with pytest.raises(UserError, match="sbatch refused the job: sbatch: error: invalid partition specified: nowhere"):
        launch.launch_blocks(
            recipe(overrides, tmp_path / "else", "blocks.launcher=slurm", "blocks.slurm=[partition=nowhere]")
        )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="`sbatch` is not installed on this machine; run on a login node"):
        launch.launch_blocks(made)


def test_a_cancelled_slurm_job_is_reported(slurm: Path, tmp_path: Path) -> None:
    """A recorded job that Slurm does not know is not waited for."""
    with RunLog(tmp_path, progress="off") as log:
        before = jobs.SlurmJobs(tmp_path / "jobs", log, parse_slurm([]), name="x", at_once=None)
        before.start({"a": Sleeper(), "b": Sleeper()})  # type: ignore[dict-item]
        until(lambda: (slurm / "100_1.pid").exists(), "the array")
        subprocess.run(["scancel", "100_1"], check=True)
        ended = until(before.ended, "the end of one")
        assert [job.name for job in ended] == ["b"]
        reason = "it ended without a result (Slurm state CANCELLED): killed, or out of memory"
        assert before.failure(ended[0]) == reason
        subprocess.run(["scancel", "100"], check=True)
        later = jobs.SlurmJobs(tmp_path / "jobs", log, parse_slurm([]), name="x", at_once=None)
        until(lambda: not (later.find_earlier() or later.running), "nothing to find")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], SlurmOptions(720, 1, None, (), {})),
        (["partition=gpu", "--account=lab"], SlurmOptions(720, 1, None, (), {"partition": "gpu", "account": "lab"})),
        (["gres=gpu:a100:1"], SlurmOptions(720, None, None, (), {"gres": "gpu:a100:1"})),
        (["gpus_per_node=0", "time=30"], SlurmOptions(30, None, None, (), {})),
        (["time=90:30", "setup=module load cuda", "setup=ulimit -n 4096"],
         SlurmOptions(91, 1, None, ("module load cuda", "ulimit -n 4096"), {})),
        (["time=12:00:00", "exclusive=true", "cpus-per-task=8"], SlurmOptions(720, 1, 8, (), {"exclusive": True})),
        (["time=2-12:30"], SlurmOptions(3630, 1, None, (), {})),
    ],
)  # fmt: skip
def test_options_of_slurm(given: list[str], wanted: SlurmOptions) -> None:
    assert parse_slurm(given) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["partition"], "blocks.slurm has 'partition': expected name=value"),
        (["partition="], "expected name=value"),
        (["partitoin=gpu"], "unknown option 'partitoin': did you mean partition?"),
        (["zzz=1"], "unknown option 'zzz': expected one of account, begin"),
        (["array=0-3"], "array is set by the launcher: blocks.jobs says how many"),
        (["partition=a", "partition=b"], "has partition twice"),
        (["time=soon"], "time must be minutes, or like 12:00:00 or 2-00"),
        (["time=0"], "at least a minute"),
        (["cpus_per_task=many"], "cpus_per_task must be a whole number of at least 1, got 'many'"),
        (["gpus_per_node=4"], "a block is trained on one GPU"),
        (["exclusive=user"], "exclusive takes no value"),
    ],
)
def test_bad_options_of_slurm(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_slurm(given)


def test_launcher_errors(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [item for item in overrides if not item.startswith("blocks.size")]
    with pytest.raises(UserError, match=r"blocks\.size is required with the launcher slurm"):
        launch.launch_blocks(recipe(plain, tmp_path / "run", "blocks.launcher=slurm"))
    with pytest.raises(UserError, match=r"blocks.epochs has 1 entries, but there are 2 blocks"):
        launch.launch_blocks(recipe(overrides, tmp_path / "run", "blocks.epochs=[1]"))
    assert cli.main(["blocks", "run", "lolcats_llama3_1_8b", "--launcher", "slurm", *overrides]) == 2
    assert "--launcher slurm is for `blocks run --parallel`" in capsys.readouterr().err
    assert (
        cli.main(["blocks", "run", "lolcats_llama3_1_8b", "--parallel", "blocks.slurm=[a]", "blocks.launcher=slurm"])
        == 2
    )
    assert "blocks.slurm has 'a'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="run it without torchrun"):
        launch.launch_blocks(recipe(overrides, tmp_path / "run"))


@pytest.mark.parametrize(
    ("device", "more", "visible", "wanted"),
    [
        ("auto", [], None, ["0", "1", "2"]),
        ("auto", ["blocks.jobs=2"], None, ["0", "1"]),
        ("cuda", ["blocks.jobs=9"], "4,GPU-5a,7", ["4", "GPU-5a", "7"]),
        ("cuda:1", [], "4,GPU-5a,7", ["GPU-5a"]),
        ("cpu", [], "4", [""]),
        ("cpu", ["blocks.jobs=3"], None, ["", "", ""]),
    ],
)
def test_devices_of_local_jobs(
    device: str, more: list[str], visible: str | None, wanted: list[str],
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One job per GPU, with the device names of the launcher's CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made: Recipe = recipe(overrides, tmp_path, *more, f"model.device={device}")
    assert launch._devices(made) == wanted
    if device.startswith("cuda:"):
        with pytest.raises(UserError, match=r"model.device=cuda:7, but this machine has 3 GPUs"):
            launch._devices(recipe(overrides, tmp_path, "model.device=cuda:7"))

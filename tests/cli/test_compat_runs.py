"""The two scripts as users call them: real runs on a tiny Llama and a small Alpaca file, alone and under torchrun."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import save_tiny_model
from trenchcoat.cli import app
from trenchcoat.cli.compat import scripts, used
from trenchcoat.cli.compat.configs import read_config
from trenchcoat.cli.compat.start import base_config, check_rope
from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.models import hub
from trenchcoat.runtime.files import load_tensors, read_json

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

MODEL = """
model: {torch_dtype: float32, rope_theta: 10000.0, pretrained_model_name_or_path: MODEL}
attention:
  attention_type: lolcats_llama_window_tk
  window_size: 8
  init_window_factor: -2.1972245773362196
  feature_map: softmax_dim
  learned_kernel: untied_head_einsum
  learned_kernel_kwargs: {feature_dim: 8}
"""
DISTILL = """
dataset: {dataset_config: {path: alpaca.json, chunk_size: 48, validation_rows: 10}}
dataloader: {batch_size: 2}
optimizer: {lr: 1e-2}
lr_scheduler: {lr_scheduler_type: none}
trainer:
  {name: distill_attention_xent_mse, mse_factor: 1000, gradient_accumulation_steps: 1, max_steps: 4, eval_steps: 2,
  max_eval_batches: 2}
"""
FINETUNE = """
base: distill
trainer: {name: default_lm}
finetune: {method: lora, kwargs: {r: 2, lora_alpha: 4, target_modules: [q_proj, v_proj]}}
"""


def _alpaca(path: Path, rows: int) -> Path:
    content = [{"instruction": f"Add 1 to {i}.", "input": "", "output": f"{i + 1}"} for i in range(rows)]
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def user_dir(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's own configurations and a small Alpaca file; the current folder."""
    for kind, name, text in (
        ("model", "tiny", MODEL.replace("MODEL", str(tiny_model_dir))),
        ("experiment", "distill", DISTILL),
        ("experiment", "finetune", FINETUNE),
    ):
        (tmp_path / "configs" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / "configs" / kind / f"{name}.yaml").write_text(text)
    _alpaca(tmp_path / "alpaca.json", 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGUMENTS = "--model_config tiny --distill_config distill --finetune_config finetune --lk_zero_init --no_cuda".split()


def _script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "llama_recipes" / "distill_llama.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def _main(stage: str, *arguments: str) -> int:
    return scripts.run_script(stage, CONFIGS, [*ARGUMENTS, *arguments])  # type: ignore[arg-type]


def test_the_two_scripts_find_each_others_run(user_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("finetune") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "distill_llama.py" in line]
    assert line.startswith("trenchcoat: the attention transfer of these arguments has not been run")

    first = _script(*ARGUMENTS, "--verbose", "--low_cpu_fsdp", cwd=user_dir)
    assert first.returncode == 0, first.stderr
    warnings = [line for line in first.stderr.splitlines() if line.startswith("trenchcoat: ")]
    assert warnings == ["trenchcoat: accepted, but without effect here: --low_cpu_fsdp, --verbose"]
    (run,) = (user_dir / "checkpoints" / "tiny").iterdir()
    assert run.name == "d=distill-f=finetune-lzi=1-s=0-r=0"
    learned = load_tensors(run / "stages" / "transfer" / "weights.safetensors")

    assert _main("finetune") == 0
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    adapter, meta = (
        load_tensors(run / "adapter" / "adapter.safetensors"),
        read_json(run / "adapter" / "trenchcoat.json"),
    )
    assert meta["lora"]["targets"] == ["q_proj", "v_proj"]
    for name, tensor in learned.items():
        assert torch.equal(adapter[name], tensor), name
    assert len(adapter) > len(learned)
    model, _ = hub.load(run, device="cpu")
    assert hub.student_config(model).window == 8
    assert load_recipe(run).lora is not None


def test_the_root_script_runs_both_stages(user_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "distill_llama.py" in {path.name for path in REPOSITORY.glob("*.py")}
    assert _main("both", "--results_dir", "results", "--no_attention_mask", "--max_finetune_steps", "2") == 0
    assert "--results_dir, --no_attention_mask" in capsys.readouterr().err
    first, second = sorted(Path("checkpoints/tiny").iterdir())
    assert second.name == f"{first.name}-mfs=2"
    assert read_json(first / "stages" / "transfer" / "result.json")["steps"] == 4
    assert read_json(second / "stages" / "lora" / "result.json")["steps"] == 2
    # a transfer that exists is used; without a --finetune_config there is stage 1 alone
    given = ("--checkpoint_dir", "others", "--load_distill_checkpoint", str(first))
    assert _main("both", *given) == 0
    (made,) = Path("others/tiny").glob("*-ldc=*")
    assert (made / "stages" / "lora" / "result.json").is_file()
    words = ["--model_config", "tiny", "--distill_config", "distill", "--no_cuda", "--checkpoint_dir", "alone"]
    assert scripts.run_script("both", CONFIGS, words) == 0
    (alone,) = Path("alone/tiny").iterdir()
    assert {path.name for path in (alone / "stages").iterdir()} == {"transfer"}
    assert scripts.run_script("both", CONFIGS, [*words, "--load_distill_checkpoint", str(first)]) == 2


def test_the_demo_and_evaluation_scripts(user_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("both") == 0
    (run,) = Path("checkpoints/tiny").iterdir()
    assert app.main(["export", str(run), "--to", "lolcats", "--out", "original"]) == 0
    files = ["--attn_mlp_checkpoint_path", "original/maps.pt", "--finetune_checkpoint_path", "original/lora.pt"]
    harness = ["--model_type", "lolcats_ckpt", "--model_config", "tiny", *files, "--task", "piqa", "--no_cache"]
    command, folder, *options = used.command_of("eval", harness, CONFIGS)
    assert (command, options) == ("eval", ["--tasks", "piqa", "--num-fewshot", "0"])
    assert "without effect here: --model_type, --no_cache" in capsys.readouterr().err
    made, mine = (load_tensors(Path(place) / "adapter.safetensors") for place in (folder, run / "adapter"))
    assert made.keys() == mine.keys()
    assert all(torch.equal(made[name], mine[name]) for name in mine)
    assert hub.student_config(hub.load(folder, device="cpu")[0]).window == 8
    demo = ["--model_config_path", "configs/model/tiny.yaml", *files, "--max_new_tokens", "3", "--benchmark"]
    assert used.command_of("demo", demo, CONFIGS) == ["chat", folder, "--max-new-tokens", "3"]  # not imported again
    mmlu = used.command_of("mmlu", ["--model_config", "tiny", "--load_finetune_checkpoint", str(run)], CONFIGS)
    assert mmlu == ["eval", str(run), "--tasks", "mmlu", "--num-fewshot", "5"]
    for words in ([], ["--attn_mlp_checkpoint_path", "absent.pt"], [*files, "--model_config", "tiny"]):
        assert used.run_use("eval", CONFIGS, words) == 2
    for script in (
        "demos/demo_lolcats_hf.py",
        "demos/llm_mmlu_eval/eval_mmlu.py",
        "lm_eval_harness/eval_lm_harness.py",
    ):
        text = (REPOSITORY / script).read_text()
        assert f"parents[{script.count('/')}]" in text


def test_a_mistake_in_stage_2_is_found_before_stage_1(user_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("both", "--finetune_lr", "-1") == 2
    assert "lora.lr" in capsys.readouterr().err
    assert not Path("checkpoints").exists()


def test_several_rates_share_one_transfer(user_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("transfer") == 0
    (run,) = Path("checkpoints/tiny").iterdir()
    assert _main("finetune", "--finetune_lr", "0.01") == 0
    other = run.with_name(f"{run.name}-fl=0.01")
    assert {path.name for path in run.parent.iterdir()} == {run.name, other.name}
    mine, theirs = (folder / "stages" / "transfer" / "weights.safetensors" for folder in (other, run))
    assert mine.read_bytes() == theirs.read_bytes()
    assert read_json(other / "stages" / "transfer" / "settings.json")["taken up from"] == str(run)
    assert load_recipe(other).lora.lr == 0.01  # type: ignore[union-attr]
    # and again: the finished stage is found, not trained
    capsys.readouterr()
    assert _main("finetune", "--finetune_lr", "0.01") == 0
    assert "already finished" in "".join(capsys.readouterr())


def test_a_transfer_of_another_folder_is_reused(user_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("transfer") == 0
    (run,) = Path("checkpoints/tiny").iterdir()
    learned = load_tensors(run / "stages" / "transfer" / "weights.safetensors")
    (run / "adapter").rename("maps-alone")
    assert _main("finetune") == 0
    for number, source in enumerate(("maps-alone", str(run / "adapter"), str(run))):
        arguments = ("--checkpoint_dir", f"others{number}", "--load_distill_checkpoint", source)
        assert _main("finetune", *arguments) == 0, source
        (made,) = Path(f"others{number}/tiny").glob("*-ldc=*")
        kept = load_tensors(made / "stages" / "transfer" / "weights.safetensors")
        assert kept.keys() == learned.keys()
        assert all(torch.equal(kept[name], learned[name]) for name in learned)

    capsys.readouterr()
    assert _main("finetune", "--tie_qk_kernels", "--load_distill_checkpoint", "maps-alone") == 1
    assert "student.tied=False; this run has True" in capsys.readouterr().err
    Path("empty").mkdir()
    assert _main("finetune", "--load_distill_checkpoint", "empty") == 1
    assert "empty holds no finished attention transfer" in capsys.readouterr().err


def test_the_baseline_without_transfer(user_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (user_dir / "configs" / "experiment" / "none.yaml").write_text("base: distill\ntrainer: {name: null}\n")
    assert _main("transfer", "--distill_config", "none") == 0
    assert "nothing to do before stage 2" in capsys.readouterr().err
    assert _main("finetune", "--distill_config", "none") == 0
    (run,) = Path("checkpoints/tiny").iterdir()
    assert (run / "stages" / "lora_only" / "result.json").is_file()
    assert (run / "adapter" / "adapter.safetensors").is_file()


def test_wrong_usage_is_one_line_and_code_2(user_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("transfer", "--learning_rate", "3") == 2
    assert capsys.readouterr().err.splitlines() == [
        "trenchcoat: unknown argument '--learning_rate': --help lists the flags"
    ]


def test_rope_of_the_file_is_checked_against_the_checkpoint(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = read_config("model", "distill_llama3_1_8b_lk_smd_fd64", [CONFIGS])
    same = save_tiny_model(tmp_path / "same", seed=0, rope_parameters=rope)
    assert check_rope(config, base_config(str(same)), overridden=False) == []
    other = base_config(str(save_tiny_model(tmp_path / "other", seed=0, rope_parameters={**rope, "factor": 32.0})))
    with pytest.raises(UserError, match=r"factor 8.0 \(the checkpoint: 32.0\)"):
        check_rope(config, other, overridden=False)
    (remark,) = check_rope(config, other, overridden=True)
    assert "the checkpoint's own RoPE is used" in remark
    assert "(factor differ)" in remark


# The README's commands under torchrun


def _sample_commands() -> list[list[str]]:
    return [shlex.split(line) for line in README.splitlines() if re.match(r"torchrun .*llama_recipes/", line)]


def test_the_sample_commands_are_the_promised_ones() -> None:
    rest = (
        "--model_config distill_llama3_1_70b_lk_smd_wtk64_fd64_w01 "
        "--distill_config distill_alpaca_clean_xent0_mse1000_lr1e-2 "
        "--finetune_config finetune_lora_qkvo_alpaca_clean_llama3_1_70b --eval_config eval_alpaca_clean --lk_zero_init "
        "--verbose --replicate 0 --seed 0 --enable_fsdp --low_cpu_fsdp"
    )
    start = "torchrun --nnodes 1 --nproc_per_node 8 llama_recipes/"
    names = ("distill_llama.py", "distill_llama_finetune.py")
    assert [" ".join(words) for words in _sample_commands()] == [f"{start}{name} {rest}" for name in names]


@pytest.fixture
def torchrun() -> Callable[[list[str]], subprocess.CompletedProcess[str]]:
    """Run a sample command on two CPU processes, with extra arguments."""

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        words[words.index("--nproc_per_node") + 1] = "2"
        environment = {
            **os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(port),
        }  # fmt: skip
        return subprocess.run(
            words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240, check=False
        )

    return run


def test_the_sample_commands_on_two_processes(
    torchrun: Callable[[list[str]], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "tiny", seed=0, max_position_embeddings=2048)
    data = _alpaca(tmp_path / "alpaca.json", 560)
    more = ["--pretrained_model_name_or_path", model, "--data_dir", data, "--checkpoint_dir", tmp_path / "checkpoints"]
    for words in _sample_commands():
        done = torchrun([*words, *map(str, more), "--no_cuda"])
        assert done.returncode == 0, done.stderr
        warnings = [line for line in done.stderr.splitlines() if "without effect here" in line]
        assert len(warnings) == 1, done.stderr
    (run,) = (tmp_path / "checkpoints" / "distill_llama3_1_70b_lk_smd_wtk64_fd64_w01").iterdir()
    for stage in ("transfer", "lora"):
        assert read_json(run / "stages" / stage / "result.json")["steps"] >= 1
    assert read_json(run / "adapter" / "trenchcoat.json")["lora"]["rank"] == 8
    recipe = load_recipe(run)
    assert (recipe.parallel.shard, recipe.transfer.accumulation) == ("full", 8)  # type: ignore[union-attr]

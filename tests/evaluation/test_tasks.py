"""`trenchcoat eval --tasks` and `trenchcoat report` from the command line, on a tiny run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trenchcoat.cli import app as cli
from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.evaluation import tasks
from trenchcoat.evaluation.task_results import TaskResults
from trenchcoat.models import hub

HYBRIDS = {
    "Qwen3_5TextConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "Qwen3NextConfig": {
        "layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "OlmoHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
"""Models with linear layers that others publish, in classes of Transformers -> sizes."""
LINEAR_HEADS = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2) | dict.fromkeys(
    ("linear_key_head_dim", "linear_value_head_dim"), 8
)
PROBE_OPTIONS = ["--probe-lengths", "1,2", "--probe-rows", "2", "--trained-length", "64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text_file: Path) -> Path:
    """A finished run that takes seconds."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    overrides = [
        f"model.path={tiny_model_dir}", "model.device=cpu", f"data.path={text_file}", "data.format=text",
        "data.seq_len=64", "data.validation_rows=10", f"data.cache_dir={folder.parent / 'cache'}", "lora.rank=2",
        "student.window=8", "student.feature_map.feature_dim=8", "transfer.max_steps=2", "lora.max_steps=2",
        "transfer.eval_batches=1", "lora.eval_batches=1", "eval.rows=4", "eval.decode_lengths=[]",
        "eval.baselines=false", "run.progress=off", f"run.dir={folder}",
    ]  # fmt: skip
    assert cli.main(["linearize", "demo", *overrides]) == 0
    return folder


def _fails(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("trenchcoat: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_tasks_and_probes_of_a_run_and_its_teacher(
    run: Path,
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["eval", str(run), "--data-dir", str(data_dir), "--teacher", "--device", "cpu"]
    assert cli.main([*common, "--tasks", "piqa,winogrande,mmlu_letters", "--num-fewshot", "1", "--limit", "3"]) == 0
    shown = capsys.readouterr().out
    assert "mmlu_letters" in shown
    assert "Scored tokens past 2W: piqa " in " ".join(shown.split())
    assert cli.main([*common, "--tasks", "needle,recall,copy", *PROBE_OPTIONS]) == 0
    results = TaskResults.load(run / "tasks.json")
    assert {"piqa", "winogrande", "mmlu_letters", "mmlu_letters_anatomy"} <= set(results.tasks)
    assert set(results.probes) == {"needle", "recall", "copy"}
    for record in results.tasks.values():
        assert set(record.scores) == {"student", "teacher"}
    for probe in results.probes.values():
        assert set(probe.shares) == {"student", "far_off", "teacher"}
        assert probe.lengths == [64, 128]
        assert all(len(rows) == 2 for cells in probe.shares["student"] for rows in cells)
    raw = json.loads((run / "tasks.json").read_text())
    assert set(raw["differences"]["piqa"]) == {"acc", "acc_norm"}
    assert raw["tasks"]["piqa"]["scores"]["student"]["metrics"]["acc"]["error"] is not None
    assert raw["tasks"]["piqa"]["settings"]["seeds"]["fewshot"] == 1234
    assert raw["environment"]["packages"]["torch"]
    assert [one["model"] for one in raw["made"][:2]] == ["student", "student"]
    report = (run / "report.md").read_text()
    assert "## Long-context probes" in report
    assert "| mmlu_letters | 1 | 171 | 100.0 % | acc |" in report
    past, scored = results.tasks["piqa"].past_2w
    assert past == scored > 0  # one example is longer than two windows of 8
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == report.count(".png)")
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_the_teacher_is_the_base_model(run: Path, tiny_model_dir: Path) -> None:
    """Given by its folder it scores as the adapter's base does: no LoRA, its own attention."""
    plan = {"tasks": ("copy",), "probe_lengths": (1.0,), "probe_rows": 3, "trained": 64, "device": "cpu"}
    recipe = load_recipe(run)
    ways = [tasks.TaskPlan(teacher=teacher, **plan) for teacher in ("", str(tiny_model_dir))]  # type: ignore[arg-type]
    own, named = (tasks.evaluate_tasks(run / "adapter", way, recipe).results for way in ways)
    assert own.probes["copy"].shares["teacher"] == named.probes["copy"].shares["teacher"]
    assert own.probes["copy"].controls["teacher"] == named.probes["copy"].controls["teacher"]


def test_a_merged_folder_has_no_teacher(
    run: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = hub.load(run, device="cpu")
    hub.save_merged(model, tmp_path / "merged", tokenizer)
    arguments = ["eval", str(tmp_path / "merged"), "--tasks", "recall", *PROBE_OPTIONS, "--device", "cpu"]
    assert "name the teacher's own folder" in _fails([*arguments, "--teacher"], 1, capsys)
    out = tmp_path / "found.json"
    assert cli.main([*arguments, "--teacher", str(tiny_model_dir), "--out", str(out)]) == 0
    assert set(TaskResults.load(out).probes["recall"].shares) == {"student", "far_off", "teacher"}
    assert not (tmp_path / "merged" / "tasks.json").exists()


@pytest.mark.parametrize("name", HYBRIDS)
def test_models_of_others_are_scored_and_compared(
    name: str, tiny_model_dir: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    config = getattr(transformers, name)(**{**sizes, **LINEAR_HEADS, **HYBRIDS[name]})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "other")
    out = tmp_path / "found.json"
    common = ["eval", str(tmp_path / "other"), "--tasks", "copy", *PROBE_OPTIONS, "--device", "cpu"]
    text = [f"data.path={text_file}", "data.format=text", "data.validation_rows=10"]
    assert cli.main([*common, "--teacher", str(tiny_model_dir), "--out", str(out), *text]) == 0
    assert set(TaskResults.load(out).probes["copy"].shares) == {"student", "teacher"}
    assert "so it holds no teacher" in _fails([*common, *text, "--teacher"], 1, capsys)


def test_mistakes_are_one_line(
    run: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = ["eval", str(run), "--device", "cpu", "--tasks"]
    assert "did you mean" in _fails([*base, "winogrand", "--data-dir", str(data_dir)], 1, capsys)
    assert "--data-dir" in _fails([*base, "mmlu_letters"], 1, capsys)
    assert "has 5 examples" in _fails(
        [*base, "mmlu_letters", "--num-fewshot", "9", "--data-dir", str(data_dir)], 1, capsys
    )
    assert "twice their length" in _fails([*base, "copy", "--probe-lengths", "4000"], 1, capsys)
    assert "give --trained-length" in _fails(["eval", str(run / "adapter"), "--tasks", "copy"], 1, capsys)
    assert "no results.json" in _fails(["report", str(run), str(tmp_path)], 1, capsys)
    (tmp_path / "tasks.json").write_text('{"format": 99}')
    assert "not a task results file" in _fails(["report", str(run), str(tmp_path)], 1, capsys)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install lm-eval" in _fails([*base, "piqa", "--data-dir", str(data_dir)], 1, capsys)
    assert "pip install lm-eval" in _fails(["lm-eval", "--help"], 1, capsys)


@pytest.mark.parametrize(
    "options",
    [["--tasks", ","], ["--tasks", "piqa", "--limit", "0"], ["--tasks", "piqa", "--batch-size", "many"],
     ["--tasks", "copy", "--probe-lengths", "0"], ["--tasks", "piqa", "--num-fewshot", "-1"]], ids=" ".join
)  # fmt: skip
def test_wrong_options_exit_2(options: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(run), *options]) == 2
    assert "expected" in capsys.readouterr().err


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text('{"format": 1, "model": "x", "tasks": {"a": {}}, "probes": {}, "made": [], "environment": {}}')
    with pytest.raises(UserError, match="not a task results file"):
        TaskResults.load(path)


def test_a_report_of_one_run_is_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    assert "report.md" in capsys.readouterr().out


def test_eval_without_tasks_scores_text_as_before(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["eval", str(run)]) == 0
    shown: Any = capsys.readouterr().out
    assert "Loss, copying and cache (W = 8)" in shown


def test_the_commands_in_evaluate_md_parse() -> None:
    page = (Path(cli.__file__).parents[3] / "docs" / "EVALUATE.md").read_text()
    lines = [line for line in page.splitlines() if re.match(r"trenchcoat (eval|report) ", line)]
    assert len(lines) >= 5
    for line in lines:
        cli._parse(shlex.split(line, comments=True)[1:])

"""The command line: exit codes, one-line errors, help."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trenchcoat.cli import app as cli
from trenchcoat.cli.terminal import guarded
from trenchcoat.config import EvalConfig, Recipe, UserError
from trenchcoat.config.package import installed_version
from trenchcoat.config.recipe_io import builtin_recipes, field_paths, load_recipe
from trenchcoat.models.families import KNOWN_FAMILIES, REASONS
from trenchcoat.runtime.distributed import FailedElsewhere


def _fails(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run in this process; the one line on standard error."""
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("trenchcoat: ")]
    assert len(lines) == 1, captured.err
    return lines[0]


def test_help_lists_the_commands_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ("demo", "linearize", "transfer", "finetune", "eval", "generate", "bench", "export"):
        assert f"\n    {name}" in text
    with pytest.raises(SystemExit):
        cli.main(["linearize", "--help"])
    text = capsys.readouterr().out
    for path, _ in field_paths(Recipe):
        assert path in text, path
    assert "Peak learning rate" in text
    with pytest.raises(SystemExit):
        cli.main(["transfer", "--help"])
    assert "lora.rank" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["linearise"], ["linearize"], ["linearize", "demo", "--nope"], ["demo", "--nope", "words"],
                  ["generate", "somewhere"], ["bench", "everything"]], ids=" ".join
)  # fmt: skip
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _fails(arguments, 2, capsys)


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    assert "trenchcoat linearize MODEL" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"trenchcoat {installed_version() or '(not installed)'} (Python ")
    assert f"torch {torch.__version__.partition('+')[0]}" in shown


@pytest.mark.parametrize(("words", "said"), [
    (["--verison"], "has no option --verison; did you mean --version?"),
    (["--gpus", "8"], "has no option --gpus; options come behind the command"),
])  # fmt: skip
def test_a_mistyped_option_in_place_of_a_command(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in _fails(words, 2, capsys)


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "lm-eval"])
def test_help_fits_a_terminal(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples, settings with their defaults, and lists of choices are not broken; something follows a heading."""
    monkeypatch.setenv("COLUMNS", "80")
    command = cli.load_commands([name])[name]
    for action in command.actions or ("",):
        with pytest.raises(SystemExit):
            cli.main([*f"{name} {action}".split(), "--help"])
        shown = capsys.readouterr().out
        kept = r"  trenchcoat |      one of |  \w+(\.\w+)+="
        assert not [line for line in shown.splitlines() if len(line) > 80 and not re.match(kept, line)]
        assert ":\n\n" not in shown.split("\nexamples:")[-1]


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "lm-eval"])
def test_every_help_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.load_commands([name])[name]
    shown = [line for each in (command, *command.actions.values()) for line in each.examples]
    assert shown
    for line in shown:
        args = cli._parse(shlex.split(line))
        if getattr(args, "recipe", None) in builtin_recipes():
            load_recipe(args.recipe, args.overrides)
    if not command.actions:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert f"examples:\n  trenchcoat {shown[0]}\n" in capsys.readouterr().out


def test_the_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in builtin_recipes())
    assert cli.main(["recipes", "demo"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["path"] == load_recipe("demo").model.path


def test_the_families_are_listed_with_what_was_tried_and_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "qwen3 tested with every student" in shown
    assert "qwen3_moe tried once" in shown
    assert "SmolLM2-135M-Instruct" in shown
    assert "bloom, mpt its scores carry ALiBi" in shown
    assert all(name in shown for name in (*KNOWN_FAMILIES, *REASONS))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.windw=8", "did you mean student.window?"),
        ("student.window=0", "student.window must be at least 1, got 0"),
        ("student.window=64", "student.window must be at most data.seq_len (48), got 64"),
        ("student.feature_map.name=hedgog", "did you mean hedgehog"),
        ("transfer.lr=-1", "transfer.lr must be above 0"),
        ("words", "override 'words' is not of the form key=value"),
    ],
)
def test_wrong_settings_exit_2_with_one_line(
    override: str, expected: str, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in _fails(["linearize", "demo", *tiny_overrides, override], 2, capsys)


def test_an_unknown_recipe_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'llama3_1_8b'" in _fails(["linearize", "llama3_1"], 2, capsys)


@pytest.mark.parametrize(
    ("content", "code"),
    [("", 2), ('{"text": "cut', 1), ('{"other": "column"}\n' * 30, 1), ("caf\xe9 \xff" * 50, 1)],
)
def test_bad_data_files_are_named(
    content: str, code: int, tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is empty is a mistake of the command line."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode("latin-1"))
    assert str(path) in _fails(["transfer", "demo", *tiny_overrides, f"data.path={path}"], code, capsys)


@pytest.mark.parametrize(("words", "said"), [
    (["--out", "{file}"], "run.dir: {file} is a file; give the path of a folder"),
    (["--out", "{file}/run"], "run.dir: {file} is a file, so {file}/run cannot be written"),
    (["--out", ""], "--out is empty"),
    (["--keep", " "], "--keep is empty"),
    (["--data", ""], "--data is empty"),
    (["--keep", "-1"], "number of groups such as 12, got -1"),
])  # fmt: skip
def test_a_value_that_cannot_be_meant(
    words: list[str], said: str, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    given = [word.format(file=file) for word in words]
    assert cli.main(["transfer", "demo", *tiny_overrides, *given]) in (1, 2)
    assert said.format(file=file) in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_more_groups_than_the_model_has_are_refused_before_they_are_measured(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["student.keep=99", "select.seq_len=40"]
    assert cli.main(["transfer", "demo", *tiny_overrides, *more]) == 1
    shown = capsys.readouterr()
    assert "student.keep=99 must be below the number of key/value groups of the model" in shown.err
    assert "scoring" not in shown.out + shown.err


def test_a_run_that_has_learned_nothing_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    (run / "recipe.yaml").write_text("lora: null")
    for command in (["generate", str(run), "--prompt", "x"], ["export", str(run), "--out", str(tmp_path / "out")]):
        said = _fails(command, 1, capsys)
        assert f"no stage is finished; go on with: trenchcoat linearize '{run}'" in said


def test_after_a_transfer_the_next_command_is_shown(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    assert cli.main(["transfer", "demo", *tiny_overrides, "--out", str(run)]) == 0
    command = f"trenchcoat finetune '{run}'"
    assert f"the next stage is: {command}\n" in capsys.readouterr().out
    assert cli.main([*shlex.split(command)[1:], "run.progress=off"]) == 0


def test_mistakes_that_show_later_exit_1(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    assert absent in _fails(["transfer", "demo", *tiny_overrides, f"model.path={absent}"], 1, capsys)
    missing = _fails(["transfer", "demo", *tiny_overrides, "student.feature_map.skip=true",
                      "student.feature_map.feature_dim=7"], 1, capsys)  # fmt: skip
    assert "feature_dim" in missing
    assert absent in _fails(["generate", absent, "--prompt", "x"], 1, capsys)
    assert absent in _fails(["export", absent, "--out", str(tmp_path / "out")], 1, capsys)


def test_an_unsupported_family_exits_1_with_its_name(
    tiny_overrides: list[str], tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "gpt2" in _fails(["transfer", "demo", *tiny_overrides, f"model.path={folder}"], 1, capsys)


def test_debug_shows_the_traceback(tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["linearize", "demo", *tiny_overrides, "--debug", "student.window=0"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_overrides_may_come_after_options() -> None:
    args = cli._parse(["linearize", "demo", "--debug", "transfer.lr=1", "lora=null"])
    assert args.overrides == ["transfer.lr=1", "lora=null"]
    assert args.debug


def test_a_keyboard_interrupt_exits_130_and_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from trenchcoat.conversion import stages

    def interrupted(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "transfer", interrupted)
    assert "run the same command again" in _fails(["transfer", "demo", *tiny_overrides], 130, capsys)


def test_ctrl_c_saves_stops_cleanly_and_says_so(tiny_overrides: list[str], tmp_path: Path) -> None:
    log = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "trenchcoat", "transfer", "demo", *tiny_overrides,
               "transfer.max_steps=100000", "transfer.eval_every=1000", "transfer.save_every=1000"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not (log.is_file() and '"step": 3,' in log.read_text()):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert list((tmp_path / "run" / "checkpoints" / "transfer").glob("step-*"))


def test_linearize_and_generate_in_separate_processes(
    trenchcoat_cli: Callable[..., Any], tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    tiny_overrides += ["eval.baselines=false", "eval.decode_lengths=[]"]
    done = trenchcoat_cli("linearize", "demo", *tiny_overrides)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "report" in done.stdout
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert "transfer_lora" in rows
    written = trenchcoat_cli("generate", run, "--prompt", "The coat", "--max-new-tokens", 4)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("The coat")
    assert cli.main(["eval", str(run), "eval.rows=2"]) == 0
    refused = _fails(["transfer", "demo", *tiny_overrides, "transfer.lr=0.5"], 1, capsys)
    assert "transfer.lr was 0.01, now 0.5" in refused


def test_each_process_names_itself_and_does_not_repeat_the_main_ones_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: UserError) -> int:
        def action() -> None:
            raise error

        return guarded(action, debug=False)

    assert fail(UserError("no such file")) == 1
    monkeypatch.setenv("RANK", "3")
    assert fail(UserError("this node has no such file")) == 1
    assert fail(FailedElsewhere("the disk is full")) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["trenchcoat: no such file", "trenchcoat, process 3: this node has no such file"]


def test_a_folder_from_elsewhere_is_scored_with_the_settings_own_defaults(tmp_path: Path) -> None:
    args = cli._parse(["eval", str(tmp_path), "eval.rows=3"])
    found = args.command.recipe(args)
    assert found == Recipe(transfer=None, lora=None, eval=EvalConfig(rows=3))
    assert (found.model.device, found.data.bos) == ("auto", "auto")
    (tmp_path / "recipe.yaml").write_text("{lora: null, eval: {rows: 7}}")
    assert args.command.recipe(cli._parse(["eval", str(tmp_path)])).eval.rows == 7


def test_a_model_is_linearized_by_its_name(
    tiny_model_dir: Path, text_file: Path, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shortcuts = ("model.path=", "data.path=", "run.dir=", "student.keep=")
    more = [item for item in tiny_overrides if not item.startswith(shortcuts)]
    named = ["--data", str(text_file), "--keep", "1 groups", "--out", str(tmp_path / "out"), "select.seq_len=40"]
    assert cli.main(["linearize", str(tiny_model_dir), *named, *more, "eval.decode_lengths=[]"]) == 0
    recipe = load_recipe(tmp_path / "out")
    assert len(recipe.student.keep) == 1
    assert "." in recipe.student.keep[0]
    assert recipe.model.path == str(tiny_model_dir)
    assert "key/value groups each" in capsys.readouterr().err

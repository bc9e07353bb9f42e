"""A command that fails before it has done anything leaves no folder behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from trenchcoat.cli.app import main


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("transfer demo", ["model.path=absent"]),
        ("transfer demo", ["data.path=absent.jsonl"]),
        ("transfer demo", ["model.device=cuda:99"]),
        ("transfer demo", ["data.seq_len=100000"]),
        ("finetune demo", []),
        ("finetune demo", ["student.keep=1 groups", "select.seq_len=40"]),
        ("linearize demo", ["lora.targets=[nope]"]),
        ("linearize demo", ["student.keep=[99]"]),
        ("select demo", ["data.path=absent.jsonl", "student.keep=1 groups", "select.seq_len=40"]),
        ("blocks run demo", ["data.path=absent.jsonl"]),
        ("blocks collect demo", ["data.path=absent.jsonl"]),
        ("blocks train demo --block 0", ["data.path=absent.jsonl"]),
        ("blocks stitch demo", []),
    ],
)
def test_a_failed_start_leaves_no_folder(
    command: str, more: list[str], tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "new" / "folders" / "run"
    code = main([*command.split(), *tiny_overrides, *more, f"run.dir={place}"])
    assert code in (1, 2), capsys.readouterr().err
    assert not (tmp_path / "new").exists(), sorted(place.rglob("*"))


def test_what_was_there_before_stays(tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main(["transfer", "demo", *tiny_overrides, "model.path=absent", f"run.dir={tmp_path / 'run'}"]) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_what_a_stage_has_learned_stays(tiny_overrides: list[str], tmp_path: Path) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    assert main(["transfer", "demo", *tiny_overrides, run]) == 0
    before = sorted(tmp_path.rglob("*"))
    assert main(["finetune", "demo", *tiny_overrides, run, "lora.targets=[nope]"]) == 1
    assert set(before) <= set(tmp_path.rglob("*"))

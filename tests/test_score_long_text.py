"""scripts/score_long_text.py: what it says of models whose scores are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trenchcoat
from conftest import script_module
from trenchcoat.config import StudentConfig
from trenchcoat.evaluation.scoring import score, score_copies
from trenchcoat.evaluation.statistics import gap_closed
from trenchcoat.models.attach import set_kept_log_scale
from trenchcoat.models.embedded import stdlib_documents, teacher_dir

ROWS, TOKENS = 6, 384


def test_the_whole_model_closes_everything_and_the_window_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, books, out = tmp_path / "whole", tmp_path / "books.jsonl", tmp_path / "scores.json"
    texts = [text for _, text in stdlib_documents("validation") if len(text) > 10_000][:ROWS]
    books.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(teacher_dir(), dtype=torch.float32)
    trenchcoat.attach_students(model, StudentConfig(name="window_sinks", window=2 * TOKENS))
    trenchcoat.set_mode(model, "student")
    model.save_pretrained(whole)
    AutoTokenizer.from_pretrained(teacher_dir()).save_pretrained(whole)
    (nothing := tmp_path / "selection.json").write_text('{"kept": []}')

    script = script_module("score_long_text")
    monkeypatch.setattr(script, "TEXTS", {"text": (ROWS, TOKENS, 2 * script.BASELINE.window)})
    monkeypatch.setattr(script, "COPIES", {"copy": TOKENS})
    arguments = [str(teacher_dir()), str(books), str(whole), "--untrained", str(nothing), "--window", "64"]
    arguments += ["--long", "512"]
    monkeypatch.setattr(sys, "argv", ["score_long_text.py", *arguments, "--below", "64", "--out", str(out)])
    script.main()

    found, table = json.loads(out.read_text()), capsys.readouterr().out
    kept_all, kept_none = found[str(whole)], found[f"0 groups of {nothing}, window 64, untrained"]
    long = "512 tokens, past 128"
    assert set(kept_all) == set(kept_none) == {"text", long, "copy", script.SHIFT}
    for column in ("text", long, "copy"):
        assert kept_all[column]["value"] == pytest.approx(1.0, abs=1e-3)
        assert kept_none[column]["value"] == pytest.approx(0.0, abs=1e-3)
        assert f" {column} |" in table
    for row in found.values():
        assert abs(row[script.SHIFT]["value"]) < 1e-4


def test_several_lengths_and_a_log_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shares as of rows and models made by hand."""
    books, out, selection = tmp_path / "books.jsonl", tmp_path / "scores.json", tmp_path / "selection.json"
    texts = [text for _, text in stdlib_documents("validation") if len(text) > 10_000][:ROWS]
    books.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    selection.write_text('{"kept": ["3.0", "1.1"]}')
    script = script_module("score_long_text")
    arguments = [str(teacher_dir()), str(books), "--untrained", str(selection), "--window", "8", "--below", "16"]
    arguments += ["--lengths", "64", "256", "--rows", "3", "--baseline-window", "4", "--log-scale", "50"]
    monkeypatch.setattr(sys, "argv", ["score_long_text.py", *arguments, "--out", str(out)])
    script.main()
    found = json.loads(out.read_text())

    tokenizer = AutoTokenizer.from_pretrained(teacher_dir())
    documents = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    rows = torch.stack([document[len(document) // 2 :][:256] for document in documents[:3]])
    halves = {tokens: torch.stack([d[len(d) // 2 :][: tokens // 2] for d in documents[:3]]) for tokens in (64, 256)}

    def losses(student: StudentConfig | None, base: float | None = None) -> dict[str, Any]:
        """By column."""
        model = AutoModelForCausalLM.from_pretrained(teacher_dir(), dtype=torch.float32)
        if student is not None:
            trenchcoat.attach_students(model, student)
            trenchcoat.set_mode(model, "student")
            set_kept_log_scale(model, base)
        texts = {f"{n} tokens, past {n // 4}": score(model, rows[:, :n], window=n // 8).far for n in (64, 256)}
        copies = {f"copy, {n // 2} + {n // 2}": score_copies(model, part.repeat(1, 2))[0] for n, part in halves.items()}
        return {**texts, **copies}

    teacher, window = losses(None), losses(StudentConfig(name="window_sinks", window=4, sinks=4))
    name = f"2 groups of {selection}, window 8, untrained"
    for suffix, base in (("", None), (", log scale 50", 50.0)):
        kept = losses(StudentConfig(name="window_sinks", window=8, sinks=4, keep=("3.0", "1.1")), base)
        row = found[name + suffix]
        assert set(row) <= {*kept, script.SHIFT}
        for column in kept:
            share = gap_closed(kept[column], window[column], teacher[column])
            assert (share is None) == (column not in row)
            if share is not None:
                assert row[column] == pytest.approx(vars(share), abs=1e-3)
    assert len(set(found[name]) & set(teacher)) >= 3

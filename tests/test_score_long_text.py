"""scripts/score_long_text.py: what it says of models whose scores are known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trenchcoat
from trenchcoat.config import StudentConfig
from trenchcoat.models.embedded import stdlib_documents, teacher_dir

SCRIPT = Path(__file__).parents[1] / "scripts" / "score_long_text.py"
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

    spec = importlib.util.spec_from_file_location("score_long_text", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
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

"""The stages as Python functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trenchcoat.config import UserError
from trenchcoat.conversion import api, stages
from trenchcoat.models.attach import students_of
from trenchcoat.models.hub import load
from trenchcoat.models.lora import has_lora

SETTINGS: dict[str, Any] = {
    "student": {"window": 8, "feature_map": {"feature_dim": 8}},
    "select": {"seq_len": 40, "rows": 1, "frontier_rows": 2},
    "transfer": {"max_steps": 2, "eval_every": 2, "eval_batches": 1, "warmup_steps": 0},
    "lora": {
        "max_steps": 2, "seq_len": None, "eval_every": 2, "eval_batches": 1, "warmup_steps": 0, "rank": 2, "lr": 5e-4,
    },
    "data.seq_len": 48,
    "eval": {"seq_len": 40, "rows": 2, "copy_rows": 2, "length_factors": [1], "decode_lengths": []},
    "run": {"progress": "off"},
}  # fmt: skip


@pytest.fixture
def texts(text_file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in text_file.read_text(encoding="utf-8").splitlines()]


def _model(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_a_model_in_memory_is_converted_and_its_run_opens_elsewhere(
    tiny_model_dir: Path, texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = _model(tiny_model_dir)
    out = tmp_path / "run"
    converted, results = api.linearize(model, tokenizer, texts, keep=1, out=out, **SETTINGS)
    assert converted is model
    assert results.model["kept groups"] == 1
    assert {"teacher", "window_sinks", "kept_window_sinks", "transfer_lora"} <= results.rows.keys()
    ids = torch.arange(30)[None] % 50
    opened, _ = load(out)
    torch.testing.assert_close(converted(ids).logits, opened(ids).logits)
    assert not (out / "base").exists()
    converted.save_pretrained(tmp_path / "given")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "given")(ids).logits, opened(ids).logits)
    given, words = load(tmp_path / "given")
    given.save_pretrained(tmp_path / "given again")
    again, _ = load(tmp_path / "given again")
    torch.testing.assert_close(again(ids).logits, opened(ids).logits)
    assert words("coat").input_ids == tokenizer("coat").input_ids
    again = api.evaluate(out, eval={"rows": 3})
    assert len(again.rows["teacher"].all.sums) == 3


def test_the_parts_one_after_another_give_the_same(tiny_model_dir: Path, texts: list[str], tmp_path: Path) -> None:
    path = str(tiny_model_dir)
    rows = [{"text": text} for text in texts]
    chosen = api.select(path, None, rows, keep=1, out=tmp_path / "parts", **SETTINGS)
    assert len(chosen.kept) == 1
    first = api.transfer(path, None, rows, keep=1, out=tmp_path / "parts", **SETTINGS)
    second = api.finetune(path, None, rows, keep=1, out=tmp_path / "parts", **SETTINGS)
    whole, _ = api.linearize(path, None, rows, keep=1, out=tmp_path / "whole", **SETTINGS)
    ids = torch.arange(30)[None] % 50
    torch.testing.assert_close(second(ids).logits, whole(ids).logits)
    assert not torch.equal(first(ids).logits, second(ids).logits)


def test_changed_weights_are_saved_with_the_run(tiny_model_dir: Path, texts: list[str], tmp_path: Path) -> None:
    model, tokenizer = _model(tiny_model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    with pytest.raises(UserError, match=r"saved with the run: give out="):
        api.transfer(model, tokenizer, texts, keep="none", **SETTINGS)
    settings = {**SETTINGS, "lora": None}
    converted = api.transfer(model, tokenizer, texts, keep="none", out=tmp_path / "run", **settings)
    opened, _ = load(tmp_path / "run")
    ids = torch.arange(30)[None] % 50
    torch.testing.assert_close(converted(ids).logits, opened(ids).logits)
    with pytest.raises(UserError, match="linearized already"):
        api.transfer(converted, tokenizer, texts, out=tmp_path / "other")


def test_mistakes_are_named_before_anything_is_trained(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = _model(tiny_model_dir)
    with pytest.raises(UserError, match="needs its tokenizer"):
        api.linearize(model)
    with pytest.raises(UserError, match="data has no rows"):
        api.linearize(model, tokenizer, [], out=tmp_path / "run")
    with pytest.raises(UserError, match=r"unknown key transfer\.steps"):
        api.linearize(model, tokenizer, ["text"], out=tmp_path / "run", transfer={"steps": 3})
    with pytest.raises(UserError, match="no such folder or file"):
        api.linearize("nowhere")
    with pytest.raises(UserError, match="model must be a Transformers model, a path or a hub id, got int"):
        api.linearize(3, tokenizer, ["text"])
    with pytest.raises(UserError, match="data is a int; expected a path"):
        api.linearize(model, tokenizer, 3, out=tmp_path / "run")
    with pytest.raises(UserError, match="row 2 of data is a int; expected a text"):
        api.linearize(model, tokenizer, ["text", 3], out=tmp_path / "run")
    for rows in (["text"], [{"a": 1}]):
        with pytest.raises(UserError):
            api.transfer(model, tokenizer, rows, out=tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run").exists()
    assert not students_of(model)


def test_a_call_that_was_stopped_gives_the_model_back_and_continues_when_repeated(
    tiny_model_dir: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = _model(tiny_model_dir)
    ids = torch.arange(30)[None] % 50
    before = model(ids).logits

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    own = stages.ModelVariants.export
    monkeypatch.setattr(stages.ModelVariants, "export", stopped)  # after stage 2
    with pytest.raises(KeyboardInterrupt):
        api.finetune(model, tokenizer, texts, keep=[0.1], out=tmp_path / "run", **{**SETTINGS, "transfer": None})
    monkeypatch.setattr(stages.ModelVariants, "export", own)
    assert torch.equal(model(ids).logits, before)
    assert not students_of(model)
    assert not has_lora(model)
    api.finetune(model, tokenizer, texts, keep=[0.1], out=tmp_path / "run", **{**SETTINGS, "transfer": None})
    assert has_lora(model)

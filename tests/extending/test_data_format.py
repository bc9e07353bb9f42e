"""A new data format: one class and one line in ``FORMATS``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trenchcoat.config import DataConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.data.formats import FORMATS, column_text
from trenchcoat.data.load import load_batches
from trenchcoat.data.samples import Segment


class QuestionAnswer:
    """{question, answer}; the loss is on the answer."""

    def columns(self, cfg: DataConfig) -> str:
        """Both."""
        return "question and answer"

    def matches(self, found: set[str], cfg: DataConfig) -> bool:
        """It has both."""
        return {"question", "answer"} <= found

    def segments(self, row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
        """Q, then A."""
        question = f"Q: {column_text(row, 'question')}\nA: "
        return [(question, not cfg.mask_prompt), (column_text(row, "answer"), True)]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "qa", QuestionAnswer())


def batches(path: Path, tmp_path: Path, tokenizer: Any, **fields: Any) -> Any:
    cfg = DataConfig(
        path=str(path), seq_len=64, packing="contiguous", validation_rows=1, cache_dir=str(tmp_path / "cache"), **fields
    )
    return load_batches(cfg, tokenizer, batch_size=1, seed=0)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["qa", "auto"])
def test_rows_of_a_new_format_become_batches(name: str, tmp_path: Path, tokenizer: Any) -> None:
    recipe = load_recipe("demo", [f"data.format={name}"])
    assert recipe.data.format == name
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {i}?", "answer": f"The number {i}."} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = batches(path, tmp_path, tokenizer, format=name)
    assert made.rows("train") == 2
    batch = made.validation_batch(0)
    ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
    text = tokenizer.decode(ids[batch["attention_mask"][0].numpy() == 1].tolist(), skip_special_tokens=True)
    assert text == "Q: What is 0?\nA: The number 0."
    counted = tokenizer.decode(ids[np.flatnonzero(labels != -100)].tolist(), skip_special_tokens=True)
    assert counted == "The number 0."


@pytest.mark.usefixtures("registered")
def test_its_columns_are_named_when_no_format_matches(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Why?"}) + "\n")
    with pytest.raises(UserError, match=r"found the columns question; expected .*, or question and answer: set"):
        batches(path, tmp_path, tokenizer)
    with pytest.raises(UserError, match="expected a column 'answer'; found the columns question"):
        batches(path, tmp_path, tokenizer, format="qa")


def test_a_format_that_is_not_registered_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data.format must be one of auto, alpaca, text, chat, got 'qa'"):
        batches(tmp_path / "rows.jsonl", tmp_path, tokenizer, format="qa")

"""Effective sequence length against the naive formula on full attention maps, and cached rankings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny_families import FAMILIES, logits, tiny_model, tokens
from trenchcoat.config import StudentConfig
from trenchcoat.data import esl
from trenchcoat.data.esl import EslRanking, effective_lengths
from trenchcoat.data.table import TableBuilder, TokenTable
from trenchcoat.models import softmax_rows
from trenchcoat.models.attach import attach_students
from trenchcoat.models.families import UnsupportedFamilyError
from trenchcoat.runtime.runlog import RunLog


def naive(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Equation 9 on the maps that the model's eager attention returns, [B]."""
    with torch.no_grad():
        maps = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, output_attentions=True).attentions
    place = torch.arange(ids_BT.shape[1])
    distance = place[:, None] - place
    per_position = torch.stack([(a.double() * distance).sum(-1).mean(1) for a in maps]).mean(0)
    return (per_position * mask_BT).sum(1) / mask_BT.sum(1)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_formula_on_full_maps(family: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, attn_implementation="eager")
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, :7] = 0
        mask = mask.flip(1) if padding == "right" else mask
    monkeypatch.setattr(softmax_rows, "WEIGHTS_AT_ONCE", 2 * 4 * 40 * 7)  # blocks of 7 queries
    found = effective_lengths(model, ids, mask)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive(model, ids, mask), rtol=1e-5, atol=1e-5)
    assert (found > 1).all()


def test_padding_and_the_own_implementation_do_not_matter_and_the_model_is_unchanged() -> None:
    model = tiny_model("llama")
    ids = tokens(2, 33)
    before, implementation = logits(model, ids), model.config._attn_implementation
    alone = torch.cat([effective_lengths(model, ids[:1]), effective_lengths(model, ids[1:, :20])])
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    torch.testing.assert_close(effective_lengths(model, ids, mask), alone)
    eager = effective_lengths(tiny_model("llama", attn_implementation="eager"), ids, mask)
    torch.testing.assert_close(eager, alone, rtol=1e-5, atol=1e-6)
    assert implementation == model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, ids), before)
    assert not any(hasattr(m, "attention_call") or hasattr(m, "teacher_attention") for m in model.modules())


def test_known_lengths() -> None:
    tied = torch.zeros(1, 2, 9, 4)  # equal scores: each query looks back over all it sees, evenly
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    real = torch.ones(1, 9, dtype=torch.bool)
    even = esl.layer_esl(tied, tied[:, :1], lambda a, b: causal[a:b], real, scale=1.0)
    assert even.tolist() == pytest.approx([np.mean([i / 2 for i in range(9)])])
    itself = esl.layer_esl(tied, tied[:, :1], lambda a, b: torch.eye(9).bool()[a:b], real, scale=1.0)
    assert itself.tolist() == [0.0]


def test_no_full_map_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), tokens(1, 256)
    monkeypatch.setattr(softmax_rows, "WEIGHTS_AT_ONCE", 4 * 256 * 8)
    largest = 0
    matmul = torch.matmul

    def watched(*arguments: Tensor) -> Tensor:
        nonlocal largest
        made = matmul(*arguments)
        largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(softmax_rows.torch, "matmul", watched)
    effective_lengths(model, ids)
    assert largest == 4 * 256 * 8  # of 4 * 256 * 256


def test_a_model_with_students_and_one_without_attention_are_refused() -> None:
    model = tiny_model("llama")
    attach_students(model, StudentConfig(window=4))
    with pytest.raises(ValueError, match="remove the students first"):
        effective_lengths(model, tokens(1, 8))
    with pytest.raises(UnsupportedFamilyError):
        effective_lengths(torch.nn.Linear(2, 2), tokens(1, 8))


@pytest.fixture
def table() -> TokenTable:
    """Twelve samples of 5 to 60 tokens and an empty one."""
    builder = TableBuilder()
    lengths = [30, 5, 60, 44, 12, 0, 9, 51, 23, 17, 38, 8, 26]
    for i, length in enumerate(lengths):
        builder.extend(
            [(tokens(1, max(length, 1), seed=i)[0, :length].numpy().astype(np.int32), np.ones(length, bool))]
        )
    return builder.table()


def ranking(folder: Path, model: Any, *, seq_len: int = 40, base: str = "base") -> tuple[EslRanking, RunLog]:
    log = RunLog(folder / "run", progress="off")
    return EslRanking(lambda: model, base, seq_len=seq_len, folder=folder / "cache", log=log), log


def refuse() -> Any:
    raise AssertionError("the model was requested")


def test_a_ranking_is_each_samples_own_number_and_is_cached(
    tmp_path: Path, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(esl, "BATCH_TOKENS", 100)
    rows = np.array([0, 2, 3, 7, 11, 12])
    rank, log = ranking(tmp_path, model)
    with log:
        found = rank("key", table, rows)
        again = rank("key", table, rows[::-1].copy())
    for row, score in zip(rows, found, strict=True):
        ids = torch.from_numpy(table.tokens[table.offsets[row] : table.offsets[row + 1]][:40].astype(np.int64))
        assert score == pytest.approx(effective_lengths(model, ids[None]).item(), rel=1e-6)
    assert again.tolist() == found[::-1].tolist()
    kept, log = ranking(tmp_path, None)
    kept._model = refuse
    with log:
        assert kept("key", table, rows).tolist() == found.tolist()
        with pytest.raises(AssertionError, match="was requested"):
            kept("key", table, np.array([4]))
        with pytest.raises(AssertionError, match="was requested"):
            kept("other key", table, rows)
    for changed in ({"base": "another"}, {"seq_len": 20}):
        fresh, log = ranking(tmp_path, None, **changed)  # type: ignore[arg-type]
        fresh._model = refuse
        with log, pytest.raises(AssertionError, match="was requested"):
            fresh("key", table, rows)


def test_an_interrupted_ranking_resumes(tmp_path: Path, table: TokenTable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(esl, "BATCH_TOKENS", 50)
    monkeypatch.setattr(esl, "SAVE_EVERY", 2)
    rows = np.flatnonzero(np.diff(table.offsets))
    whole, log = ranking(tmp_path / "whole", model)
    with log:
        expected = whole("key", table, rows)
    real, calls = esl.effective_lengths, 0

    def stop_late(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(esl, "effective_lengths", stop_late)
    stopped, log = ranking(tmp_path, model)
    with log, pytest.raises(KeyboardInterrupt):
        stopped("key", table, rows)
    [file] = (tmp_path / "cache" / "esl").iterdir()
    calls = -100
    resumed, log = ranking(tmp_path, model)
    with log:
        assert resumed("key", table, rows).tolist() == expected.tolist()
        assert -100 < calls < -100 + len(rows) - 2
    file.write_bytes(file.read_bytes()[:-5])
    damaged, log = ranking(tmp_path, model)
    with log:
        assert damaged("key", table, rows).tolist() == expected.tolist()


def test_a_ranking_that_cannot_be_written_is_a_warning(tmp_path: Path, table: TokenTable) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    rank, log = ranking(tmp_path, tiny_model("llama"))
    with log:
        assert np.isfinite(rank("key", table, np.array([0, 1]))).all()
    lines = [json.loads(line) for line in log.metrics_path.read_text().splitlines()]
    assert any("the ranking is not cached, set data.cache_dir" in line.get("text", "") for line in lines)


SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.skipif(not (SHARED / "models/stories260K").is_dir(), reason="no shared stories260K model")
def test_a_real_model_looks_back_further_in_longer_text() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models/stories260K", attn_implementation="eager")
    story = json.loads((SHARED / "data/tinystories/heldout.jsonl").read_text().splitlines()[0])["text"]
    ids = tokenizer(story, return_tensors="pt").input_ids[:, :200]
    long, short = effective_lengths(model, ids), effective_lengths(model, ids[:, :40])
    assert 0 < short < long < 100
    torch.testing.assert_close(long, naive(model, ids, torch.ones_like(ids)), rtol=1e-5, atol=1e-5)

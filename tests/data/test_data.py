"""Loading, holding out, packing, order and the token cache. The byte tokenizer makes every count exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import trenchcoat.data.tokens
from trenchcoat.config import DataConfig, UserError
from trenchcoat.data import sources
from trenchcoat.data.batches import Batches
from trenchcoat.data.formats import PROMPT_WITHOUT_INPUT
from trenchcoat.data.load import FEW_ROWS, load_batches
from trenchcoat.data.packing import pack
from trenchcoat.data.table import TokenTable
from trenchcoat.models.embedded import stdlib_documents

SHARED = Path(__file__).parents[3] / "shared"
Load = Callable[..., Batches]


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Load:
    """``load(rows_or_path, batch_size=..., seed=..., **DataConfig fields)`` with a separate cache."""

    def run(source: Any, *, batch_size: int = 2, seed: int = 0, name: str = "rows.jsonl", **fields: Any) -> Batches:
        if not isinstance(source, str | Path):
            path = tmp_path / name
            path.write_text("".join(json.dumps(row) + "\n" for row in source), encoding="utf-8")
            source = path
        own = {"cache_dir": str(tmp_path / "cache"), "validation_rows": 1, "seq_len": 16, "bos": "always"}
        fields = {**own, **fields}
        return load_batches(DataConfig(path=str(source), **fields), tokenizer, batch_size=batch_size, seed=seed)

    return run


def text_of(row: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of a row, without marks and padding."""
    return str(tokenizer.decode(row.tolist(), skip_special_tokens=True))


def texts(*lengths: int) -> list[dict[str, str]]:
    """Rows whose text is one letter, a, b, c, ..., repeated."""
    return [{"text": chr(ord("a") + i % 26) * length} for i, length in enumerate(lengths)]


def all_rows(batches: Batches) -> list[list[int]]:
    """Every training row of the first epoch, as token ids."""
    rows = [row.tolist() for i in range(len(batches)) for row in batches.train_batch(i)["input_ids"]]
    return rows[: batches.rows("train")]


def test_batches_have_the_promised_shape_and_types(load: Load) -> None:
    batches = load(texts(*[30] * 10))
    batch = batches.train_batch(0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(value.shape == (2, 16) and value.dtype == torch.int64 for value in batch.values())
    assert batch["attention_mask"].min() == 1
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_across_samples_packs_one_stream_and_counts_what_is_cut(load: Load, tokenizer: PreTrainedTokenizerFast) -> None:
    batches = load(texts(20, 5, 7, 9, 20), batch_size=1)
    stream = [i for row in texts(20, 5, 7, 9, 20)[1:] for i in [0, *tokenizer(row["text"])["input_ids"], 1]]
    assert len(stream) == 49
    assert sorted(all_rows(batches)) == sorted(stream[i : i + 16] for i in (0, 16, 32))
    assert batches.counts["train/tokens"] == 48
    assert batches.counts["train/tokens_cut"] == 1
    assert batches.counts["rows_read"] == 5


def test_contiguous_rows_never_mix_samples_and_are_padded(load: Load) -> None:
    batches = load(texts(20, 4, 40, 14), packing="contiguous", batch_size=1)
    seen = []
    for i in range(len(batches)):
        batch = batches.train_batch(i)
        real = batch["attention_mask"][0].bool()
        length = int(real.sum())
        assert real[:length].all()
        assert not real[length:].any()
        assert (batch["labels"][0][~real] == -100).all()
        assert (batch["input_ids"][0][~real] == 2).all()
        assert len({t for t in batch["input_ids"][0][real].tolist() if t > 2}) == 1
        seen.append(length)
    # 4 + 2 marks; 40 + 2 = 16 + 16 + 10; 14 + 2
    assert sorted(seen) == [6, 10, 16, 16, 16]
    assert batches.counts["train/tokens_cut"] == 0


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    seq_len=st.integers(2, 17),
    contiguous=st.booleans(),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_packing_loses_nothing_but_what_it_counts(
    lengths: list[int], seq_len: int, contiguous: bool, seed: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).numpy()
    counted = (torch.rand(int(offsets[-1]), generator=generator) < 0.2).numpy()
    tokens = torch.arange(int(offsets[-1]), dtype=torch.int32).numpy()
    keep = (torch.rand(len(lengths), generator=generator) < share).numpy()
    packed = pack(tokens, counted, offsets, seq_len=seq_len, contiguous=contiguous, keep=keep)
    samples = [list(range(a, b)) for (a, b), kept in zip(pairwise(offsets.tolist()), keep, strict=True) if kept]
    cut = 0
    expected: list[list[int]] = []
    for piece in samples if contiguous else [[token for sample in samples for token in sample]]:
        rows = [piece[i : i + seq_len] for i in range(0, len(piece), seq_len)]
        if not contiguous and rows and len(rows[-1]) < seq_len:
            cut = len(rows.pop())
        expected += rows
    kept_rows = [row for row in expected if counted[row[1:]].any()]
    assert [packed.row(i)[0].tolist() for i in range(len(packed))] == kept_rows
    assert [packed.row(i)[1].tolist() for i in range(len(packed))] == [counted[row].tolist() for row in kept_rows]
    assert packed.tokens_cut == cut
    assert packed.rows_masked == len(expected) - len(kept_rows)


def test_rows_without_a_label_are_dropped_and_counted(load: Load) -> None:
    rows = [{"instruction": "x" * 60, "output": "y"}] * 3
    prompt = 1 + len(PROMPT_WITHOUT_INPUT.format(instruction="x" * 60))
    batches = load(rows, packing="contiguous", batch_size=1)
    whole = -(-(prompt + 2) // 16)
    assert batches.counts["train/rows"] == 2
    assert batches.counts["train/rows_masked"] == 2 * (whole - 1)
    assert all((batches.train_batch(i)["labels"][:, 1:] != -100).any() for i in range(len(batches)))
    # Alone at the start of its row, a label has nothing that predicts it.
    with pytest.raises(
        UserError, match=r"no train row has a label that counts \(4 rows of at most .*data.mask_prompt=false"
    ):
        load(rows, packing="contiguous", seq_len=prompt, eos=False)


def test_the_order_is_a_permutation_per_epoch_and_the_same_for_a_seed(load: Load) -> None:
    data = texts(*[14] * 23)
    first, again, other = load(data), load(data), load(data, seed=1)
    assert len(first) == 11
    assert first.rows("train") == 22
    epochs = [
        [tuple(row.tolist()) for i in range(11 * e, 11 * (e + 1)) for row in first.train_batch(i)["input_ids"]]
        for e in range(3)
    ]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 22 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    backwards = [again.train_batch(i)["input_ids"] for i in reversed(range(33))][::-1]
    assert all(torch.equal(backwards[i], first.train_batch(i)["input_ids"]) for i in range(33))
    assert any(not torch.equal(other.train_batch(i)["input_ids"], backwards[i]) for i in range(11))


def test_every_training_batch_is_full(load: Load) -> None:
    batches = load(texts(*[14] * 6), batch_size=4)
    assert batches.rows("train") == 5
    assert len(batches) == 2
    seen = torch.cat([batches.train_batch(i)["input_ids"] for i in range(5)])
    assert seen.shape == (20, 16)
    assert all(count == 4 for count in torch.unique(seen, dim=0, return_counts=True)[1])


def test_validation_in_order_with_a_short_last_batch_and_a_limit(load: Load) -> None:
    batches = load(texts(*[14] * 8), validation_rows=5)
    found = list(batches.validation())
    assert [len(batch["input_ids"]) for batch in found] == [2, 2, 1]
    assert torch.cat([batch["input_ids"][:, 1] for batch in found]).diff().eq(1).all()
    assert len(list(batches.validation(limit=2))) == 2


def test_first_rows_are_held_out_and_max_rows_counts_after_them(load: Load) -> None:
    data = texts(*[14] * 10)
    batches = load(data, validation_rows=3)
    assert (batches.rows("validation"), batches.rows("train")) == (3, 7)
    held = {int(row[1]) for batch in batches.validation() for row in batch["input_ids"]}
    assert held.isdisjoint({row[1] for row in all_rows(batches)})
    limited = load(data, validation_rows=3, max_rows=4)
    assert (limited.rows("validation"), limited.rows("train"), limited.counts["rows_read"]) == (3, 4, 7)
    share = load(data, validation_fraction=0.2)
    assert (share.rows("validation"), share.rows("train")) == (2, 8)
    limited_share = load(data, validation_fraction=0.2, max_rows=4)
    assert (limited_share.rows("validation"), limited_share.rows("train")) == (1, 4)


@pytest.mark.parametrize(("rows", "held"), [(2, 1), (6, 1), (20, 2), (21, 20)])
def test_of_few_rows_a_tenth_is_held_out(rows: int, held: int, load: Load) -> None:
    batches = load(texts(*[14] * rows), validation_rows=20)
    assert (batches.rows("validation"), batches.rows("train")) == (held, rows - held)
    assert batches.counts.get(FEW_ROWS) == (rows if rows <= 20 else None)
    limited = load(texts(*[14] * rows), validation_rows=20, max_rows=1)
    assert (limited.rows("validation"), limited.rows("train")) == (held, 1)


def test_one_row_cannot_be_divided(load: Load) -> None:
    with pytest.raises(UserError, match=r"has one row, .* give more rows, data.validation_path, or the text as a .txt"):
        load(texts(14))


def test_a_separate_validation_file(load: Load, tmp_path: Path) -> None:
    held = tmp_path / "held.json"
    held.write_text(json.dumps(texts(14, 14)))
    batches = load(texts(*[14] * 4), validation_path=str(held))
    assert (batches.rows("validation"), batches.rows("train")) == (2, 4)


def test_a_text_file_is_one_document_and_its_end_is_held_out(
    load: Load, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "book.txt"
    lines = "".join(f"line {i:03d}\n\n" for i in range(100))
    path.write_text(lines)
    batches = load(path, validation_fraction=0.1, packing="contiguous", seq_len=2000)
    train = batches.train_batch(0)["input_ids"][0]
    held = next(batches.validation())["input_ids"][0]
    joined = [text_of(row, tokenizer) for row in (train, held)]
    assert "".join(joined) == lines
    assert joined[1].startswith("line 090\n")
    assert (train[0], held[0]) == (0, 0)
    assert load(path, packing="contiguous", seq_len=2000).counts["validation/tokens"] < 60


def test_a_text_without_a_line_break_to_cut_at(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("one line only")
    with pytest.raises(UserError, match=r"cannot be held out at a line break .*data.validation_path"):
        load(path)


def test_bos_and_eos_frame_every_sample(load: Load) -> None:
    row = load(texts(5, 5), packing="contiguous").train_batch(0)["input_ids"][0].tolist()
    assert (row[0], row[6], row[7]) == (0, 1, 2)
    row = load(texts(5, 5), packing="contiguous", eos=False).train_batch(0)["input_ids"][0].tolist()
    assert (row[0], row[6]) == (0, 2)
    for bos in ("auto", "never"):  # the tokenizer adds none
        row = load(texts(5, 5), packing="contiguous", bos=bos).train_batch(0)["input_ids"][0].tolist()
        assert row[4:7] == [row[0], 1, 2]


@pytest.mark.parametrize("seq_len", [-4, 0, 1])
def test_a_seq_len_that_is_too_small(load: Load, seq_len: int) -> None:
    with pytest.raises(UserError, match=rf"data.seq_len must be at least 2, got {seq_len}"):
        load(texts(5, 5), seq_len=seq_len)


def test_a_seq_len_beyond_the_whole_text(load: Load) -> None:
    with pytest.raises(UserError, match=r"data.seq_len=4096 is longer than all the train text, 14 tokens in 2 rows"):
        load(texts(5, 5, 5), seq_len=4096)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"validation_rows": 0}, "data.validation_rows must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction must be above 0 and below 1, got 1.0"),
        ({"max_rows": 0}, "data.max_rows must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "run.seed must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_named(load: Load, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load(texts(5, 5), **fields)


def test_a_subsample_given_in_the_path(load: Load, tmp_path: Path) -> None:
    data = texts(*range(6, 32))
    whole = {tuple(row) for row in all_rows(load(data, packing="contiguous", seq_len=64))}
    path = tmp_path / "rows.jsonl"
    some = load(f"{path}[11]", packing="contiguous", seq_len=64)
    assert (some.counts["rows_read"], some.rows("train"), some.rows("validation")) == (11, 10, 1)
    rows = {tuple(row) for row in all_rows(some)}
    assert len(rows) == 10
    assert rows < whole
    assert rows == {tuple(row) for row in all_rows(load(f"{path}[11]", packing="contiguous", seq_len=64, seed=5))}
    held = [len(batch["input_ids"][0][batch["attention_mask"][0] == 1]) for batch in some.validation()]
    assert min(held) < min(sum(t != 2 for t in row) for row in rows)  # drawn rows keep the order of the file
    assert load(f"{path}[99]", packing="contiguous", seq_len=64).counts["rows_read"] == 26
    assert load(path, validation_path=f"{path}[3]", packing="contiguous", seq_len=64).rows("validation") == 3
    for kind in ("json", "parquet"):
        other = tmp_path / f"rows.{kind}"
        if kind == "json":
            other.write_text(json.dumps(data))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), other)
        assert {tuple(row) for row in all_rows(load(f"{other}[11]", packing="contiguous", seq_len=64))} == rows


def test_a_subsample_that_makes_no_sense(load: Load, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a\n" * 99)
    (tmp_path / "odd.jsonl[2]").write_text("".join(json.dumps(row) + "\n" for row in texts(*[14] * 4)))
    with pytest.raises(UserError, match=r"\[0\] takes no row"):
        load(f"{tmp_path / 'rows.jsonl'}[0]")
    with pytest.raises(UserError, match=r"a .txt file is one document, so \[5\] cannot choose rows"):
        load(f"{tmp_path / 'book.txt'}[5]")
    with pytest.raises(UserError, match=r"there is no data file .*gone.jsonl;"):
        load(f"{tmp_path / 'gone.jsonl'}[5]")
    with pytest.raises(UserError, match=r"files of kind '.jsonl\[2\]' are not read"):
        load(tmp_path / "odd.jsonl[2]")  # a file that really has this name


def test_samples_of_unwanted_length_are_dropped_and_counted(
    load: Load, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = texts(20, 5, 40, 8, 9, 30, 6, 12)  # plus BOS and EOS each
    load(data)
    monkeypatch.setattr(trenchcoat.data.tokens, "encode", forbid_tokenizing)  # lengths need no tokenizing
    for packing in ("contiguous", "across"):
        batches = load(data, min_tokens=10, max_tokens=35, packing=packing, seq_len=14)
        assert batches.counts["skipped/too short"] == 2
        assert batches.counts["skipped/too long"] == 1
        assert batches.counts["rows_skipped"] == 3
        kept = [[0, *tokenizer(data[i]["text"])["input_ids"], 1] for i in (3, 4, 5, 7)]
        stream = [token for row in kept for token in row]
        pieces = [row[i : i + 14] for row in kept for i in range(0, len(row), 14)]
        if packing == "across":
            pieces = [stream[i : i + 14] for i in range(0, len(stream) - 13, 14)]
        assert sorted(all_rows(batches)) == sorted(piece + [2] * (14 - len(piece)) for piece in pieces)
    assert load(data).fingerprint != load(data, min_tokens=10).fingerprint
    assert load(data).fingerprint == load(data, min_tokens=1).fingerprint
    message = r"no train sample has between data.min_tokens=50 .*7 are shorter, 0 longer; the longest has 42"
    with pytest.raises(UserError, match=r"no validation sample has between|" + message):
        load(data, min_tokens=50)


def test_selection_keeps_the_best_training_samples_in_order(
    load: Load, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    load(texts(*[10] * 9), validation_rows=2)
    asked: list[list[int]] = []

    def rank(key: str, table: TokenTable, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        asked.append(rows.tolist())
        return np.array([5.0, 9.0, 1.0, 9.0, 2.0, 7.0, 0.0])

    cfg = DataConfig(
        path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), validation_rows=2, seq_len=12,
        select="esl", select_rows=3, packing="contiguous",
    )  # fmt: skip
    batches = load_batches(cfg, tokenizer, batch_size=1, seed=0, rank=rank)
    assert asked == [[2, 3, 4, 5, 6, 7, 8]]
    assert batches.counts["train/rows_selected"] == batches.rows("train") == 3
    letters = {text_of(row, tokenizer)[0] for i in range(3) for row in batches.train_batch(i)["input_ids"]}
    assert letters == {"d", "f", "h"}
    assert batches.rows("validation") == 2
    with pytest.raises(ValueError, match="needs a ranking"):
        load_batches(cfg, tokenizer, batch_size=1, seed=0)


@pytest.mark.parametrize("packing", ["contiguous", "across"])
def test_selection_counts_rows_not_samples(
    packing: str, load: Load, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    load(texts(10, 10, 40, 25, 3, 60), validation_rows=2)
    seen: list[int] = []

    def rank(key: str, table: TokenTable, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        seen.extend((table.offsets[rows + 1] - table.offsets[rows]).tolist())
        return np.arange(len(rows), dtype=np.float64)

    cfg = DataConfig(
        path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), validation_rows=2, seq_len=12,
        select="esl", select_rows=4, packing=packing, min_tokens=4,
    )  # type: ignore[arg-type]  # fmt: skip
    batches = load_batches(cfg, tokenizer, batch_size=1, seed=0, rank=rank)
    assert max(seen) == 12
    assert len(seen) > 6  # pieces of the long samples, none of the short one
    assert batches.counts["train/rows_selected"] == 4
    assert batches.rows("train") == 4
    longest = {text_of(row, tokenizer)[0] for i in range(3) for row in batches.train_batch(i)["input_ids"]}
    assert longest == {"f"}


def forbid_tokenizing(*_: object, **__: object) -> None:
    raise AssertionError("tokenized again")


def test_the_cache_avoids_tokenizing_whatever_the_packing(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    data = texts(*[14] * 6)
    first = load(data)
    monkeypatch.setattr(trenchcoat.data.tokens, "encode", forbid_tokenizing)
    again = load(data)
    assert all_rows(again) == all_rows(first)
    assert (again.fingerprint, again.counts) == (first.fingerprint, first.counts)
    assert load(data, seq_len=8, packing="contiguous", validation_rows=2, seed=3).fingerprint != first.fingerprint
    for changed in ({"eos": False}, {"max_rows": 2}, {"on_bad_row": "skip"}):
        with pytest.raises(AssertionError, match="tokenized again"):
            load(data, **changed)
    with pytest.raises(AssertionError, match="tokenized again"):
        load(data[:-1])


def test_the_cache_knows_the_tokenizer(load: Load, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = texts(*[14] * 4)
    fingerprint = load(data).fingerprint
    tokenizer(["ab", "c"], padding=True)  # changes the tokenizer's state but no token
    assert load(data).fingerprint == fingerprint
    tokenizer.save_pretrained(tmp_path / "other")
    other = AutoTokenizer.from_pretrained(tmp_path / "other", eos_token="<pad>")
    cfg = DataConfig(path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), validation_rows=1, seq_len=8)
    assert load_batches(cfg, other, batch_size=1, seed=0).fingerprint != load(data, seq_len=8).fingerprint


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "other"])
def test_a_damaged_cache_file_is_rebuilt(load: Load, tmp_path: Path, harm: str) -> None:
    data = texts(*[14] * 6)
    rows = all_rows(load(data))
    [file] = (tmp_path / "cache" / "tokens").iterdir()
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-200] ^= 1
    file.write_bytes({"truncate": content[:-9], "flip": content, "empty": b"", "other": b"not safetensors"}[harm])
    assert all_rows(load(data)) == rows
    assert file.read_bytes() != bytes(content) or harm in ("truncate", "empty", "other")


def test_a_cache_folder_that_cannot_be_written_is_a_warning(load: Load, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="tokenized data is not cached, set data.cache_dir"):
        batches = load(texts(*[14] * 6), cache_dir=str(tmp_path / "taken"))
    assert batches.rows("train") == 5


def test_rows_beyond_one_call_of_the_tokenizer(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(texts(*[14] * 8))
    monkeypatch.setattr(trenchcoat.data.tokens, "_CHUNK_ROWS", 4)
    pieces = load(texts(*[14] * 8), on_bad_row="skip")
    assert all_rows(pieces) == all_rows(whole)


def test_the_embedded_text(load: Load, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "stdlib_documents", lambda split: islice(stdlib_documents(split), 4))
    batches = load("embedded", seq_len=64, max_rows=1)
    assert batches.counts["rows_read"] == 1 + 4  # the held-out modules are not limited by max_rows
    assert batches.rows("train") > 4
    held_out = " ".join(text_of(row, tokenizer) for batch in batches.validation(50) for row in batch["input_ids"])
    assert "import" in held_out
    monkeypatch.setattr(sources, "stdlib_documents", lambda split: stdlib_documents(split, root=SHARED / "nowhere"))
    with pytest.raises(UserError, match="no Python source found"):
        load("embedded")


@pytest.mark.skipif(not (SHARED / "data/alpaca/alpaca_data.json").is_file(), reason="no shared Alpaca data")
def test_real_alpaca_rows(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    path = str(SHARED / "data/alpaca/alpaca_data.json")
    cfg = DataConfig(path=path, cache_dir=str(tmp_path), max_rows=1500, on_bad_row="skip")
    batches = load_batches(cfg, tokenizer, batch_size=2, seed=0)
    assert batches.counts["rows_read"] == 2000
    assert 0 < batches.counts["rows_skipped"] < 5
    batch = batches.train_batch(0)
    counted = batch["labels"] != -100
    assert 0.05 < counted.float().mean() < 0.8
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])

"""Every kind of source, and every error in a file: the message names the place and the fix."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data import sources, tokens
from trenchcoat.data.batches import Batches
from trenchcoat.data.load import load_batches
from trenchcoat.models.text import remember_embeddings

TEXT_ROWS = [{"text": f"row {i} of a small file"} for i in range(8)]
ALPACA_ROWS = [{"instruction": f"say {i}", "input": "", "output": f"{i}"} for i in range(8)]


def gz(content: bytes) -> bytes:
    """Compressed, without the time: names of tests hold it."""
    return gzip.compress(content, mtime=0)


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def table(rows: list[dict[str, str]], comma: str) -> bytes:
    lines = [["number", "text"], *([str(i), f'"{row["text"]}"'] for i, row in enumerate(rows))]
    return "".join(comma.join(line) + "\n" for line in lines).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


class Loader:
    """Writes a file and loads it."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def __call__(self, name: str, content: bytes | None = None, **fields: Any) -> Batches:
        path = self.folder / name
        if content is not None:
            path.write_bytes(content)
        fields = {"validation_rows": 1, "seq_len": 8, "cache_dir": str(self.folder / "cache"), **fields}
        return load_batches(DataConfig(path=str(path), **fields), self.tokenizer, batch_size=1, seed=0)


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Loader:
    return Loader(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(TEXT_ROWS)),
        ("blank_lines.jsonl", jsonl(TEXT_ROWS).replace(b"\n", b"\r\n\n")),
        ("marked.jsonl", b"\xef\xbb\xbf" + jsonl(TEXT_ROWS)),
        ("list.json", json.dumps(TEXT_ROWS, indent=1).encode()),
        ("marked.json", b"\xef\xbb\xbf" + json.dumps(TEXT_ROWS).encode()),
        ("lines.json", jsonl(TEXT_ROWS)),
        ("rows.jsonl.gz", gz(jsonl(TEXT_ROWS))),
        ("members.jsonl.gz", gz(jsonl(TEXT_ROWS[:3])) + gz(jsonl(TEXT_ROWS[3:]))),
        ("list.json.bz2", bz2.compress(json.dumps(TEXT_ROWS).encode())),
        ("rows.jsonl.xz", lzma.compress(jsonl(TEXT_ROWS))),
        ("rows.jsonl.zst", zstd(jsonl(TEXT_ROWS))),
        ("rows.csv", table(TEXT_ROWS, ",")),
        ("marked.csv", b"\xef\xbb\xbf" + table(TEXT_ROWS, ",").replace(b"\n", b"\r\n")),
        ("rows.tsv.gz", gz(table(TEXT_ROWS, "\t"))),
        ("rows.parquet", parquet(TEXT_ROWS)),
    ],
)
def test_every_kind_of_file_gives_the_same_tokens(load: Loader, name: str, content: bytes) -> None:
    expected = load("expected.jsonl", jsonl(TEXT_ROWS))
    found = load(name, content)
    assert found.counts == expected.counts
    for i in range(len(expected)):
        assert found.train_batch(i)["input_ids"].tolist() == expected.train_batch(i)["input_ids"].tolist()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["folder", "saved", "saved_dict"])
def test_folders_through_datasets(
    load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    folder = tmp_path / "set"
    if kind == "folder":
        folder.mkdir()
        (folder / "train.jsonl").write_bytes(jsonl(TEXT_ROWS))
        (folder / "validation.jsonl").write_bytes(jsonl(TEXT_ROWS[:3]))
    else:
        rows = datasets.Dataset.from_list(TEXT_ROWS)
        (
            datasets.DatasetDict(train=rows, validation=rows.select(range(3))) if kind == "saved_dict" else rows
        ).save_to_disk(folder)
    batches = load("set")
    assert batches.counts["rows_read"] == (8 if kind == "saved" else 11)
    expected = load("expected.jsonl", jsonl(TEXT_ROWS))
    if kind == "saved":
        assert batches.train_batch(0)["input_ids"].tolist() == expected.train_batch(0)["input_ids"].tolist()
    assert load("set").fingerprint == batches.fingerprint
    with pytest.raises(UserError, match=r"set has no split 'tset'; it has train.*set data.split to one of them"):
        load("set", split="tset")


def test_a_folder_that_holds_no_data(load: Loader, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"cannot read data.path='.*bare'.*doesn't contain any data files"):
        load("bare")


def test_a_hub_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'someone/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"cannot read data.path='someone/data' \(neither a file here.*Couldn't reach"):
        sources.dataset_splits("someone/data", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, r"there is no data file .*absent.jsonl; check data.path"),
        ("absent.txt", None, r"there is no data file .*absent.txt; check data.path"),
        (
            "table.ods",
            b"a,b\n",
            r"table.ods: files of kind '.ods' are not read; use .json, .jsonl, .parquet, .csv, .tsv",
        ),
        ("rows.jsonl.gz", b"no gzip", r"rows.jsonl.gz is not a readable .gz file .*get it again"),
        ("rows.jsonl.gz", gz(jsonl(TEXT_ROWS))[:-9], r"rows.jsonl.gz is not a readable .gz file"),
        ("rows.jsonl.zst", b"no zstd", r"rows.jsonl.zst is not a readable .zst file"),
        ("rows.parquet.gz", b"x", r"rows.parquet.gz: files of kind '.gz' are not read"),
        ("more.csv", b"text\na,b\n", r"more.csv, line 2: the line has more cells than the 1 columns"),
        ("latin.csv", b"text\ncaf\xe9\n", r"latin.csv: not UTF-8"),
        ("bare.jsonl", b"", r"the data file .*bare.jsonl is empty"),
        ("bare.txt", b"", r"the data file .*bare.txt is empty"),
        ("blank.txt", b" \n\n", r"the data file .*blank.txt holds nothing but white space"),
        ("blank.jsonl", b"\n \n", r"blank.jsonl has no usable row: it is empty"),
        ("bare.json", b"[]", r"bare.json has no usable row: it is empty"),
        ("cut.jsonl", jsonl(TEXT_ROWS)[:-9], r"cut.jsonl, line 8: not valid JSON \(column \d+: .*data.on_bad_row=skip"),
        (
            "cut.json",
            json.dumps(TEXT_ROWS, indent=1).encode()[:-9],
            r"cut.json, line 24, column \d+: not valid JSON .*truncated or broken there",
        ),
        ("object.json", b'{\n"rows": []\n}', r"object.json holds a JSON dict; expected a list of objects"),
        ("numbers.jsonl", b"1\n2\n", r"numbers.jsonl, line 1: expected an object with columns, found a JSON int"),
        ("cut.parquet", parquet(TEXT_ROWS)[:-9], r"cut.parquet is not a readable Parquet file"),
        ("latin.txt", b"caf\xe9\n" * 9, r"latin.txt: not UTF-8 at byte 3 \(0xe9\); convert the file"),
        ("latin.json", b'[{"text": "caf\xe9"}]', r"latin.json: not UTF-8 at byte 14 \(0xe9\)"),
        ("latin.jsonl", b'{"text": "ab"}\n{"text": "caf\xe9"}\n', r"line 2: not UTF-8 at byte 28 \(0xe9\)"),
        (
            "schema.jsonl",
            b'{"question": "a", "label": 1}\n',
            r"schema.jsonl, line 1: found the columns question, label; expected instruction and output .*or text, or",
        ),
        ("number.jsonl", b'{"text": 5}\n', r"line 1: column 'text' holds int; expected a string"),
        (
            "null.parquet",
            parquet([{"text": "a", "n": 1}, {"text": None, "n": 2}]),
            r"row 2: found the columns text, n \(text: null\); expected",
        ),
        ("empty_text.jsonl", b'{"text": " "}\n', r"line 1: column 'text' is empty"),
    ],
)
def test_bad_files(load: Loader, name: str, content: bytes | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load(name, content)
    assert "\n" not in str(raised.value)


def test_a_pattern_names_files_in_the_order_of_their_names(load: Loader, tokenizer: PreTrainedTokenizerFast) -> None:
    (load.folder / "b.jsonl").write_bytes(jsonl(TEXT_ROWS[4:]))
    (load.folder / "a.jsonl.gz").write_bytes(gz(jsonl(TEXT_ROWS[:4])))
    (load.folder / "c.txt").write_text("left out")
    found = load("[ab].jsonl*")
    (load.folder / "whole.jsonl").write_bytes(jsonl(TEXT_ROWS))
    whole = load("whole.jsonl")
    assert torch.equal(
        found.rows_batch("train", range(3))["input_ids"], whole.rows_batch("train", range(3))["input_ids"]
    )
    assert found.rows("train") == whole.rows("train")
    (load.folder / "b.jsonl").write_bytes(jsonl(TEXT_ROWS[4:7]) + b"broken\n")
    with pytest.raises(UserError, match=r"b\.jsonl, line 4: not valid JSON"):
        load("[ab].jsonl*")
    with pytest.raises(UserError, match=r"no file matches .*absent/\*\.jsonl; check data.path"):
        load("absent/*.jsonl")


def test_compressed_files_are_not_streamed(load: Loader) -> None:
    with pytest.raises(
        UserError, match=r"files of kind '\.gz' are not streamed; use .jsonl or .parquet, not compressed"
    ):
        load("rows.jsonl.gz", gz(jsonl(TEXT_ROWS)), streaming=True)
    (load.folder / "a.jsonl").write_bytes(jsonl(TEXT_ROWS * 20))
    (load.folder / "b.jsonl").write_bytes(jsonl(TEXT_ROWS * 20))
    assert load("?.jsonl", streaming=True).train_batch(3)["input_ids"].shape == (1, 8)


def test_long_tokenizing_says_how_far_it_is(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(1000))  # a second passes with every row
    monkeypatch.setattr(tokens.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    for _ in range(2):  # the second time from the cache, in silence
        path = load.folder / "rows.jsonl"
        path.write_bytes(jsonl(TEXT_ROWS * 5))
        cfg = DataConfig(path=str(path), validation_rows=1, seq_len=8, cache_dir=str(load.folder / "cache"))
        load_batches(cfg, load.tokenizer, batch_size=1, seed=0, say=said.append)
    rows = [int(one.split(": ")[1].split()[0]) for one in said]
    assert rows[0] == 1
    assert len(rows) == 3
    assert all(one.startswith(f"tokenizing {path}: ") for one in said)


def test_a_column_of_another_name(load: Loader) -> None:
    rows = jsonl([{"story": "once upon a time"}] * 4)
    with pytest.raises(UserError, match=r"line 1: expected a column 'text'; found the columns story"):
        load("rows.jsonl", rows, format="text")
    assert load("rows.jsonl", rows, text_column="story").rows("train") > 0


def test_empty_outputs_stop_or_are_skipped_and_counted(load: Loader) -> None:
    rows = [*ALPACA_ROWS[:4], {"instruction": "a", "input": "", "output": ""}, *ALPACA_ROWS[4:]]
    with pytest.raises(UserError, match=r"line 5: column 'output' is empty; fix the row, or skip .*on_bad_row=skip"):
        load("rows.jsonl", jsonl(rows))
    skipped = load("rows.jsonl", jsonl(rows), on_bad_row="skip", packing="contiguous", seq_len=256)
    clean = load("clean.jsonl", jsonl(ALPACA_ROWS), packing="contiguous", seq_len=256)
    assert skipped.counts["rows_skipped"] == skipped.counts["skipped/empty output"] == 1
    assert skipped.counts["train/tokens"] == clean.counts["train/tokens"]
    assert "skipped/empty output" not in clean.counts


def test_all_reasons_for_skipping_are_counted(load: Loader) -> None:
    content = (
        jsonl(TEXT_ROWS) + b'{"text": "cut\n{"text": "caf\xe9"}\n[1]\n{"other": 1}\n{"text": 5}\n' + jsonl(TEXT_ROWS)
    )
    counts = load("rows.jsonl", content, on_bad_row="skip").counts
    assert counts["rows_read"] == 21
    assert {name: count for name, count in counts.items() if "skipped" in name} == {
        "rows_skipped": 5, "skipped/unreadable": 3, "skipped/missing column": 1, "skipped/not text": 1,
    }  # fmt: skip


def test_nothing_but_bad_rows_is_an_error_that_shows_the_first(load: Loader) -> None:
    with pytest.raises(
        UserError, match=r"has no usable row; the first problem: .*line 1: found the columns a; expected"
    ):
        load("rows.jsonl", b'{"a": 1}\n' * 5, on_bad_row="skip")


BAD = "bad \ud83d emoji "
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HALVES = {
    "text": {"text": BAD * 9},
    "alpaca": {"instruction": BAD, "output": BAD * 9},
    "chat": {"messages": [{"role": "user", "content": BAD}, {"role": "assistant", "content": BAD * 9}]},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", HALVES)
def test_half_a_surrogate_pair_is_read_as_a_replacement_character(
    load: Loader, tokenizer: PreTrainedTokenizerFast, kind: str, streaming: bool
) -> None:
    halves = jsonl([HALVES[kind]] * 8)
    assert b"\\ud83d" in halves
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT
    load.tokenizer = own
    found = [
        load(f"{name}.jsonl", content, streaming=streaming, seq_len=32).train_batch(0)
        for name, content in (("halves", halves), ("whole", halves.replace(b"\\ud83d", b"\\ufffd")))
    ]
    assert torch.equal(found[0]["input_ids"], found[1]["input_ids"])
    assert torch.equal(found[0]["labels"], found[1]["labels"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_the_tokenizer_refuses_or_the_model_has_no_token_for_is_named_or_skipped(
    load: Loader, tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<|tool|>"])
    remember_embeddings(own, 259)
    load.tokenizer = own
    rows = jsonl([*TEXT_ROWS * 3, {"text": "some <|tool|> text"}])
    where = "rows.jsonl, byte" if streaming else f"rows.jsonl, line {len(TEXT_ROWS) * 3 + 1}"
    with pytest.raises(UserError, match=rf"{where}.*: token '<\|tool\|>' has id 259, .*on_bad_row=skip"):
        read_all(load("rows.jsonl", rows, streaming=streaming))
    skipped = load("rows.jsonl", rows, streaming=streaming, on_bad_row="skip")
    read_all(skipped)
    assert skipped.counts["skipped/token without embedding"] >= 1
    own.add_special_tokens({"pad_token": "[PAD]"})
    padded = load("pad.jsonl", jsonl(TEXT_ROWS), packing="contiguous", seq_len=64, streaming=streaming).train_batch(0)
    assert padded["attention_mask"].min() == 0
    assert padded["input_ids"].max() < 259
    remember_embeddings(own, 260)  # as it is after a resize: another cache
    assert "skipped/token without embedding" not in load("rows.jsonl", rows, on_bad_row="skip").counts
    words = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    load.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    rows = jsonl([{"text": "a b " * 20}] * 7 + [{"text": "a c"}])
    with pytest.raises(UserError, match=r"words.jsonl, .*the tokenizer refuses the text: .*on_bad_row=skip"):
        read_all(load("words.jsonl", rows, streaming=streaming))
    skipped = load("words.jsonl", rows, streaming=streaming, on_bad_row="skip")
    read_all(skipped)
    assert skipped.counts["skipped/refused by the tokenizer"] >= 1


def read_all(batches: Any) -> None:
    """Enough batches to have read every row."""
    for index in range(60):
        batches.train_batch(index)


def test_values_that_cannot_be_read_are_bad_rows(load: Loader, tmp_path: Path) -> None:
    deep, long = b'{"text": ' + b"[" * 100_000 + b"}\n", b'{"text": ' + b"1" * 5000 + b"}\n"
    for line in (deep, long):
        with pytest.raises(UserError, match=r"line 9: JSON that cannot be read"):
            load("rows.jsonl", jsonl(TEXT_ROWS) + line)
        assert load("rows.jsonl", jsonl(TEXT_ROWS) + line, on_bad_row="skip").counts["skipped/unreadable"] == 1
        with pytest.raises(UserError, match=r"rows.json.*JSON that cannot be read|not valid JSON"):
            load("rows.json", b"[\n" + line + b"]")
    texts = [row["text"] for row in TEXT_ROWS]
    column = pyarrow.array([*(text.encode() for text in texts), b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "broken.parquet")
    content = (tmp_path / "broken.parquet").read_bytes()
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"rows.parquet, row 9.*: a value that cannot be read"):
            read_all(load("rows.parquet", content, streaming=streaming))
        batches = load("rows.parquet", content, streaming=streaming, on_bad_row="skip")
        read_all(batches)
        assert batches.counts["skipped/unreadable"] >= 1


def test_each_text_file_of_a_folder_is_one_document(load: Loader) -> None:
    folder = load.folder / "my [essays]"
    folder.mkdir()
    for name in ("b.txt", "a.TXT", "c.txt"):
        (folder / name).write_text("".join(f"{name} line {i}\n" for i in range(5)))
    (folder / "README.md").write_text("notes")
    batches = load(folder.name, validation_rows=1)
    assert batches.counts["rows_read"] == 3
    held = "".join(load.tokenizer.decode(batch["input_ids"][0]) for batch in batches.validation())
    assert held.startswith("a.TXT line 0\na.TXT")
    split = load.folder / "split"
    split.mkdir()
    (split / "train.txt").write_text("some words\n" * 9)
    assert load(split.name, validation_rows=1).counts["rows_read"] == 9

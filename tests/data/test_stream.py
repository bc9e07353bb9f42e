"""Streams: every sample once per pass, the same batches for every number of processes and after every restart."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data import stream, stream_sources
from trenchcoat.data.load import load_batches
from trenchcoat.data.stream import StreamedBatches
from trenchcoat.data.stream_sources import most_shards, open_stream

Rows = list[dict[str, Any]]
Load = Callable[..., StreamedBatches]


def numbered(count: int, length: int = 9) -> Rows:
    """Rows "0000....", "0001....": each text is unique and fits one row of 16 tokens."""
    return [{"text": f"{i:04d}".ljust(length, ".")} for i in range(count)]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 200 bytes or 10 rows, blocks of about three rows with eight shards."""
    monkeypatch.setattr(stream_sources, "SHARD_BYTES", 200)
    monkeypatch.setattr(stream_sources, "SHARD_ROWS", 10)
    monkeypatch.setattr(stream, "BLOCK_CHARACTERS", 1)
    monkeypatch.setattr(stream, "BLOCK_ROWS", 0)


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[Load]:
    """``load(path or rows, batch_size=..., seed=..., **DataConfig fields)``, streamed, with a separate cache."""
    made: list[StreamedBatches] = []

    def run(source: Any, *, batch_size: int = 1, seed: int = 0, **fields: Any) -> StreamedBatches:
        path = write(tmp_path / "rows.jsonl", source) if isinstance(source, list) else source
        fields = {"cache_dir": str(tmp_path / "cache"), "validation_rows": 2, "seq_len": 16, **fields}
        cfg = DataConfig(path=str(path), streaming=True, **{"packing": "contiguous", "bos": "always", **fields})
        batches = load_batches(cfg, tokenizer, batch_size=batch_size, seed=seed)
        assert isinstance(batches, StreamedBatches)
        made.append(batches)
        return batches

    yield run
    for batches in made:
        batches.close()


def names(batches: StreamedBatches, indices: range, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The numbers of the rows in some micro-batches."""
    ids = [row for i in indices for row in batches.train_batch(i)["input_ids"].tolist()]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).rstrip(".") for row in ids]


def all_names(batches: StreamedBatches, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The rows of every shard's first pass, sorted."""
    return sorted(name for shard in first_pass(batches, tokenizer) for name in shard)


def first_pass(batches: StreamedBatches, tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """Shard by shard, the rows before the first repeated one."""
    found = []
    for shard in range(batches.shards):
        seen: list[str] = []
        for i in range(shard, 10_000, batches.shards):
            [name] = names(batches, range(i, i + 1), tokenizer)
            if name in seen:
                break
            seen.append(name)
        found.append(seen)
    return found


def test_every_sample_comes_once_per_pass_in_shards_of_the_file(load: Load, tokenizer: PreTrainedTokenizerFast) -> None:
    batches = load(numbered(102))
    assert batches.shards == 8
    passes = first_pass(batches, tokenizer)
    together = [name for shard in passes for name in shard]
    assert sorted(together) == [f"{i:04d}" for i in range(2, 102)]
    assert all(sorted(shard) == [f"{i:04d}" for i in range(int(min(shard)), int(max(shard)) + 1)] for shard in passes)
    assert any(shard != sorted(shard) for shard in passes)  # shuffled within blocks
    second = names(batches, range(8 * len(passes[0]), 16 * len(passes[0]), 8), tokenizer)
    assert sorted(second) == sorted(passes[0])
    seconds = [names(batches, range(i + 8 * len(one), i + 16 * len(one), 8), tokenizer) for i, one in enumerate(passes)]
    assert seconds != passes  # and another time otherwise
    held = [batch["input_ids"] for batch in batches.validation()]
    assert [str(tokenizer.decode(row[0], skip_special_tokens=True)).rstrip(".") for row in held] == ["0000", "0001"]
    assert (len(batches), batches.rows("train"), batches.rows("validation")) == (stream.ENDLESS, stream.ENDLESS, 2)
    assert names(load(numbered(102), seed=1), range(24), tokenizer) != names(batches, range(24), tokenizer)


def test_across_samples_no_token_is_lost_between_blocks_and_passes(
    load: Load, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"text": chr(97 + i % 26) * (3 + 7 * i % 11)} for i in range(80)]
    batches = load(rows, packing="across")
    source, _ = open_stream(DataConfig(path=str(tmp_path / "rows.jsonl"), streaming=True, validation_rows=2))
    for shard in (0, source.shards - 1):
        texts = [row["text"] for _, row in source.open(shard, None) if isinstance(row, dict)]
        endless = [i for text in texts for i in [0, *tokenizer(text)["input_ids"], 1]]
        twice = (endless + endless)[: len(endless) * 2 // 16 * 16]
        expected = Counter(tuple(twice[i : i + 16]) for i in range(0, len(twice), 16))
        indices = range(shard, shard + batches.shards * expected.total(), batches.shards)
        found = [batches.train_batch(i) for i in indices]
        assert Counter(tuple(batch["input_ids"][0].tolist()) for batch in found) == expected
        assert all(batch["attention_mask"].all() for batch in found)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_batches_do_not_depend_on_the_number_of_processes(
    load: Load, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    rows = numbered(120)
    alone = load(rows, batch_size=2)
    expected = [names(alone, range(i, i + 1), tokenizer) for i in range(60)]
    opened: list[set[int]] = []
    for rank in range(world):
        own = load(rows, batch_size=2)
        opened.append(set())
        monkeypatch.setattr(own, "_source", _watched(own, opened[-1]))
        for i in range(rank, 60, world):
            assert names(own, range(i, i + 1), tokenizer) == expected[i]
    assert set().union(*opened) == set(range(alone.shards))
    if alone.shards % world == 0:
        assert sum(map(len, opened)) == alone.shards


def _watched(batches: StreamedBatches, opened: set[int]) -> stream_sources.StreamSource:
    source = batches._source

    def watch(shard: int, position: Any) -> stream_sources.RowReader:
        opened.add(shard)
        return source.open(shard, position)

    return stream_sources.StreamSource(source.name, source.fingerprint, source.shards, watch)


@pytest.mark.parametrize("packing", ["contiguous", "across"])
def test_a_restart_gives_the_same_batches_and_reads_little_again(
    load: Load, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "NOTE_EVERY", 2)
    monkeypatch.setattr(stream_sources, "SHARD_BYTES", 2000)
    rows = numbered(600)
    uninterrupted = load(rows, packing=packing, batch_size=2)
    shards = uninterrupted.shards
    assert shards == 6
    expected = [uninterrupted.train_batch(i)["input_ids"] for i in range(shards * 60)]  # more than a pass of 100 rows
    uninterrupted.close()
    place = shards * 33 + 1
    for wanted in (place, place + 1, shards * 58):
        resumed = load(rows, packing=packing, batch_size=2)  # in a new process: only the saved states are left
        assert torch.equal(resumed.train_batch(wanted)["input_ids"], expected[wanted])
        assert resumed.counts["rows_read"] - 2 <= 30
        resumed.close()
    again = load(rows, packing=packing, batch_size=2)
    for wanted in (place, 3, place + 1, shards * 20, 0, shards * 59):  # back and forth
        assert torch.equal(again.train_batch(wanted)["input_ids"], expected[wanted])
    again.close()
    shutil.rmtree(tmp_path / "cache")
    without = load(rows, packing=packing, batch_size=2)
    assert torch.equal(without.train_batch(place)["input_ids"], expected[place])
    assert without.counts["rows_read"] - 2 > 60


def test_damaged_saved_states_are_skipped(load: Load, tmp_path: Path) -> None:
    rows = numbered(40)
    first = load(rows)
    expected = [first.train_batch(i)["input_ids"] for i in range(60)]
    first.close()
    notes = sorted((tmp_path / "cache" / "streams").rglob("*.json"))
    assert notes
    for i, path in enumerate(notes):
        path.write_text(["", "{}", '{"key": "other", "places": []}', '{"key": 1, "places": [{}]}'][i % 4])
    again = load(rows)
    assert all(torch.equal(again.train_batch(i)["input_ids"], expected[i]) for i in range(59, 50, -1))


def test_states_that_cannot_be_written_are_a_warning(load: Load, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "streams").write_text("a file where the folder should be")
    batches = load(numbered(40), cache_dir=str(tmp_path / "taken"))
    with pytest.warns(UserWarning, match="the position in the stream is not saved, set data.cache_dir"):
        assert len([batches.train_batch(i) for i in range(60)]) == 60


def test_batches_are_prefetched_once_the_step_is_known(load: Load) -> None:
    batches = load(numbered(120))
    batches.train_batch(0)
    assert not batches._ahead
    batches.train_batch(3)
    assert sorted(batches._ahead) == list(range(6, 3 + 3 * 9, 3))
    made = [job.result() for job in batches._ahead.values()]
    ahead = {i: made[n] for n, i in enumerate(batches._ahead)}
    assert batches.train_batch(6) is ahead[6]
    batches.train_batch(50)  # another position: what was prefetched is dropped
    assert min(batches._ahead) > 50


def parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["parquet", "jsonl folder", "parquet folder", "json folder", "saved"])
def test_every_kind_of_source(
    load: Load,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    rows, place = numbered(64), tmp_path / "set"
    if kind == "parquet":
        place = tmp_path / "rows.parquet"
        parquet(place, rows)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(place)
    else:
        place.mkdir()
        for i in range(4):
            name, part = place / f"train-{i}", rows[16 * i : 16 * (i + 1)]
            if kind == "parquet folder":
                parquet(name.with_suffix(".parquet"), part)
            else:
                write(name.with_suffix("." + kind.split()[0]), part)
    batches = load(place, validation_rows=5)
    assert batches.shards == {"parquet": 8, "jsonl folder": 6, "parquet folder": 12, "json folder": 4, "saved": 4}[kind]
    assert all_names(batches, tokenizer) == [f"{i:04d}" for i in range(5, 64)]
    assert batches.rows("validation") == 5
    later = batches.shards * 4 + 1
    fresh = load(place, validation_rows=5)
    assert torch.equal(fresh.train_batch(later)["input_ids"], batches.train_batch(later)["input_ids"])


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("saved", [False, True])
def test_a_validation_split_is_used(
    load: Load, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capfd: pytest.CaptureFixture[str], saved: bool
) -> None:
    import datasets

    rows, folder = numbered(30), tmp_path / "set"
    if saved:
        parts = {"train": rows[:20], "validation": rows[20:]}
        sets = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
        datasets.DatasetDict(sets).save_to_disk(folder)
    else:
        folder.mkdir()
        write(folder / "train.jsonl", rows[:20])
        write(folder / "validation.jsonl", rows[20:])
    batches = load(folder)
    assert batches.rows("validation") == 10
    assert all_names(batches, tokenizer) == [f"{i:04d}" for i in range(20)]
    with pytest.raises(UserError, match="has no split 'tset'"):
        load(folder, split="tset")


def test_a_validation_file_leaves_all_rows_for_training(
    load: Load, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    held = write(tmp_path / "held.jsonl", numbered(3))
    batches = load(numbered(20), validation_path=str(held))
    assert batches.rows("validation") == 3
    assert all_names(batches, tokenizer) == [f"{i:04d}" for i in range(20)]


def test_a_shard_without_a_usable_row_is_replaced_by_the_next(load: Load, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = numbered(120)
    for row in rows[30:90]:
        row["text"] = row["text"][:4]
    batches = load(rows, min_tokens=8)
    seen = {name for shard in first_pass(batches, tokenizer) for name in shard}
    assert seen == {f"{i:04d}" for i in (*range(2, 30), *range(90, 120))}
    assert batches.counts["skipped/too short"] >= 60
    alone = load(rows, min_tokens=8)
    wanted = 5 * alone.shards // 12
    assert torch.equal(alone.train_batch(wanted)["input_ids"], batches.train_batch(wanted)["input_ids"])
    with pytest.raises(UserError, match=r"no validation sample has between data.min_tokens=99"):
        load(rows, min_tokens=99)


def test_a_restart_in_a_long_unusable_end_of_a_shard(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "NOTE_EVERY", 1)
    monkeypatch.setattr(stream_sources, "SHARD_BYTES", 1_000_000)
    monkeypatch.setattr(stream, "BLOCK_CHARACTERS", 0)
    rows = numbered(60)
    for row in rows[12:]:
        row["text"] = row["text"][:4]
    first = load(rows, min_tokens=8, cache_dir=str(tmp_path / "other"))
    expected = [first.train_batch(i)["input_ids"] for i in range(25)]
    first.close()
    add, noted = stream._Notes.add, 0

    def killed_in_the_tail(self: stream._Notes, place: stream._Place) -> None:
        nonlocal noted
        add(self, place)
        noted += 1
        if noted == 30:
            raise InterruptedError("killed")

    monkeypatch.setattr(stream._Notes, "add", killed_in_the_tail)
    killed = load(rows, min_tokens=8)
    killed.train_batch(9)
    with pytest.raises(InterruptedError):
        killed.train_batch(10)
    again = load(rows, min_tokens=8)
    assert all(torch.equal(again.train_batch(i)["input_ids"], expected[i]) for i in range(10, 25))


def test_nothing_usable_anywhere_ends_with_the_first_problem(load: Load, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", numbered(2))
    batches = load([{"other": "x" * 20}] * 30, on_bad_row="skip", validation_path=str(held))
    with pytest.raises(UserError, match=r"none of the \d+ shards .*byte 0: found the columns other"):
        batches.train_batch(0)
    masked = load([{"instruction": "x" * 90, "output": "y"}] * 30, validation_path=str(held), max_tokens=40)
    with pytest.raises(UserError, match=r"none of the \d+ shards"):
        masked.train_batch(0)


def test_broken_rows_stop_the_stream_or_are_counted(
    load: Load, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    content = write(tmp_path / "broken.jsonl", numbered(20)).read_bytes() + b'{"text": "cut\n\n' + b'{"text": 5}\n'
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    stopped = load(path)
    with pytest.raises(UserError, match=r"broken.jsonl, byte 440: not valid JSON .*on_bad_row=skip"):
        first_pass(stopped, tokenizer)
    skipped = load(path, on_bad_row="skip")
    for i in range(2 * skipped.shards):
        skipped.train_batch(i)
    counts = skipped.counts
    assert counts["skipped/unreadable"] == 1
    assert counts["rows_skipped"] == 2
    assert counts["rows_read"] >= 22


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("rows.json", b'[\n{"text": "a"}]', {}, "rows.json is not one JSON object a line, so it cannot be streamed"),
        ("rows.txt", b"a\nb\n", {}, r"rows.txt cannot be streamed"),
        ("rows.csv", b"a\nb\n", {}, r"files of kind '.csv' are not streamed"),
        ("rows.jsonl", b'{"text": "a"}\n', {}, r"has no more than 1 rows, too few to hold out 2 .*validation_path"),
        ("rows.jsonl", b"", {}, r"rows.jsonl is empty"),
        ("rows.parquet", b"PAR1", {}, r"rows.parquet is not a readable Parquet file"),
        ("rows.jsonl", b'{"text": "a"}\n', {"select": "esl", "select_rows": 3}, r"data.select=esl needs to see all"),
        ("rows.jsonl", b'{"text": "a"}\n', {"max_rows": 3}, r"data.max_rows=3 needs to see all rows"),
        ("rows.jsonl", b'{"text": "a"}\n', {"validation_fraction": 0.1}, r"validation_rows works"),
    ],
)
def test_what_cannot_be_streamed_says_so(
    load: Load, tmp_path: Path, name: str, content: bytes, fields: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / name, **fields)
    assert "\n" not in str(raised.value)


def test_other_names_that_cannot_be_streamed(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", numbered(9))
    for path in (tmp_path / "rows.jsonl[5]", "embedded"):
        with pytest.raises(UserError, match="cannot be streamed"):
            load(path)
    with pytest.raises(UserError, match=r"cannot read data.path='.*nowhere'"):
        load(tmp_path / "nowhere")


def test_the_number_of_shards_suits_common_numbers_of_processes() -> None:
    assert [most_shards(size) for size in (0, 1, 5, 7, 100, 10**9)] == [1, 1, 4, 6, 96, 192]
    assert all(192 % world == 0 for world in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96))


def test_a_position_far_inside_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(numbered(700)), path)
    space = stream_sources._Groups([path], 300)
    assert (space.shards, space.held, space.empty) == (1, 300, False)
    for position in (None, 255, 256, 511, 600, 699):
        start = 300 if position is None else position
        found = [row["text"] for _, row in space.open(0, position) if isinstance(row, dict)]
        assert found == [row["text"] for row in numbered(700)[start:]]


def test_a_position_is_found_again_at_every_row(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.jsonl", numbered(7 + i)) for i in range(3)]
    space = stream_sources._Lines(files, 3)
    for shard in range(space.shards):
        whole = [row for _, row in space.open(shard, None)]
        for taken in range(len(whole)):
            reader = space.open(shard, None)
            begun = [row for _, row in islice(reader, taken)]
            position = reader.position if taken else None
            assert begun + [row for _, row in space.open(shard, position)] == whole

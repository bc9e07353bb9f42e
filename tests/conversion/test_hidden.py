"""Hidden states in memory and on disk: stored exactly, resumed, verified, and refused for another model or text."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trenchcoat.config import UserError
from trenchcoat.conversion.blocks.hidden import HiddenFiles, HiddenMemory, HiddenShape, HiddenStates
from trenchcoat.runtime.files import SaveError

SHAPE = HiddenShape(rows=11, tokens=5, hidden=3, dtype=torch.bfloat16)
IDENTITY = {"base": "abc", "layer": 4}
FOUR_ROWS = 4 * 5 * 3 * 2


def states() -> Tensor:
    return torch.randn(SHAPE.rows, SHAPE.tokens, SHAPE.hidden, generator=torch.Generator().manual_seed(3)).bfloat16()


def files(folder: Path, **changes: Any) -> HiddenFiles:
    settings: dict[str, Any] = {"shape": SHAPE, "identity": IDENTITY, "shard_bytes": FOUR_ROWS}
    return HiddenFiles(folder, **{**settings, **changes})


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_rows_round_trip(kind: str, tmp_path: Path) -> None:
    """Written in any order and grouping, read in any other; rows already present are not rewritten."""
    kept: HiddenStates = HiddenMemory(SHAPE) if kind == "memory" else files(tmp_path / "new" / "folder")
    wanted = states()
    with pytest.raises(KeyError, match="row 3"):
        kept.read([3])
    for rows in ([3, 0], [10, 1, 2], [4, 5, 6, 7, 8, 9]):
        kept.write(rows, wanted[rows])
    assert kept.missing() == []
    kept.write([3, 4], torch.zeros(2, 5, 3))
    kept.finish()
    for rows in ([0, 1, 2, 3], [9, 4, 4], [10]):
        assert torch.equal(kept.read(rows), wanted[rows])
    kept.close()


def test_files_are_safetensors_of_bounded_size_and_are_continued(tmp_path: Path) -> None:
    wanted, first = states(), files(tmp_path)
    first.write(range(9), wanted[:9])
    first.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "manifest-00.json", "states-00000.safetensors", "states-00001.safetensors",
    ]  # fmt: skip
    assert torch.equal(load_file(tmp_path / "states-00001.safetensors")["hidden"], wanted[4:8])
    again = files(tmp_path)
    assert again.missing() == [8, 9, 10]  # the third shard was incomplete and is dropped
    again.write([8, 9, 10], wanted[8:])
    again.finish()
    assert torch.equal(files(tmp_path).read(range(11)), wanted)
    again.remove()
    assert not tmp_path.exists()


def test_several_writers_fill_one_folder(tmp_path: Path) -> None:
    """Each gets all rows but writes only its own shards; after a refresh each sees the others' rows."""
    wanted = states()
    parts = [files(tmp_path, writer=writer, writers=2) for writer in (0, 1)]
    assert parts[1].missing() == [4, 5, 6, 7]
    for part in parts:
        part.write(range(11), wanted)
        assert part.missing() == []
        part.finish()
    with pytest.raises(KeyError, match="row 4"):
        parts[0].read([4])
    for part in parts:
        part.refresh()
        assert torch.equal(part.read(range(11)), wanted)
    assert torch.equal(files(tmp_path).read(range(11)), wanted)


def test_damaged_and_missing_shards_are_reported_and_their_rows_missing(tmp_path: Path) -> None:
    kept = files(tmp_path)
    kept.write(range(11), states())
    kept.close()
    path = tmp_path / "states-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (tmp_path / "states-00002.safetensors").unlink()
    told: list[str] = []
    again = files(tmp_path, warn=told.append)
    assert again.missing() == [4, 5, 6, 7, 8, 9, 10]
    assert "states-00001.safetensors is damaged" in told[0]
    assert "states-00002.safetensors is missing" in told[1]
    path.write_bytes(content[:-7])
    told.clear()
    assert files(tmp_path, warn=told.append, verify=False).missing() == [4, 5, 6, 7, 8, 9, 10]
    assert "bytes, not" in told[0]
    (tmp_path / "manifest-00.json").write_text("{")
    assert len(files(tmp_path, warn=told.append).missing()) == 11
    assert "not valid JSON" in told[-1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"identity": {"base": "xyz", "layer": 4}}, "base was 'abc' and is 'xyz' now"),
        ({"shape": HiddenShape(rows=11, tokens=5, hidden=3, dtype=torch.float32)}, "dtype was 'BF16'"),
        ({"shape": HiddenShape(rows=12, tokens=5, hidden=3, dtype=torch.bfloat16)}, "rows was 11"),
    ],
)
def test_states_with_another_identity_are_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    kept = files(tmp_path)
    kept.write(range(11), states())
    kept.finish()
    with pytest.raises(UserError, match=named):
        files(tmp_path, **changes)


def test_a_full_disk_is_reported_and_finished_shards_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, wanted = files(tmp_path), states()
    kept.write(range(4), wanted[:4])
    kept.finish()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SaveError, match="the disk is full while saving"):
        kept.write([4, 5], wanted[4:6])
    monkeypatch.undo()
    assert not list(tmp_path.glob(".partial-*"))
    again = files(tmp_path)
    assert again.missing() == list(range(4, 11))
    again.write(range(4, 11), wanted[4:])
    again.finish()
    assert torch.equal(again.read(range(11)), wanted)


def test_a_disk_that_fails_in_the_background_is_reported_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = files(tmp_path)

    def broken(*arguments: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", broken)
    kept.write(range(4), states()[:4])
    with pytest.raises(SaveError, match="Read-only file system"):
        kept.finish()

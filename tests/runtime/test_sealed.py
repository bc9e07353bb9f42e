"""Files that are read back say when they are damaged: their name, and the way on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trenchcoat.config import Recipe
from trenchcoat.runtime.files import CorruptFileError, load_tensors, save_tensors
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder
from trenchcoat.runtime.sealed import read_sealed, write_sealed

LEARNED = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2, dtype=torch.bfloat16), "c": torch.zeros(0)}
RESULT = {"name": "transfer", "steps": 3, "best_loss": math.inf}


def flip(path: Path, at: int, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_is_never_silent(tmp_path: Path, at: int, bit: int) -> None:
    tensors, plain = tmp_path / "t.safetensors", tmp_path / "j.json"
    save_tensors(tensors, LEARNED)
    write_sealed(plain, {"lr": 1e-3, "names": ("a", "b"), "none": None})
    flip(tensors, at, bit)
    flip(plain, at, bit)
    with pytest.raises(CorruptFileError, match=r"j\.json"):
        read_sealed(plain, "restore it")
    found: dict[str, torch.Tensor] = {}
    with suppress(CorruptFileError):  # only the name of the checksum can be lost: readers that need it ask for it
        found = load_tensors(tensors)
    assert all(torch.equal(tensor, LEARNED[name]) for name, tensor in found.items())


def test_what_is_sealed_comes_back(tmp_path: Path) -> None:
    write_sealed(tmp_path / "j.json", {"x": (1, 2), "loss": math.inf, "checksum": "old"})
    assert read_sealed(tmp_path / "j.json", "") == {"x": [1, 2], "loss": math.inf}
    (tmp_path / "j.json").write_text(json.dumps({"x": 1}))
    with pytest.raises(CorruptFileError, match=r"j.json has no checksum: .*earlier version; restore it"):
        read_sealed(tmp_path / "j.json", "restore it")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with one finished stage and one evaluation."""
    made = RunFolder(tmp_path / "run")
    made.begin(TRANSFER, Recipe(), {"base weights": "x"})
    made.finish(TRANSFER, LEARNED, RESULT)
    made.evaluation_path("teacher").write_text("{}")
    made.keep("teacher", {"rows": 4})
    return made


READS: dict[str, Callable[[RunFolder], Any]] = {
    "stages/transfer/settings.json": lambda run: run.refuse_other_recipe(Recipe(), [TRANSFER]),
    "stages/transfer/result.json": lambda run: run.result(TRANSFER),
    "stages/transfer/weights.safetensors": lambda run: run.weights(TRANSFER),
    "evaluation/teacher.json": lambda run: run.kept("teacher", {"rows": 4}),
    "evaluation/teacher.key": lambda run: run.kept("teacher", {"rows": 4}),
}


def test_a_whole_run_folder_is_read(folder: RunFolder) -> None:
    for read in READS.values():
        read(folder)
    assert folder.result(TRANSFER) == RESULT
    assert folder.kept("teacher", {"rows": 4}) is not None
    assert folder.kept("teacher", {"rows": 5}) is None


@pytest.mark.parametrize("name", READS)
def test_a_damaged_part_of_a_run_is_named_with_the_way_on(name: str, folder: RunFolder) -> None:
    path = folder.directory / name
    content = bytearray(path.read_bytes())
    place = content.rindex(b"1") if path.suffix == ".key" else len(content) - 3 if name.startswith("stages") else 0
    content[place] ^= 2
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=rf"{path.name}.*delete .* to (run the stage|have it measured) again"):
        READS[name](folder)


def test_weights_of_another_stage_are_refused(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    other.finish(TRANSFER, {**LEARNED, "a": torch.ones(2, 3)}, RESULT)
    place = Path("stages/transfer/weights.safetensors")
    shutil.copy(other.directory / place, folder.directory / place)
    with pytest.raises(CorruptFileError, match="does not hold what stage 'transfer' learned"):
        folder.weights(TRANSFER)

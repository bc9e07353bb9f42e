"""Whatever is wrong with a file that a run reads: a sentence with its name, or the same result as before.

Every kind of file is damaged in every way below, from fixed seeds, and read as a run reads it. No damage may end as
another exception than ``UserError``, and none may change what is read from a file that has a checksum.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet
import pytest
import torch

from conftest import SENTENCES, byte_tokenizer, save_tiny_model
from report_kit import made_results, made_tasks
from trenchcoat.config import DataConfig, LoraConfig, ModelConfig, Recipe, StudentConfig, UserError, dump_recipe
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.data.load import load_batches
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.selection import FrontierPoint, Selection
from trenchcoat.evaluation.task_results import TaskResults
from trenchcoat.generation.generate import Session
from trenchcoat.linearize.blocks.hidden import HiddenFiles, HiddenShape
from trenchcoat.linearize.blocks.model import BlockSource
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.loading import load_model
from trenchcoat.models.lolcats.files import read_state
from trenchcoat.models.lora import add_lora
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder
from trenchcoat.training.checkpoints import CheckpointWriter, newest_checkpoint

STUDENT, LORA = StudentConfig(window=4), LoraConfig(rank=2, targets=("q_proj",))


# What is read, and how


def _loaded(folder: Path) -> Any:
    model, tokenizer = load_model(ModelConfig(path=str(folder), device="cpu"))
    return _computed(model), tokenizer("a b")["input_ids"]


def _computed(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits.sum().item()


def _block(folder: Path) -> Any:
    source = BlockSource(ModelConfig(path=str(folder), device="cpu"))
    block = source.build(0, 1, source.read(0, 1))
    return source.fingerprint, sum(p.double().sum().item() for p in block.parameters())


def _adapter(folder: Path) -> Any:
    return _computed(hub.load(folder / "adapter", device="cpu", base=str(folder / "base"))[0])


def _state(folder: Path) -> Any:
    session = Session.load(folder / "state", _STATE_MODEL[0])
    return (
        session.pending,
        session.seen,
        [t.double().sum().item() for t in session.cache.layers[0].state.tensors().values()],
    )


_STATE_MODEL: list[Any] = []


def _batches(path: Path, **fields: Any) -> Any:
    cache = path.parent / "cache"
    cfg = DataConfig(path=str(path), seq_len=16, validation_rows=1, cache_dir=str(cache), **fields)
    found = load_batches(cfg, byte_tokenizer(), batch_size=1, seed=0)
    rows = [found.train_batch(index)["input_ids"].tolist() for index in range(6)]
    getattr(found, "close", lambda: None)()
    return rows


def _record(folder: Path) -> Any:
    run = RunFolder(folder / "run")
    run.begin(TRANSFER, Recipe(), {"text": "x"})
    run.require_identity(TRANSFER, "text", "x")
    weights = run.weights(TRANSFER)
    return run.result(TRANSFER), {name: tensor.sum().item() for name, tensor in weights.items()}


def _checkpoint(folder: Path) -> Any:
    found = newest_checkpoint(folder / "checkpoints", _reported)
    assert found is not None
    return found.step, found.state, found.names()


def _reported(problem: str) -> NoReturn:
    """A warning that names a damaged file is as good as an error."""
    raise UserError(problem)


def _hidden(folder: Path) -> Any:
    store = HiddenFiles(
        folder / "hidden", HiddenShape(4, 3, 2, torch.float32), {"model": "x"}, shard_bytes=48, warn=_reported
    )
    try:
        return {row: store.read([row]).sum().item() for row in range(4) if row not in store.missing()}
    finally:
        store.close()


CHECKED = True
"""The file has a checksum: what is read from it is as before, or refused."""

READERS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "base/config.json": (lambda folder: _loaded(folder / "base"), False),
    "base/generation_config.json": (lambda folder: _loaded(folder / "base"), False),
    "base/tokenizer.json": (lambda folder: _loaded(folder / "base"), False),
    "base/tokenizer_config.json": (lambda folder: _loaded(folder / "base"), False),
    "base/model.safetensors": (lambda folder: _loaded(folder / "base"), False),
    "sharded/model.safetensors.index.json": (lambda folder: _loaded(folder / "sharded"), False),
    "blocks/config.json": (lambda folder: _block(folder / "blocks"), False),
    "blocks/model.safetensors": (lambda folder: _block(folder / "blocks"), False),
    "indexed/model.safetensors.index.json": (lambda folder: _block(folder / "indexed"), False),
    "adapter/trenchcoat.json": (_adapter, CHECKED),
    "adapter/adapter.safetensors": (_adapter, CHECKED),
    "merged/config.json": (lambda folder: _computed(hub.load(folder / "merged", device="cpu")[0]), False),
    "merged/model.safetensors": (lambda folder: _computed(hub.load(folder / "merged", device="cpu")[0]), False),
    "state": (_state, CHECKED),
    "recipe.yaml": (lambda folder: load_recipe(folder / "recipe.yaml"), False),
    "rows.jsonl": (lambda folder: _batches(folder / "rows.jsonl"), False),
    "rows.json": (lambda folder: _batches(folder / "rows.json"), False),
    "rows.jsonl.gz": (lambda folder: _batches(folder / "rows.jsonl.gz"), False),
    "rows.csv": (lambda folder: _batches(folder / "rows.csv"), False),
    "rows.parquet": (lambda folder: _batches(folder / "rows.parquet"), False),
    "stream.jsonl": (lambda folder: _batches(folder / "stream.jsonl", streaming=True), False),
    "run/stages/transfer/settings.json": (_record, CHECKED),
    "run/stages/transfer/result.json": (_record, CHECKED),
    "run/stages/transfer/weights.safetensors": (_record, CHECKED),
    "checkpoints/step-00000002/state.json": (_checkpoint, CHECKED),
    "checkpoints/step-00000002/manifest.json": (_checkpoint, CHECKED),
    "checkpoints/step-00000002/tensors.safetensors": (_checkpoint, CHECKED),
    "results.json": (lambda folder: Results.load(folder / "results.json").to_dict(), CHECKED),
    "tasks.json": (lambda folder: asdict(TaskResults.load(folder / "tasks.json")), CHECKED),
    "selection.json": (lambda folder: asdict(Selection.load(folder / "selection.json")), CHECKED),
    "hidden/manifest-00.json": (_hidden, CHECKED),
    "hidden/states-00000.safetensors": (_hidden, CHECKED),
    "maps.pt": (lambda folder: {k: v.sum().item() for k, v in read_state(folder / "maps.pt").maps.items()}, False),
}
"""File -> (how it is read, whether it has a checksum)."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each, undamaged."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny_model(folder / "base", seed=0, num_hidden_layers=1)
    shutil.copytree(folder / "base", folder / "blocks")
    model, tokenizer = load_model(ModelConfig(path=str(folder / "base"), device="cpu"))
    for name in ("sharded", "indexed"):
        model.save_pretrained(folder / name, max_shard_size="20KB")
        tokenizer.save_pretrained(folder / name)
    attach_students(model, STUDENT)
    add_lora(model, LORA)
    set_mode(model, "student")
    hub.save_adapter(model, folder / "adapter", base=ModelConfig(path=str(folder / "base")), lora=LORA)
    hub.save_merged(model, folder / "merged", tokenizer)
    _STATE_MODEL[:] = [hub.load(folder / "merged", device="cpu")[0]]
    session = Session.new(_STATE_MODEL[0])
    session.read(list(range(3, 20)))
    session.save(folder / "state")
    (folder / "recipe.yaml").write_text(dump_recipe(Recipe()))
    rows = [{"text": " ".join(SENTENCES)} for _ in range(4)]
    for name in ("rows.jsonl", "stream.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    (folder / "rows.csv").write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    run = RunFolder(folder / "run")
    run.begin(TRANSFER, Recipe(), {"text": "x"})
    run.finish(TRANSFER, {"a": torch.ones(3)}, {"name": TRANSFER, "steps": 2})
    CheckpointWriter(folder / "checkpoints", 2, {"a": torch.ones(3)}, {"step": 2}).finish()
    made_results().save(folder / "results.json")
    made_tasks(0.5).save(folder / "tasks.json")
    point = FrontierPoint("gates", 1, 0.5, 0.1, 0.1, None, None)
    Selection("gates", [[1.0, 0.5]], {"text": [[1.0, 0.5]]}, 2, ("0.0",), (point,), base="x").save(
        folder / "selection.json"
    )
    states = HiddenFiles(folder / "hidden", HiddenShape(4, 3, 2, torch.float32), {"model": "x"}, shard_bytes=48)
    states.write([0, 1, 2, 3], torch.ones(4, 3, 2))
    states.finish()
    states.close()
    key = "model.layers.0.self_attn.feature_map_q.mlp.layer"
    torch.save({"model_state_dict": {key: torch.ones(4, 8, 8)}}, folder / "maps.pt")
    return folder


# How it is damaged


def damaged_bytes(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """(how, content) of a file of any kind."""
    yield "empty", b""
    yield "zeros", bytes(len(content))
    yield "noise", chance.randbytes(256)
    for share in (0.1, 0.5, 0.9):
        yield f"cut at {share}", content[: int(len(content) * share)]
    yield "cut by a byte", content[:-1]
    for place in (4, chance.randrange(len(content)), chance.randrange(len(content)), len(content) - 2):
        yield f"another byte at {place}", content[:place] + bytes([content[place] ^ 0xA5]) + content[place + 1 :]
    middle = len(content) // 2
    yield "not UTF-8", content[:middle] + b"\xff\xfe" + content[middle:]
    yield "brackets", b"[" * 100_000


VALUES: tuple[Any, ...] = (None, -1, 1.5, True, "x", [], {}, [None], {"x": 1}, 2**70, float("nan"))


def damaged_json(content: bytes, chance: random.Random, number: int) -> Iterator[tuple[str, bytes]]:
    """(how, content): the whole, or ``number`` values in it, replaced by values of other kinds, or left out."""
    for value in (None, [], "x", 5, {}):
        yield f"the whole is {value!r}", json.dumps(value).encode()
    for _ in range(number):
        document = json.loads(content)
        parent, key = chance.choice(list(_places(document)))
        value = chance.choice((*VALUES, "left out"))
        if value == "left out":
            del parent[key]
        else:
            parent[key] = value
        yield f"{key!r} is {value!r}", json.dumps(document).encode()


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inner)[:40]:
        yield value, key
        if depth < 4:
            yield from _places(item, depth + 1)


def damages(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Everything that is done to one file."""
    chance = random.Random(name)
    yield from damaged_bytes(content, chance)
    if name.endswith(".json") and not name.startswith("rows"):
        yield from damaged_json(content, chance, 12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_or_does_not_matter(name: str, whole: Path, tmp_path: Path) -> None:
    read, checked = READERS[name]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    target = tmp_path / name
    places = (target.name, str(tmp_path / name.partition("/")[0]))
    content, expected, wrong = target.read_bytes(), read(tmp_path), []
    for how, damaged in damages(name, content):
        target.write_bytes(damaged)
        try:
            found = read(tmp_path)
        except UserError as error:
            if "\n" in str(error) or not any(part in str(error) for part in places):
                wrong.append(f"{how}: does not name the file, or has several lines: {error}")
        except Exception as error:  # noqa: BLE001 (what this test is about)
            wrong.append(f"{how}: {type(error).__name__}: {str(error)[:200]}")
        else:
            if checked and found != expected:
                wrong.append(f"{how}: read in silence, with another result")
    target.write_bytes(content)
    assert read(tmp_path) == expected
    assert not wrong, "\n".join(wrong)


def test_there_are_hundreds_of_cases(whole: Path) -> None:
    assert sum(len(list(damages(name, (whole / name).read_bytes()))) for name in READERS) >= 600

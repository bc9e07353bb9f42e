"""Atomic files, training checkpoints, adapters, fingerprints and model-loading errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import small_file_system
from training_kit import STUDENT, damage, lora_settings, start_lora, tiny_llama, transfer_model
from trenchcoat.config import ModelConfig, UserError
from trenchcoat.models import hub, identity, loading
from trenchcoat.models.attach import attach_students
from trenchcoat.runtime import files
from trenchcoat.runtime.files import CorruptFileError, SaveError
from trenchcoat.training import checkpoints

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


# Atomic files


def test_a_file_that_was_added_to_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = checkpoints.CheckpointWriter(tmp_path, 3, TENSORS, {"x": 1}).finish()
    checkpoints.read_checkpoint(path)
    files.save_tensors(path / "z.safetensors", TENSORS)  # every file of tensors in the folder would be read
    with pytest.raises(files.CorruptFileError, match=r"z\.safetensors is not a file of this checkpoint"):
        checkpoints.read_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "settings.json"
    files.write_json(target, {"old": 1})

    def fail() -> None:
        with files.atomic_file(target) as partial:
            partial.write_text("{")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert files.read_json(target) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_full_disk_is_reported_and_the_old_file_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "weights.safetensors"
    files.save_tensors(target, TENSORS)
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(SaveError, match=r"disk is full while saving .*weights\.safetensors.*intact"):
        files.save_tensors(target, {"a": torch.zeros(2)})
    assert torch.equal(files.load_tensors(target)["a"], TENSORS["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    with small_file_system(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_really_full_disk(small_disk: Path) -> None:
    checkpoints.CheckpointWriter(small_disk, 1, {"a": torch.zeros(100_000)}, {}).finish()
    with pytest.raises(SaveError, match="the disk is full while saving"):
        checkpoints.CheckpointWriter(small_disk, 2, {"a": torch.zeros(200_000)}, {}).finish()
    found = checkpoints.newest_checkpoint(small_disk, pytest.fail)
    assert found is not None
    assert found.step == 1
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot save"):
        files.write_text(tmp_path / "file" / "below.txt", "text")


def test_tensors_round_trip_with_dtype_shape_and_shared_storage(tmp_path: Path) -> None:
    base = torch.randn(4, 3)
    tensors = {"base": base, "view": base.t(), "half": base.bfloat16(), "count": torch.tensor(7), "none": base[:0]}
    files.save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = files.load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    with pytest.raises(CorruptFileError, match=r"bad\.safetensors"):
        files.load_tensors(tmp_path / "bad.safetensors")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"bad\.json"):
        files.read_json(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="absent"):
        files.load_tensors(tmp_path / "absent.safetensors")


# Training checkpoints


def test_the_newest_intact_checkpoint_is_used_and_the_damaged_one_reported(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        checkpoints.CheckpointWriter(tmp_path, step, TENSORS, {"step": step}).finish()
    damage(tmp_path / "step-00000020" / "tensors.safetensors")
    (tmp_path / ".partial-1234-step-00000030").mkdir()
    warnings: list[str] = []
    found = checkpoints.newest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert (found.step, found.state) == (10, {"step": 10})
    assert found.names() == sorted(TENSORS)
    room = torch.zeros_like(TENSORS["a"])
    found.load_into({"a": room})
    assert torch.equal(room, TENSORS["a"])
    assert len(warnings) == 1
    assert "step-00000020/tensors.safetensors is damaged" in warnings[0]

    (tmp_path / "step-00000010" / "state.json").unlink()
    (tmp_path / "step-00000005" / "manifest.json").write_text("{")
    assert checkpoints.newest_checkpoint(tmp_path, warnings.append) is None
    assert "state.json is missing" in warnings[-2]
    assert "manifest.json is not valid JSON" in warnings[-1]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (0, 5, 10):
        checkpoints.CheckpointWriter(tmp_path, step, TENSORS, {}).finish()
    (tmp_path / ".partial-1234-step-00000030").mkdir()
    checkpoints.prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]
    assert checkpoints.newest_checkpoint(tmp_path / "absent", pytest.fail) is None


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints.CheckpointWriter(tmp_path, 5, TENSORS, {"try": 1}).finish()
    checkpoints.CheckpointWriter(tmp_path, 5, TENSORS, {"try": 2}).finish()
    found = checkpoints.newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert found.state == {"try": 2}


# Adapters


def test_an_adapter_round_trips(tmp_path: Path) -> None:
    hub.write_adapter(tmp_path, TENSORS, {"version": 1, "base": {"path": "x"}})
    tensors, meta = hub.read_adapter(tmp_path)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert meta["version"] == 1
    assert meta["base"] == {"path": "x"}
    assert not (tmp_path / "config.json").exists()


def test_damaged_and_foreign_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not an adapter folder: trenchcoat\.json is missing"):
        hub.read_adapter(tmp_path)
    hub.write_adapter(tmp_path, TENSORS, {})
    files.save_tensors(tmp_path / hub.ADAPTER_FILE, {"a": torch.zeros(1)})
    with pytest.raises(CorruptFileError, match="does not match the checksum"):
        hub.read_adapter(tmp_path)


# The identity of a base model


def test_the_fingerprint_covers_only_the_base() -> None:
    plain = identity.fingerprint(tiny_llama())
    assert plain == identity.fingerprint(tiny_llama())
    assert plain == identity.fingerprint(tiny_llama().bfloat16())
    model = transfer_model()
    assert plain == identity.fingerprint(model)
    start_lora(model, lora_settings())
    assert plain == identity.fingerprint(model)
    assert plain != identity.fingerprint(tiny_llama(seed=1))
    assert plain != identity.fingerprint(tiny_llama(layers=3))


def test_the_fingerprint_covers_every_part_of_the_model() -> None:
    model = tiny_llama()
    plain = identity.fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        model.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    assert plain != identity.fingerprint(model)


def test_no_fingerprint_without_weights() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="meta device"):
        identity.fingerprint(model)


# The pretrained model


def test_a_model_folder_loads_frozen(tiny_model_dir: Path) -> None:
    model, tokenizer = loading.load_model(ModelConfig(path=str(tiny_model_dir), device="cpu"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert next(model.parameters()).dtype == torch.float32
    assert tokenizer("abc")["input_ids"]
    model, _ = loading.load_model(ModelConfig(path=str(tiny_model_dir), device="cpu", dtype="bfloat16"))
    assert next(model.parameters()).dtype == torch.bfloat16
    attach_students(model, STUDENT)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nowhere", "no such folder"),
        ("someone/no-such-model", r"cannot load model\.path='someone/no-such-model'"),
    ],
)
def test_unknown_models_are_reported(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        loading.load_model(ModelConfig(path=path, device="cpu"))
    assert "\n" not in str(caught.value)


def test_wrong_folders_are_explained(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        loading.load_model(ModelConfig(path=str(tmp_path), device="cpu"))
    with pytest.raises(UserError, match="is a file"):
        loading.load_model(ModelConfig(path=str(tiny_model_dir / "config.json"), device="cpu"))
    hub.write_adapter(tmp_path, TENSORS, {})
    with pytest.raises(UserError, match=r"trenchcoat\.load"):
        loading.load_model(ModelConfig(path=str(tmp_path), device="cpu"))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(UserError, match="cannot load"):
        loading.load_model(ModelConfig(path=str(tmp_path), device="cpu"))


def test_a_model_without_tokenizer_and_impossible_attention(tmp_path: Path, tiny_model_dir: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        loading.load_model(ModelConfig(path=str(tmp_path), device="cpu"))
    with pytest.raises(UserError, match="no_such_attention"):
        loading.load_model(ModelConfig(path=str(tiny_model_dir), device="cpu", attention="no_such_attention"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_impossible_devices(device: str) -> None:
    with pytest.raises(UserError, match=r"model\.device"):
        loading.resolve_device(device)


def test_truncated_weights_are_a_clear_error(tmp_path: Path, tiny_model_dir: Path) -> None:
    for path in tiny_model_dir.iterdir():
        os.link(path, tmp_path / path.name) if path.suffix != ".safetensors" else None
    (tmp_path / "model.safetensors").write_bytes((tiny_model_dir / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load"):
        loading.load_model(ModelConfig(path=str(tmp_path), device="cpu"))


def test_missing_weights_are_not_replaced_by_random_ones(tmp_path: Path, tiny_model_dir: Path) -> None:
    for path in tiny_model_dir.iterdir():
        os.link(path, tmp_path / path.name) if path.suffix != ".safetensors" else None
    weights = files.load_tensors(tiny_model_dir / "model.safetensors")
    del weights["model.norm.weight"]
    files.save_tensors(tmp_path / "model.safetensors", weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*model\.norm\.weight"):
        loading.load_model(ModelConfig(path=str(tmp_path), device="cpu"))

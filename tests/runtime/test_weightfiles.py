"""Which files of a model's folder are read as its weights: those of from_pretrained, whatever lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conftest import save_tiny_model, tiny_llama_config
from trenchcoat.config import UserError
from trenchcoat.runtime.weightfiles import INDEX, SINGLE, tensor_files, weight_files

NAME = "model.layers.0.self_attn.q_proj.weight"


def other_model() -> LlamaForCausalLM:
    """The shape of the tiny model, other weights."""
    torch.manual_seed(9)
    return LlamaForCausalLM(tiny_llama_config())


def require_as_loaded(folder: Path) -> None:
    """Assert that the file that is found for a tensor holds what from_pretrained loads."""
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())[NAME]
    assert torch.equal(load_file(tensor_files(folder)[NAME])[NAME], loaded)


def test_a_variant_beside_the_model_is_not_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=0)
    other_model().save_pretrained(tmp_path, variant="zfp16")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert weight_files(tmp_path) == [tmp_path / SINGLE]
    require_as_loaded(tmp_path)


def test_only_the_files_of_the_index_are_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / SINGLE).unlink()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    other_model().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / SINGLE).rename(tmp_path / "zz-backup.safetensors")
    assert len(named) > 1
    assert {file.name for file in weight_files(tmp_path)} == named
    require_as_loaded(tmp_path)
    (tmp_path / sorted(named)[-1]).unlink()
    with pytest.raises(UserError, match=rf"lacks {sorted(named)[-1]}, one of the {len(named)} files"):
        weight_files(tmp_path)


def test_the_single_file_comes_before_the_index(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=0)
    other_model().save_pretrained(tmp_path / "other", max_shard_size="40KB")
    for file in (tmp_path / "other").glob("model*"):
        file.rename(tmp_path / file.name)
    assert (tmp_path / INDEX).is_file()
    require_as_loaded(tmp_path)


def test_the_file_that_the_config_names_is_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=0)
    other_model().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / SINGLE).rename(tmp_path / "mine.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    assert weight_files(tmp_path) == [tmp_path / "mine.safetensors"]
    require_as_loaded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "../mine.safetensors"}))
    with pytest.raises(UserError, match=r"names '../mine.safetensors' as a file of its weights"):
        weight_files(tmp_path)


def test_folders_without_such_files_are_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no safetensors files; download it again"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"weights are .bin files: convert them once, with AutoModelForCausalLM"):
        weight_files(tmp_path)
    (tmp_path / "model.fp16.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"it has model\.fp16\.safetensors: rename the right one"):
        weight_files(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(UserError, match="has no `weight_map`"):
        weight_files(tmp_path)

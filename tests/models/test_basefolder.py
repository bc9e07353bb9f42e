"""What can be a base, decided once for every way of loading; and what of a hub repository is fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from conftest import save_tiny_model
from trenchcoat.config import ModelConfig, ParallelConfig, UserError
from trenchcoat.conversion.blocks.model import BlockSource
from trenchcoat.models import basefolder, loading
from trenchcoat.models.basefolder import base_folder
from trenchcoat.models.identity import fingerprint
from trenchcoat.models.shapes import find_config

LOADERS: dict[str, Callable[[ModelConfig], Any]] = {
    "joint": loading.load_model,
    "sharded": lambda cfg: loading._load_spread(cfg, ParallelConfig()),
    "blocks": BlockSource,
}
"""The ways to load a base that stop before any process group is needed when the folder is refused."""

CONFIG_READERS = {**LOADERS, "config": lambda cfg: find_config(cfg.path)}


@pytest.mark.parametrize("way", LOADERS)
def test_an_adapter_beside_the_model_is_refused(way: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), PeftConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"PEFT adapter \(adapter_config.json\) beside the model: merge it"):
        LOADERS[way](ModelConfig(path=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("way", LOADERS)
def test_weights_that_are_stored_quantized_are_refused(way: str, quantize: Any, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=0)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(UserError, match=r"is stored quantized \(bitsandbytes in its config.json\): give the model in"):
        LOADERS[way](ModelConfig(path=str(tmp_path), device="cpu", quantize=quantize))


def test_a_variant_changes_neither_blocks_nor_the_identity(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "other", seed=9)
    save_tiny_model(tmp_path / "model", seed=0)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model" / "model.zfp16.safetensors")
    cfg = ModelConfig(path=str(tmp_path / "model"), device="cpu")
    assert BlockSource(cfg).fingerprint == fingerprint(loading.load_model(cfg)[0])


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that brings Python code; a question on the terminal, or running the code, fails the test."""
    folder = save_tiny_model(tmp_path / "model", seed=0)
    code = {"AutoConfig": "code_my.MyConfig", "AutoModelForCausalLM": "code_my.MyLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "my_llm", "auto_map": code}))
    (folder / "code_my.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")

    def asked(text: str = "") -> str:
        pytest.fail(f"asked: {text}")

    monkeypatch.setattr("builtins.input", asked)
    return folder


@pytest.mark.parametrize("way", CONFIG_READERS)
def test_code_of_the_model_is_never_run_nor_asked_about(way: str, own_code: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trenchcoat never runs a model's own code: give a model of a"):
        CONFIG_READERS[way](ModelConfig(path=str(own_code), device="cpu"))
    assert not (tmp_path / "ran").exists()


def test_code_of_the_tokenizer_is_never_run_nor_asked_about(own_code: Path, tmp_path: Path) -> None:
    save_tiny_model(own_code, seed=0)
    settings = json.loads((own_code / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["code_my.MyTokenizer", None]}}
    (own_code / "tokenizer_config.json").write_text(json.dumps(settings))
    cfg = ModelConfig(path=str(own_code), device="cpu")
    with pytest.raises(UserError, match="has no tokenizer that can be loaded: it needs Python code of its own"):
        loading.load_tokenizer(cfg, str(own_code), embeddings=259)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_only_the_weights_that_are_read_are_fetched(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, local = tmp_path / "remote", tmp_path / "local"
    save_tiny_model(remote, seed=0)
    model = AutoModelForCausalLM.from_pretrained(remote)
    (remote / "model.safetensors").unlink()
    model.save_pretrained(remote, max_shard_size=size)
    weights = {path.name for path in remote.glob("*.safetensors")}
    for other in ("consolidated.safetensors", "model.fp16.safetensors"):
        (remote / other).write_bytes(b"not wanted")

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repository == "some/model"
        local.mkdir(exist_ok=True)
        names = [path.name for path in remote.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(remote / name, local / name)
        return str(local)

    monkeypatch.setattr(basefolder, "snapshot_download", download)
    assert base_folder("some/model", None) == local
    assert {path.name for path in local.glob("*.safetensors")} == weights
    assert (local / "tokenizer.json").is_file()

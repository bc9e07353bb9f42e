"""GGUF files as base models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trenchcoat.config import ModelConfig, UserError
from trenchcoat.models.gguf import gguf_config, gguf_folder
from trenchcoat.models.identity import fingerprint
from trenchcoat.models.loading import load_model
from trenchcoat.models.shapes import find_config, shapes_of
from trenchcoat.planning.choose import recipe_for

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, GROUPS, DIM, INNER = 32, 4, 2, 8, 64


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers in float32, with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "th"]
    sizes = {
        "context_length": 512, "embedding_length": WIDTH, "block_count": 2, "feed_forward_length": INNER,
        "head_count": HEADS, "head_count_kv": GROUPS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0,
        "rope_dimension_count": DIM, "vocab_size": len(tokens), "tokenizer_model": "gpt2", "tokenizer_pre": "smollm",
        "token_list": tokens, "token_types": [1] * 256 + [3, 1], "token_merges": ["t h"], "bos_token_id": 256,
        "eos_token_id": 256,
    }  # fmt: skip
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        values = torch.ones(shape) if len(shape) == 1 else 0.2 * torch.randn(shape, generator=generator)
        writer.add_tensor(f"{name}.weight", values.numpy())

    add("token_embd", len(tokens), WIDTH)
    add("output_norm", WIDTH)
    matrices = {
        "attn_q": (HEADS * DIM, WIDTH), "attn_k": (GROUPS * DIM, WIDTH), "attn_v": (GROUPS * DIM, WIDTH),
        "attn_output": (WIDTH, HEADS * DIM), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    }  # fmt: skip
    for layer in range(2):
        for name, shape in matrices.items():
            add(f"blk.{layer}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_file_is_loaded_as_transformers_reads_it(file: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path=str(file), device="cpu", dtype="bfloat16"))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = torch.tensor([tokenizer("the cat").input_ids])
    assert tokenizer.decode(ids[0]) == "the cat"
    plain = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert plain("the cat").input_ids == ids[0].tolist()
    mine, theirs = model.state_dict(), read.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name].bfloat16()) for name in mine)
    again, _ = load_model(ModelConfig(path=str(file), device="cpu"))
    assert fingerprint(again) == fingerprint(model)


def test_it_is_read_once_and_planned_from_its_header(file: Path) -> None:
    shapes = shapes_of(find_config(str(file)))
    assert (shapes.layers, shapes.kv_heads, shapes.hidden) == (2, GROUPS, WIDTH)
    recipe = recipe_for(str(file)).recipe
    assert recipe.model.path == str(file)
    assert recipe.data.seq_len == 512
    folder = gguf_folder(file)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf_folder(file) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert gguf_config(file).vocab_size == 258


def test_a_damaged_file_is_refused_in_words(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"damaged\.gguf cannot be read as a GGUF model"):
        load_model(ModelConfig(path=str(damaged), device="cpu"))
    assert not list(tmp_path.glob(".cache/trenchcoat/gguf/*/config.json"))

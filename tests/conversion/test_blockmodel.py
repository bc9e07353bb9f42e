"""Models of single blocks: exact for every family, partially read, with the fingerprint of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_families import FAMILIES, tiny_model, tokens
from trenchcoat.config import ModelConfig, StudentConfig, UserError
from trenchcoat.conversion.blocks.model import BlockSource, ReadAhead, global_names, local_names
from trenchcoat.models import identity
from trenchcoat.models.attach import attach_students
from trenchcoat.models.families import decoder_of
from trenchcoat.runtime import files

LAYERS = 4
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"] * 2}


def saved(family: str, folder: Path, **changes: Any) -> Any:
    """A random model of four layers, saved in files of a few tensors each."""
    own = ALTERNATE if family in ("cohere2", "gpt_oss") else {}
    model = tiny_model(family, num_hidden_layers=LAYERS, **own, **changes)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def watched(model: Any, ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """Hidden states before every layer and after the last, and the logits, of the whole model."""
    states: list[Tensor] = []
    layers = decoder_of(model).layers
    handles = [layers[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    handles += [
        layer.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return states, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_embedding_and_head_are_exact(family: str, tmp_path: Path) -> None:
    """Exact, with padding; the fingerprint is that of the whole model; students have the original layer indices."""
    model = saved(family, tmp_path)
    attention = model.config._attn_implementation
    ids = tokens(2, 23)
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    states, logits = watched(model, ids, mask)
    source = BlockSource(ModelConfig(path=str(tmp_path), attention=attention, dtype="float32"))
    assert source.fingerprint == identity.fingerprint(model)
    with torch.no_grad():
        embedded = decoder_of(source.embedding())(input_ids=ids, attention_mask=mask, use_cache=False)
        assert torch.equal(embedded.last_hidden_state, states[0])
        for first, stop in ((0, 1), (1, 3), (3, 4)):
            block = source.build(first, stop, source.read(first, stop))
            out = decoder_of(block)(inputs_embeds=states[first], attention_mask=mask, use_cache=False)
            assert torch.equal(out.last_hidden_state, states[stop]), (first, stop)
            students = attach_students(block, StudentConfig(window=4))
            assert list(students) == list(range(first, stop))
        assert torch.equal(source.head()(inputs_embeds=states[-1], use_cache=False).logits, logits)


def test_a_block_reads_only_its_own_tensors(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    source = BlockSource(ModelConfig(path=str(tmp_path)))
    names = source.read(2, 3)
    assert names
    assert all(name.startswith("model.layers.0.") for name in names)
    assert source.layer_bytes(1, 3) == 2 * sum(t.numel() * 4 for t in names.values())
    moved = global_names(names, 2)
    assert all(name.startswith("model.layers.2.") for name in moved)
    assert local_names({**moved, "model.layers.1.x": torch.ones(1)}, 2, 3).keys() == names.keys()


def test_reading_ahead_gives_the_same_block(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    source = BlockSource(ModelConfig(path=str(tmp_path)))
    ahead = ReadAhead(source)
    ahead.start(1, 3)
    found, other = ahead.block(1, 3), ahead.block(0, 1)
    ahead.close()
    for block, (first, stop) in ((found, (1, 3)), (other, (0, 1))):
        plain = source.build(first, stop, source.read(first, stop))
        for (name, own), (_, wanted) in zip(block.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(own, wanted), name


def test_a_copied_block_replaces_the_model(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    whole = BlockSource(ModelConfig(path=str(tmp_path / "model")))
    whole.copy_block(1, 3, tmp_path / "part")
    assert sum(file.stat().st_size for file in (tmp_path / "part").iterdir()) > whole.layer_bytes(1, 3)
    part = BlockSource(whole.cfg, tmp_path / "part")
    assert part.fingerprint == whole.fingerprint
    built, wanted = part.build(1, 3, part.read(1, 3)), whole.build(1, 3, whole.read(1, 3))
    for (name, own), (_, other) in zip(built.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    with pytest.raises(UserError, match="no tensors of layers 3 to 3"):
        part.read(3, 4)


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    lost = {name: t for name, t in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    files.save_tensors(tmp_path / "model.safetensors", lost, {"format": "pt"})
    source = BlockSource(ModelConfig(path=str(tmp_path)))
    source.build(0, 1, source.read(0, 1))
    with pytest.raises(UserError, match=r"does not contain model\.layers\.0\.mlp\.up_proj"):
        source.build(1, 2, source.read(1, 2))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        source.read(2, 3)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        BlockSource(ModelConfig(path=str(tmp_path)))

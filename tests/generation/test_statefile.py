"""A restored state continues exactly, has a constant size, and is refused by other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from tiny_families import GREEDY, make, tokens
from trenchcoat.config import UserError
from trenchcoat.generation.generate import PREFILL_TOKENS, Sampling, Session
from trenchcoat.generation.statefile import load_state, save_state
from trenchcoat.models.attach import set_mode, set_state_dtype
from trenchcoat.ops import StudentState
from trenchcoat.ops.state import add_far
from trenchcoat.runtime.files import CorruptFileError, read_tensors, save_tensors

KINDS = ("terrace", "sliding", "linear")


def saved(path: Path, model: Any, length: int = 19, pending: tuple[int, ...] = ()) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, length), past_key_values=cache, use_cache=True)
    save_state(path, model, cache, pending)
    return cache


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in KINDS),
        ("terrace", {"keep": ("0.1", "1.0")}),
        ("terrace", {"keep": (1,)}),
        ("terrace", {"keep": ("0.1", 1), "family": "gemma2"}),
        ("sliding", {"keep": ("0.0", 1), "family": "mistral"}),
    ],
)
def test_a_restored_state_continues_bit_for_bit(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """With kept groups and layers too, those with a sliding window of their own (9 tokens) among them."""
    model, path = make(student=kind, **settings), tmp_path / "state.safetensors"
    cache = saved(path, model, pending=(7, 8))
    restored, pending = load_state(path, make(student=kind, **settings))
    assert pending == [7, 8]
    more = tokens(1, 9, seed=3)
    mask = torch.ones(1, 19 + 9, dtype=torch.int64)
    found = [
        model.generate(more, attention_mask=mask, past_key_values=each, max_new_tokens=12, **GREEDY)
        for each in (cache, restored)
    ]
    assert torch.equal(*found)
    whole = model.generate(torch.cat([tokens(1, 19), more], 1), max_new_tokens=12, **GREEDY)
    assert torch.equal(whole[:, 19:], found[0])


def test_the_file_is_as_large_after_400_tokens_as_after_9(tmp_path: Path) -> None:
    model, sizes = make(), []
    for length in (9, 400):
        saved(tmp_path / "state", model, length)
        sizes.append((tmp_path / "state").stat().st_size)
    assert abs(sizes[0] - sizes[1]) <= 8  # digits of the token count


def test_padding_of_kept_groups_is_remembered(tmp_path: Path) -> None:
    """The mask of a continued batch need not repeat the padding of what was read before."""
    model, ids, more = make(keep=("0.1", "1.0")), tokens(2, 11), tokens(2, 4, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache = DynamicCache(config=model.config)
    positions = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        save_state(tmp_path / "state", model, cache)
        restored, _ = load_state(tmp_path / "state", model)
        continued = model(more, position_ids=positions, past_key_values=restored, use_cache=True).logits[0]
        alone = model(torch.cat([ids[:1, 4:], more[:1]], 1), use_cache=False).logits[0, 7:]
    torch.testing.assert_close(continued, alone, atol=5e-5, rtol=0)


def test_rows_of_a_padded_batch_are_kept(tmp_path: Path) -> None:
    model, ids = make(), tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    save_state(tmp_path / "state", model, out.past_key_values)
    restored, _ = load_state(tmp_path / "state", model)
    for old, new in zip(out.past_key_values.layers, restored.layers, strict=True):
        assert (old.tokens, old.state.seen_B.tolist()) == (new.tokens, new.state.seen_B.tolist())
    with pytest.raises(UserError, match="batch of 2 rows"):
        Session.load(tmp_path / "state", model)


def test_states_that_cannot_be_saved_are_refused_with_the_reason(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(UserError, match="holds no state"):
        save_state(tmp_path / "state", model, DynamicCache(config=model.config))
    set_mode(model, "teacher")
    with pytest.raises(UserError, match="holds no state"):
        saved(tmp_path / "state", model)
    assert not (tmp_path / "state").exists()


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    model = make()
    saved(tmp_path / "state", model)
    for other in (make(seed=5), make(student="sliding")):
        with pytest.raises(UserError, match="another model"):
            load_state(tmp_path / "state", other)
    with torch.no_grad():
        model.model.layers[1].self_attn.student.mix_H[0] += 1.0
    with pytest.raises(UserError, match="another model"):
        load_state(tmp_path / "state", model)


def _damaged(path: Path, damage: str) -> None:
    tensors, record = read_tensors(path)
    name = "layers.0.far_s_BKFE"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return
    if damage == "pickle":
        content = {name: tensor.clone() for name, tensor in tensors.items()}
        del tensors  # they are views of the file
        torch.save(content, path)
        return
    if damage == "reshaped":
        tensors[name] = tensors[name][:, :, 1:]
    elif damage == "renamed":
        tensors["layers.0.far"] = tensors.pop(name)
    elif damage == "layer-too-many":
        tensors |= {key.replace("layers.0", "layers.9"): value.clone() for key, value in tensors.items()}
    elif damage == "dtype":
        tensors[name] = tensors[name].to(torch.int32)
    elif damage == "not-finite":
        tensors[name][0, 0, 0, 0] = float("nan")
    elif damage == "kept-keys-missing":
        tensors.pop("layers.0.kept.keys")
    elif damage == "kept-values-short":
        tensors["layers.0.kept.values"] = tensors["layers.0.kept.values"][:, :, 1:]
    elif damage == "kept-heads":
        tensors |= {n: t.repeat(1, 2, 1, 1) for n, t in tensors.items() if n.startswith("layers.0.kept.")}
    elif damage == "count":
        tensors["layers.0.seen_B"] += 100
    elif damage == "negative-normaliser":
        tensors["layers.0.far_z_BKF"][0, 0, 0] = -1.0
    elif damage in ("pending-9999", "pending--1"):
        record["pending"] = f"[{damage.partition('-')[2]}]"
    elif damage == "negative-count":
        record["tokens"] = "-3"
    elif damage == "record":
        record["pending"] = "seven"
    elif damage == "format":
        record.pop("format")
    save_tensors(path, tensors, record)


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "pickle",
        "reshaped",
        "renamed",
        "layer-too-many",
        "dtype",
        "not-finite",
        "kept-keys-missing",
        "kept-values-short",
        "kept-heads",
        "count",
        "negative-normaliser",
        "pending-9999",
        "pending--1",
        "negative-count",
        "record",
        "format",
    ],
)
def test_damaged_files_are_errors(damage: str, tmp_path: Path) -> None:
    model, path = make(keep=("0.1",)), tmp_path / "state"
    saved(path, model)
    _damaged(path, damage)
    with pytest.raises((CorruptFileError, UserError), match=str(path)):
        load_state(path, model)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a saved state"):
        load_state(tmp_path / "x.safetensors", make())
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "absent", make())


def test_a_session_reads_in_chunks(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    ids, more = tokens(1, 45)[0].tolist(), tokens(1, 6, seed=2)[0].tolist()
    whole = model.generate(torch.tensor([ids + more]), max_new_tokens=10, **GREEDY)[0, 51:].tolist()
    config = Sampling(max_new_tokens=10).config(model, tokenizer)
    config.eos_token_id = None
    monkeypatch.setattr("trenchcoat.generation.generate.PREFILL_TOKENS", 8)
    assert PREFILL_TOKENS > 8
    session = Session.new(model)
    session.read(ids)
    assert session.pending == ids[-1:]
    session.save(tmp_path / "state")
    assert json.loads(read_tensors(tmp_path / "state")[1]["pending"]) == ids[-1:]
    for one in (session, Session.load(tmp_path / "state", model)):
        assert one.write(more, config) == whole
        assert one.seen + len(one.pending) == 61


def test_bfloat16_states_are_half_as_large_and_close() -> None:
    model, ids = make(), tokens(2, 30)
    found = {}
    for dtype in ("float32", "bfloat16"):
        set_state_dtype(model, dtype)
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            found[dtype] = [model(part, past_key_values=past, use_cache=True).logits for part in ids.split(1, 1)]
        state = past.layers[0].state
        size = sum(t.numel() * t.element_size() for t in (state.k_BGND, state.v_BGNE, state.far_s_BKFE))
        found[dtype].append(size)
    assert found["float32"].pop() == 2 * found["bfloat16"].pop()
    exact, short = (torch.cat(found[dtype], 1) for dtype in ("float32", "bfloat16"))
    error = float((exact - short).norm() / exact.norm())
    assert 0 < error < 8 * torch.finfo(torch.bfloat16).eps  # a few rounding errors per layer, but not zero
    with pytest.raises(UserError, match="float16"):
        set_state_dtype(model, "float16")


def test_a_bfloat16_sum_keeps_growing() -> None:
    """Rounded to nearest, it would stop growing at 256 times the increment."""
    sums: dict[str, Any] = {}
    one = torch.ones(1, 1, 1, 4)
    for dtype in (torch.float32, torch.bfloat16):
        s, z = torch.zeros(1, 1, 4, 4, dtype=dtype), torch.zeros(1, 1, 4)
        for turn in range(2000):
            add_far(s, z, one, one, torch.tensor([turn]))
        sums[str(dtype)] = s.float()
    stuck = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(2000):
        stuck += 1
    assert float(stuck) == 256
    error = (sums["torch.bfloat16"] / sums["torch.float32"] - 1).abs()
    assert float(error.max()) < 4 * torch.finfo(torch.bfloat16).eps


def test_a_state_counts_its_tokens_on_the_host() -> None:
    state = StudentState(*(torch.zeros(3, 1) for _ in range(6)), seen_B=torch.tensor([5, 0, 9]))
    assert state.positions() == [5, 0, 9]
    state.count()
    assert state.positions() == state.seen_B.tolist() == [6, 1, 10]
    state.count(torch.tensor([True, False, True]))
    assert state.positions() == [7, 1, 11]
    assert state.index_select(torch.tensor([2, 2])).positions() == [11, 11]
    assert state.zero_().positions() == [0, 0, 0]

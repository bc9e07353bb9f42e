"""Kept key/value groups: which heads compute what, their cache, and settings that do not fit.

The contracts (causality, prefill = decode, padding, saved = loaded) over all families are in test_families.py, the ways
of `generate()` in test_cache.py, state files in tests/generation/test_statefile.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from operator_kit import budget, error
from tiny_families import WINDOW, decoded_together, logits, make, tiny_model, tokens
from trenchcoat.config import FeatureMapConfig, StudentConfig, UserError
from trenchcoat.models.attach import attach_students, detach_students, freeze_for_transfer, set_mode, students_of
from trenchcoat.models.cache import cache_nbytes, state_layer
from trenchcoat.models.kept import KeptKeys
from trenchcoat.ops.compiled.build import compiler
from trenchcoat.students.heads import KeptHeads

LENGTH = 21
STUDENT = StudentConfig(window=WINDOW, sinks=1, feature_map=FeatureMapConfig(feature_dim=6))


def attention_outputs(model: Any, ids: Tensor) -> Tensor:
    """What the first layer hands to its output projection, [rows, tokens, heads, head dim]."""
    found: list[Tensor] = []
    attention = model.model.layers[0].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    logits(model, ids)
    handle.remove()
    return found[0].unflatten(-1, (-1, attention.head_dim))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
@pytest.mark.parametrize("group", [0, 1])
def test_each_head_computes_its_own_attention(family: str, group: int) -> None:
    """Kept heads give the teacher's outputs, the others those of a model whose heads are all linear."""
    ids = tokens(2, LENGTH)
    teacher = attention_outputs(tiny_model(family), ids)
    found = {}
    for name, keep in (("linear", ()), ("mixed", (f"0.{group}",))):
        model = tiny_model(family)
        student = attach_students(model, StudentConfig(**{**STUDENT.__dict__, "keep": keep}))[0]
        for parameters in (student.query_map.parameters(), student.key_map.parameters()):
            for parameter in parameters:  # the same map in every head, so that heads of the two models agree
                parameter.data.copy_(parameter.data[:1].clone())
        set_mode(model, "student")
        found[name] = attention_outputs(model, ids)
    kept = slice(2 * group, 2 * group + 2)
    others = [head for head in range(4) if head // 2 != group]
    torch.testing.assert_close(found["mixed"][:, :, kept], teacher[:, :, kept], atol=1e-6, rtol=0)
    torch.testing.assert_close(found["mixed"][:, :, others], found["linear"][:, :, others], atol=1e-6, rtol=0)
    assert (found["linear"] - teacher)[:, 2 * WINDOW :].abs().max() > 1e-3


def test_only_the_other_heads_learn() -> None:
    model, ids = tiny_model(), tokens(2, LENGTH)
    attach_students(model, StudentConfig(**{**STUDENT.__dict__, "keep": ("0.1",)}))
    freeze_for_transfer(model)
    set_mode(model, "transfer")
    logits(model, ids)
    mixed, linear = students_of(model).values()
    assert mixed.query_map.weight.shape[0] == 2
    assert linear.query_map.weight.shape[0] == 4
    assert mixed.query_map.weight.grad.abs().sum((1, 2)).min() > 0

    detach_students(model)
    attach_students(model, STUDENT)
    whole = students_of(model)[0]
    for name in ("query_map", "key_map"):
        getattr(whole, name).weight.data[:2] = getattr(mixed, name).weight.data
    freeze_for_transfer(model)
    set_mode(model, "transfer")
    logits(model, ids)
    share = 0.5  # the loss is a mean over the heads
    expected = whole.query_map.weight.grad[:2] / share
    torch.testing.assert_close(mixed.query_map.weight.grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (("2.0",), r"student\.keep names layer 2, but the model's layers are 0\.\.1"),
        (("1.2",), r"names group 1\.2, but layer 1 has the key/value groups 1\.0 to 1\.1"),
        (("0", "1.0", "1.1"), r"student\.keep names all 2 layers"),
        (("13%",), r"does not say which groups to keep: run `trenchcoat select`"),
    ],
)
def test_groups_that_do_not_exist_change_nothing(keep: tuple[str, ...], message: str) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=message):
        attach_students(model, StudentConfig(window=WINDOW, keep=keep))
    assert not students_of(model)


def test_a_layer_whose_groups_are_all_kept_is_the_models_own() -> None:
    ids = tokens(2, LENGTH)
    found = []
    for keep in (("0",), ("0.0", "0.1")):
        model = make(keep=keep)
        assert list(students_of(model)) == [1]
        found.append(logits(model, ids))
    assert torch.equal(*found)


def test_the_cache_is_constant_bytes_and_bytes_a_token() -> None:
    model = make(keep=("0.1",))
    sizes = []
    for length in (8, 108, 208):
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(1, length), past_key_values=past, use_cache=True)
        sizes.append(cache_nbytes(past))
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 100 * 2 * 8 * 4  # keys and values of one head of 8 in float32


def appended(count: int, *, window: int | None = None, room: int | None = None) -> tuple[KeptKeys, Tensor, list[int]]:
    """Cache, keys [1, 1, count, 2], and the allocations that appending them one by one made."""
    held = KeptKeys(room)
    held.window = window
    keys, rooms = torch.arange(2.0 * count).view(1, 1, count, 2), []
    for key in keys.split(1, 2):
        held.append(key, -key)
        if held.allocated not in rooms:
            rooms.append(held.allocated)
    return held, keys, rooms


def test_tokens_are_not_copied_again_for_every_new_one() -> None:
    held, keys, rooms = appended(1000)
    assert torch.equal(held.keys, keys)
    assert torch.equal(held.values, -keys)
    assert len(rooms) < 10
    assert sum(rooms[:-1]) < 3 * 1000
    assert held.allocated <= 1.6 * 1000
    assert appended(40, room=50)[2] == [64]
    assert appended(90, room=100)[2] == [100]


def test_a_native_window_drops_what_it_has_left_behind() -> None:
    held, keys, rooms = appended(1000, window=10)
    assert torch.equal(held.keys, keys[:, :, -10:])
    assert (held.seen, held.dropped, max(rooms)) == (1000, 990, 64)
    columns = held.append(keys[:, :, :5], keys[:, :, :5])
    assert (columns.length, columns.offset, columns.query_offset) == (14, 991, 1000)


def test_gradients_flow_through_kept_keys() -> None:
    """Learning through a cache read in two pieces gives the gradients of the whole text."""
    ids = tokens(1, 13)
    found = []
    for pieces in ([13], [6, 7]):
        model, past = make(keep=("0.1", "1.0")), DynamicCache()
        outputs = [model(part, past_key_values=past, use_cache=True).logits for part in ids.split(pieces, 1)]
        torch.cat(outputs, 1)[:, -1].square().sum().backward()
        attention = model.model.layers[1].self_attn
        found.append([attention.q_proj.weight.grad, attention.v_proj.weight.grad[:8]])  # group 0, the kept one
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_first_padded_piece_counts_earlier_columns_as_real() -> None:
    held = KeptKeys()
    piece = torch.zeros(2, 1, 3, 2)
    assert held.append(piece, piece).real_BN is None
    columns = held.append(piece, piece, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert columns.real_BN is not None
    assert columns.real_BN.tolist() == [[True] * 3 + [False, True, True], [True] * 6]
    held.index_select(torch.tensor([1, 0, 0]))
    assert held.keys.shape == (3, 1, 6, 2)
    assert held.tensors()["real"].all(1).tolist() == [True, False, False]


def test_heads_are_split_and_joined_in_order() -> None:
    heads = KeptHeads((0, 2), num_heads=6, num_kv_heads=3)
    x = torch.arange(6.0).view(1, 1, 6, 1)
    kept, free = heads.kept(x, 2), heads.free(x, 2)
    assert kept.flatten().tolist() == [0, 1, 4, 5]
    assert free.flatten().tolist() == [2, 3]
    assert torch.equal(heads.join(kept, free), x)
    keys = torch.arange(3.0).view(1, 3, 1, 1)
    assert (heads.kept(keys).flatten().tolist(), heads.free(keys).flatten().tolist()) == ([0, 2], [1])


def test_a_kept_group_needs_the_mask_of_its_cache() -> None:
    model = make(keep=("0.1",))
    attention: nn.Module = model.model.layers[0].self_attn
    cache = DynamicCache()
    state_layer(cache, 0)
    hidden, angles = torch.zeros(1, 3, 32), (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="gives its layers no mask"):
        attention(hidden_states=hidden, position_embeddings=angles, attention_mask=None, past_key_values=cache)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("name", "family", "padded", "layers"),
    [("terrace", "llama", False, 2), ("terrace", "llama", True, 0), ("terrace", "granite", False, 2),
     ("terrace", "gemma2", False, 1), ("terrace", "mistral", False, 0), ("terrace_gated", "llama", False, 2),
     ("terrace_gated", "llama", True, 0), ("terrace_gated", "gemma2", False, 1)],
)  # fmt: skip
def test_one_call_of_the_kernels_decodes_both_parts(
    name: str, family: str, padded: bool, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`layers` of the two decode the student and its kept groups together (not those with padding or with a sliding
    window of the model's own); all give what PyTorch gives in two calls."""
    together = decoded_together(monkeypatch)
    ids, mask = tokens(2, 61), torch.ones(2, 61, dtype=torch.int64)
    mask[0, : 3 if padded else 0] = 0
    found = {}
    implementations = {"exact": "reference" if name == "terrace" else "chunkwise"}
    implementations |= {"chunkwise": "chunkwise", "compiled": "auto"}
    for impl, asked in implementations.items():
        model = tiny_model(family).to(torch.float64 if impl == "exact" else torch.float32)
        attach_students(model, replace(STUDENT, name=name, impl=asked, keep=("0.1", "1.0")))
        set_mode(model, "student")
        together.clear()
        past, pieces = DynamicCache(config=model.config), []
        for start, stop in ((0, 9), (9, 12), *((t, t + 1) for t in range(12, 61))):
            options = {"past_key_values": past, "use_cache": True, "attention_mask": mask[:, :stop]}
            pieces.append(logits(model, ids[:, start:stop], **options))
        found[impl] = torch.cat(pieces, 1)[mask.bool()]
        assert sum(together) == (50 * layers if impl == "compiled" else 0)
    exact = found["exact"]
    assert exact.dtype == torch.float64
    assert error(found["compiled"], exact) <= budget(error(found["chunkwise"], exact), terms=61 * 12)

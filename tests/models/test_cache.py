"""The constant-size cache under `generate()`: every generation mode matches the full forward pass."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tiny_families import GREEDY, WINDOW, logits, make, tiny_model, tokens
from trenchcoat.models import cache, interface
from trenchcoat.models.attach import set_mode
from trenchcoat.models.cache import StateLayer, cache_nbytes
from trenchcoat.students import STUDENTS, student_class

GROUPS = ("0.1", "1.0")
"""Kept groups: one of two in each layer."""

each_student = pytest.mark.parametrize(
    ("student", "keep"),
    [
        (s, keep)
        for s in STUDENTS
        for keep in ((), (0,), GROUPS)
        if keep != GROUPS or not student_class(s).replaces_layer
    ],
)
"""A student that takes the place of whole layers leaves no groups."""

kept_or_not = pytest.mark.parametrize("keep", [(), GROUPS])


def greedy_by_hand(model: Any, ids: Tensor, new: int) -> Tensor:
    """Continue one row, recomputing everything for every token."""
    for _ in range(new):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("student", STUDENTS)
def test_greedy(student: str) -> None:
    model, ids = make(student=student), tokens(1, 7)
    assert torch.equal(model.generate(ids, max_new_tokens=30, **GREEDY), greedy_by_hand(model, ids, 30))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "smollm3"])
@pytest.mark.parametrize("keep", [(), (0,), (1,), GROUPS, ("0.0",), ("0.1", 1)])
def test_greedy_with_kept_layers_of_every_kind(family: str, keep: tuple[int | str, ...]) -> None:
    model, ids = make(family, keep=keep), tokens(1, 12)
    assert torch.equal(model.generate(ids, max_new_tokens=20, **GREEDY), greedy_by_hand(model, ids, 20))


@kept_or_not
def test_sampling_and_beams_agree_with_no_cache(keep: tuple[int | str, ...]) -> None:
    model, ids = make(keep=keep), tokens(2, 9)
    for options in (
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 4, "do_sample": False, "early_stopping": True},
    ):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            found.append(model.generate(ids, max_new_tokens=16, use_cache=use_cache, pad_token_id=2, **options))
        assert torch.equal(found[0], found[1]), options


@kept_or_not
def test_several_samples_of_a_prompt(keep: tuple[int | str, ...]) -> None:
    model, ids = make(keep=keep), tokens(2, 9)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(model.generate(ids, max_new_tokens=8, do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert torch.equal(found[0], found[1])


@each_student
def test_a_left_padded_batch_is_its_rows_alone(student: str, keep: tuple[int | str, ...]) -> None:
    model, ids = make(student=student, keep=keep), tokens(3, 13)
    pads = (0, 5, 11)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        ids[row, :pad] = 2
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY)
    for row, pad in enumerate(pads):
        alone = model.generate(ids[row : row + 1, pad:], max_new_tokens=20, **GREEDY)
        assert torch.equal(batch[row, pad:], alone[0])


@kept_or_not
def test_continuation_from_a_cache(keep: tuple[int | str, ...]) -> None:
    model, ids = make(keep=keep), tokens(2, 9)
    whole = model.generate(ids, max_new_tokens=24, **GREEDY)
    first = model.generate(ids, max_new_tokens=10, return_dict_in_generate=True, **GREEDY)
    more = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=14, **GREEDY)
    assert torch.equal(more, whole)


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        *itertools.product(
            ({"prefill_chunk_size": 4}, {"cache_implementation": "static"}), ((), (1,), GROUPS, ("0.1", 1))
        ),
        *itertools.product(({"cache_implementation": "offloaded"},), ((), GROUPS)),  # its softmax layers need a GPU
    ],
)
def test_other_ways_to_prefill_and_cache(options: dict[str, Any], keep: tuple[int | str, ...]) -> None:
    model, ids = make(keep=keep), tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=15, **GREEDY)
    other = model.generate(ids, attention_mask=mask, max_new_tokens=15, disable_compile=True, **options, **GREEDY)
    assert torch.equal(plain, other)


@pytest.mark.parametrize("keep", [(0,), GROUPS])
def test_a_cache_made_without_a_config(keep: tuple[int | str, ...]) -> None:
    model, ids = make(keep=keep), tokens(1, 9)
    past = DynamicCache()
    with torch.no_grad():
        first = model(ids[:, :5], past_key_values=past, use_cache=True).logits
        second = model(ids[:, 5:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, second], 1), logits(model, ids), atol=5e-5, rtol=0)


@pytest.mark.parametrize("student", STUDENTS)
def test_the_state_is_as_large_after_400_tokens_as_after_40(student: str) -> None:
    model = make(student=student, num_hidden_layers=1)
    past, token, sizes = DynamicCache(config=model.config), tokens(1, 1), {}
    steps = 400
    with torch.no_grad():
        for seen in range(1, steps + 1):
            token = model(token, past_key_values=past, use_cache=True).logits.argmax(-1)
            sizes[seen] = cache_nbytes(past)
    assert sizes[40] > 0
    assert set(sizes.values()) == {sizes[40]}
    assert past.get_seq_length() == steps
    state = past.layers[0].state
    assert all(torch.isfinite(t).all() for t in state.tensors().values())
    buffers = {"terrace": 2 * WINDOW, "sliding": WINDOW, "linear": 0, "window_sinks": 2 * WINDOW}
    if student in buffers:
        assert state.k_BGND.shape[2] == buffers[student]


def test_softmax_grows_where_the_state_does_not() -> None:
    model, sizes = make(keep=(1,)), []
    past = DynamicCache(config=model.config)
    for part in tokens(1, 40).split(10, 1):
        with torch.no_grad():
            model(part, past_key_values=past, use_cache=True)
        sizes.append([cache_nbytes(DynamicCacheView(layer)) for layer in past.layers])
    assert len({linear for linear, _ in sizes}) == 1
    assert [softmax for _, softmax in sizes] == [n * sizes[0][1] for n in (1, 2, 3, 4)]


class DynamicCacheView:
    """One layer, measured alone."""

    def __init__(self, layer: Any) -> None:
        self.layers = [layer]


def filled(length: int = 12, keep: tuple[int | str, ...] = ()) -> tuple[Any, DynamicCache]:
    model = make(keep=keep)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(2, length), past_key_values=past, use_cache=True)
    return model, past


def test_rows_are_selected_repeated_and_dropped() -> None:
    _, past = filled()
    layer = past.layers[0]
    assert isinstance(layer, StateLayer)
    before = layer.state.clone()
    past.batch_repeat_interleave(2)
    past.reorder_cache(torch.tensor([3, 0]))
    for name, tensor in layer.state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name].flip(0)), name
    past.batch_select_indices(torch.tensor([False, True]))
    assert torch.equal(layer.state.far_s_BKFE[0], before.far_s_BKFE[0])
    past.reset()
    assert past.get_seq_length() == 0
    assert cache_nbytes(past) == 0


@kept_or_not
def test_a_reset_cache_starts_over(keep: tuple[int | str, ...]) -> None:
    model, past = filled(keep=keep)
    past.reset()
    ids = tokens(2, 9, seed=4)
    with torch.no_grad():
        again = model(ids, past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(again, logits(model, ids), atol=5e-5, rtol=0)


@kept_or_not
def test_offloading_moves_the_state_and_back(keep: tuple[int | str, ...]) -> None:
    _, past = filled(keep=keep)
    for layer in past.layers:
        layer.offload()
        layer.prefetch()
    assert past.layers[0].state.seen_B.tolist() == [12, 12]


def test_crop_is_possible_only_where_it_removes_nothing() -> None:
    _, past = filled()
    past.crop(0)
    past.crop(12)
    assert past.get_seq_length() == 12
    with pytest.raises(ValueError, match="cannot be rolled back"):
        past.crop(-1)
    with pytest.raises(ValueError, match="seen 12 tokens"):
        past.crop(5)


@each_student
def test_recorded_tokens_are_taken_back(student: str, keep: tuple[int | str, ...]) -> None:
    model, ids = make(student=student, keep=keep), tokens(2, 40)
    wrong, whole = tokens(2, 40, seed=9), logits(model, ids)
    past = DynamicCache(config=model.config)
    past.activate_past_recording()

    def read(given: Tensor) -> Tensor:
        with torch.no_grad():
            return model(given, past_key_values=past, use_cache=True).logits

    read(torch.cat([ids[:, :15], wrong[:, :4]], 1))
    past.crop(-4)
    assert past.get_seq_length() == 15
    found = [whole[:, :15], read(ids[:, 15:18])]
    past.crop(0)
    for number in (1, 2, 9, WINDOW + 1):  # several calls, of which only the first is right
        read(wrong[:, :number])
    past.crop(-(1 + 2 + 9 + WINDOW + 1))
    found.append(read(ids[:, 18:30]))
    read(wrong[:, :3])
    kept_aside = copy.deepcopy(past)
    past.crop(-5)  # two of the right ones too
    kept_aside.crop(-5)
    with torch.no_grad():
        again = model(ids[:, 28:], past_key_values=kept_aside, use_cache=True).logits
    torch.testing.assert_close(again, whole[:, 28:], atol=5e-5, rtol=0)
    found = [*found[:-1], found[-1][:, :-2], read(ids[:, 28:])]
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=5e-5, rtol=0)
    past.crop(0)
    if keep != (0,):
        with pytest.raises(ValueError, match="cannot be rolled back"):
            past.layers[0].crop(-1)


def test_of_a_long_call_only_the_end_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cache, interface):
        monkeypatch.setattr(module, "RECORDED", 8)
    model, ids = make(keep=GROUPS), tokens(1, 40)
    past = DynamicCache(config=model.config)
    past.activate_past_recording()
    with torch.no_grad():
        first = model(ids[:, :30], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(first, logits(model, ids)[:, :30], atol=5e-5, rtol=0)
        past.crop(-8)
        again = model(ids[:, 22:], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(again, logits(model, ids)[:, 22:], atol=5e-5, rtol=0)
    with pytest.raises(ValueError, match="at most 8"):
        past.crop(-9)


@each_student
def test_assisted_decoding_writes_what_greedy_decoding_writes(student: str, keep: tuple[int | str, ...]) -> None:
    model, ids = make(student=student, keep=keep), tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=24, **GREEDY)
    other = tiny_model("llama", seed=5, num_hidden_layers=1)  # nearly always wrong
    twin = make(student=student, keep=keep)  # always right, and its own states are rolled back too
    for assistant in (other, twin):
        found = model.generate(ids, assistant_model=assistant, max_new_tokens=24, **GREEDY)
        assert torch.equal(found, expected)


@kept_or_not
def test_prompt_lookup_writes_what_greedy_decoding_writes(keep: tuple[int | str, ...]) -> None:
    model, ids = make("mistral", keep=keep), tokens(1, 9).repeat(1, 3)
    expected = model.generate(ids, max_new_tokens=24, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=24, **GREEDY), expected)


def test_modes_do_not_share_a_cache() -> None:
    model, past = filled()
    set_mode(model, "teacher")
    with pytest.raises(ValueError, match="start a new cache"):
        model(tokens(2, 1), past_key_values=past, use_cache=True)
    past = DynamicCache(config=model.config)
    model(tokens(2, 3), past_key_values=past, use_cache=True)
    set_mode(model, "student")
    with pytest.raises(ValueError, match="filled by softmax attention"):
        model(tokens(2, 1), past_key_values=past, use_cache=True)


def test_bfloat16_generates() -> None:
    model, ids = make().to(torch.bfloat16), tokens(2, 9)
    for student in (m for m in model.modules() if hasattr(m, "mix_H")):
        student.float()
    out = model.generate(ids, max_new_tokens=20, return_dict_in_generate=True, **GREEDY)
    state = out.past_key_values.layers[0].state
    assert (state.k_BGND.dtype, state.far_s_BKFE.dtype) == (torch.bfloat16, torch.float32)

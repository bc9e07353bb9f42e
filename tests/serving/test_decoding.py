"""Choosing tokens and turning them into text, against plain definitions and Transformers' own generate."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from conftest import byte_tokenizer
from trenchcoat.serving.decoding import Chooser, Detokenizer, StopFilter, probabilities
from trenchcoat.serving.requests import Request

GREEDY = GenerationConfig()
CPU = torch.device("cpu")


@given(
    text=st.text("ab<|", max_size=40),
    stops=st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=3),
    cuts=st.randoms(),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], cuts: random.Random
) -> None:
    """Where two stop strings overlap, the one that is complete first counts, as in a stream it must."""
    filter_, written, rest = StopFilter(tuple(stops)), "", text
    while rest and not filter_.stopped:
        size = cuts.randint(1, 3)
        written += filter_.push(rest[:size])
        rest = rest[size:]
    written += filter_.flush()
    found = [text.find(stop) for stop in stops if stop in text]
    assert filter_.stopped == bool(found)
    if not found:
        assert written == text
    else:
        ends = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert text.startswith(written)
        assert not any(stop in written for stop in stops)
        assert min(found) <= len(written) <= ends


@given(text=st.text(max_size=30))
def test_pieces_of_text_are_whole_characters_and_add_up(text: str) -> None:
    tokenizer: Any = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, special=False)
    pieces = [detokenizer.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


def test_a_text_of_no_whole_character_is_passed_on_in_constant_memory() -> None:
    tokenizer: Any = byte_tokenizer()
    broken = tokenizer("é", add_special_tokens=False)["input_ids"][1]
    detokenizer = Detokenizer(tokenizer, special=False)
    assert "".join(detokenizer.push(broken) for _ in range(40)).count("\ufffd") >= 32


def chooser(own: GenerationConfig = GREEDY, prompt: tuple[int, ...] = (), sample: int = 0, **fields: Any) -> Chooser:
    return Chooser(replace(Request(), **fields), own, list(prompt), device=CPU, sample=sample)


def drawn(own: GenerationConfig = GREEDY, **fields: Any) -> set[int]:
    """The tokens that are ever chosen from logits 4, 3, 2, 1, 0."""
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    return {chooser(own, **({"seed": seed} | fields)).choose(logits) for seed in range(200)}


def test_sampling_is_what_the_request_says_and_else_the_models_own() -> None:
    assert drawn() == {0}
    assert drawn(temperature=0.0) == drawn(top_p=1.0, top_k=-1, min_p=0.0) == {0}
    assert drawn(temperature=2.0) == {0, 1, 2, 3, 4}
    assert drawn(temperature=2.0, top_k=2) == drawn(top_k=2, temperature=1.0) == {0, 1}
    assert drawn(temperature=1.0, top_p=0.7) == drawn(top_p=0.7) == {0, 1}
    assert drawn(temperature=1.0, min_p=0.1) == {0, 1, 2}
    own = GenerationConfig(do_sample=True, temperature=1.0, top_k=3)
    assert drawn(own) == {0, 1, 2}
    assert drawn(own, top_k=2) == {0, 1}
    assert drawn(own, temperature=0.0) == {0}


def test_samples_of_one_seed_differ_and_come_again() -> None:
    logits = torch.zeros(1000)
    first = [chooser(seed=3, temperature=1.0, sample=sample).choose(logits) for sample in range(4)]
    assert first == [chooser(seed=3, temperature=1.0, sample=sample).choose(logits) for sample in range(4)]
    assert len(set(first)) == 4
    assert len({chooser(temperature=1.0).choose(logits) for _ in range(4)}) > 1


def test_penalties_and_bias() -> None:
    logits = torch.tensor([2.0, 1.5, 0.0])
    assert chooser(logit_bias={2: 100.0}).choose(logits) == 2
    assert chooser(logit_bias={0: -100.0}).choose(logits) == 1
    presence = chooser(presence_penalty=1.0)
    assert [presence.choose(logits) for _ in range(3)] == [0, 1, 0], "once a token was written, as often as it was"
    frequency = chooser(frequency_penalty=0.3)
    assert [frequency.choose(logits) for _ in range(5)] == [0, 0, 1, 0, 1]
    assert chooser(presence_penalty=2.0, prompt=(0,)).choose(logits) == 0, "these two count what was written only"
    assert chooser(repetition_penalty=2.0, prompt=(0,)).choose(logits) == 1, "this one counts the prompt too"
    assert logits.tolist() == [2.0, 1.5, 0.0], "the model's own logits are kept"


def test_probabilities_are_the_models() -> None:
    logprob, top = probabilities(torch.tensor([0.0, 1.0, float("-inf")]), 2, 2)
    assert logprob == -9999.0
    expected = torch.log_softmax(torch.tensor([0.0, 1.0]), -1)
    assert list(top) == [1, 0]
    assert list(top.values()) == pytest.approx([float(expected[1]), float(expected[0])])

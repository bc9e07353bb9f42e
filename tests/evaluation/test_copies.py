"""Copies of text and of random tokens: the rows, their scores, and the sizes of caches."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from conftest import tiny_llama_config
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.evaluation.cachesize import cache_size
from trenchcoat.evaluation.copies import random_copies, text_copies
from trenchcoat.evaluation.results import CacheSize
from trenchcoat.evaluation.scoring import gather_rows, score, score_copies
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.cache import cache_nbytes

VOCAB = 61


class Repeater(nn.Module):
    """Predicts the token that stood ``back`` places before the one to come."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.back, self.weight = back, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for n in range(self.back - 1, input_ids.shape[1]):
            logits[:, n].scatter_(1, input_ids[:, n + 1 - self.back, None], 9.0)
        return CausalLMOutput(logits=logits)


def rows(number: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (number, length), generator=torch.Generator().manual_seed(seed))


def test_pieces_of_text_are_spread_over_it_and_repeated() -> None:
    text = gather_rows(torch.arange(40).reshape(4, 10))
    found = text_copies(text, 5, 4)
    assert found is not None
    assert found[:, 0].tolist() == [0, 10, 20, 30]
    assert torch.equal(found[:, :5], found[:, 5:])
    everything = text_copies(text, 5, 100)
    assert everything is not None
    assert everything.shape == (8, 10)
    assert text_copies(text, 21, 4) is None  # one piece gives no error


def test_padding_is_no_part_of_a_copy() -> None:
    batch = {"input_ids": rows(2, 10), "attention_mask": torch.tensor([[1] * 10, [0] * 4 + [1] * 6])}
    found = text_copies(gather_rows([batch]), 8, 9)
    assert found is not None
    assert found[1, :8].tolist() == [*batch["input_ids"][0, 8:].tolist(), *batch["input_ids"][1, 4:].tolist()]


def test_random_copies_leave_special_tokens_out_and_differ_by_seed() -> None:
    text = gather_rows(torch.arange(20).reshape(2, 10))
    found = random_copies(text, 50, 3, special=(0, 7))
    assert torch.equal(found[:, :50], found[:, 50:])
    assert set(found.flatten().tolist()) == set(range(20)) - {0, 7}
    assert torch.equal(found, random_copies(text, 50, 3, special=(0, 7)))
    assert not torch.equal(found, random_copies(text, 50, 3, special=(0, 7), seed=1))


def test_only_the_second_half_counts() -> None:
    ids = rows(3, 12).repeat(1, 2)
    losses, hits = score_copies(Repeater(12), ids, batch_size=2)
    assert losses.counts == hits.counts == [12, 12, 12]
    assert hits.sums == [12.0, 12.0, 12.0]
    assert losses.mean < 0.01
    _, missed = score_copies(Repeater(3), ids)
    assert missed.mean < 0.3


@pytest.mark.parametrize("exact", [None, 4, 0])
def test_near_tokens_are_those_whose_past_is_in_the_near_part(exact: int | None) -> None:
    ids = rows(2, 30)
    scores = score(Repeater(2), ids, window=4, exact=exact)
    near = 8 if exact is None else exact
    assert scores.near.counts == [near] * 2
    assert scores.far.counts == [29 - 8] * 2
    whole = score(Repeater(2), ids[:, : near + 1], window=4).all.sums if near else [0.0, 0.0]
    assert scores.near.sums == pytest.approx(whole)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(vocab_size=VOCAB, max_position_embeddings=256)).eval()


def test_the_size_of_a_cache_at_any_length_is_that_of_a_real_one() -> None:
    teacher = llama()
    student = copy.deepcopy(teacher)
    kept = copy.deepcopy(teacher)
    config = StudentConfig(window=4, keep_softmax=(1,), feature_map=FeatureMapConfig(feature_dim=8))
    attach_students(student, config)
    attach_students(kept, dataclasses.replace(config, keep=("0.1",)))
    for model in (student, kept):
        set_mode(model, "student")
    for model, growing in ((teacher, 2), (student, 1), (kept, 1.5)):
        size = cache_size(model)
        assert size is not None
        assert (size.constant > 0) == (model is not teacher)
        config = model.config
        per_layer = 2 * config.num_key_value_heads * config.head_dim * 4
        assert size.per_token == growing * per_layer
        ids = torch.arange(200)[None] % VOCAB
        assert size.at(200) == cache_nbytes(model(input_ids=ids, use_cache=True).past_key_values)


def test_layers_with_a_window_of_their_own_stop_growing() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=40, max_position_embeddings=512,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    size = cache_size(model)
    per_token = 2 * 16 * 4  # one key/value head
    assert size == CacheSize(0, 0, [(2 * per_token, 39), (2 * per_token, 39)])
    assert size.at(8192) == 2 * 39 * 2 * per_token
    attach_students(model, StudentConfig(window=4, keep=("0.1",), feature_map=FeatureMapConfig(feature_dim=8)))
    set_mode(model, "student")
    size = cache_size(model)
    assert size is not None
    assert (size.per_token, size.limited) == (0, [(per_token, 40)])

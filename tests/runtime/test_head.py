"""Logits in pieces: what the model itself computes, in every family, and the gradients of a whole backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_families import FAMILIES, tiny_model, tokens
from trenchcoat.runtime import head
from trenchcoat.runtime.head import VocabularyHead, run_to_head

CAPPED: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}
"""Families that change the logits after their head."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_models_logits(family: str) -> None:
    model = tiny_model(family, **CAPPED.get(family, {}))
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden_bTd, further = run_to_head(model, input_ids=ids, use_cache=False)
        modules = list(model.modules())
        for frozen in (False, True):
            found = VocabularyHead(model, frozen=frozen)(hidden_bTd.flatten(0, 1))
            torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=0)
        if family in CAPPED:
            raw = model.get_output_embeddings()(hidden_bTd)
            assert not torch.allclose(raw, expected, rtol=0.1), "the family's own step is not tested"
    assert not further
    assert [id(one) for one in model.modules()] == [id(one) for one in modules]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_of_pieces_are_those_of_the_whole(family: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hidden states and of a trained head; the length of a piece does not matter."""
    model = tiny_model(family, tie_word_embeddings=tied, **CAPPED.get(family, {})).double()
    weight = model.get_output_embeddings().weight
    hidden_nd = torch.randn(11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted_nV = torch.randn(11, len(weight), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = hidden_nd.clone().requires_grad_()
    VocabularyHead(model)(whole).backward(wanted_nV)
    expected, expected_weight = whole.grad, weight.grad.clone()
    for elements in (1, 3 * len(weight), 1 << 25):
        monkeypatch.setattr(head, "PIECE_ELEMENTS", elements)
        weight.grad = None
        found = VocabularyHead(model).backward(hidden_nd, lambda where, logits_nV: wanted_nV[where])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(weight.grad, expected_weight)


def test_without_gradients_the_pieces_are_visited_and_nothing_is_kept() -> None:
    model, seen = tiny_model(), []
    with torch.no_grad():
        found = VocabularyHead(model).backward(
            torch.ones(3, 32), lambda where, logits_nV: seen.append(where) or logits_nV
        )
    assert seen == [slice(0, 3)]
    assert not found.any()
    assert model.get_output_embeddings().weight.grad is None


def test_a_frozen_head_keeps_the_weights_of_its_moment() -> None:
    model = tiny_model()
    hidden_nd = torch.randn(2, 32)
    with torch.no_grad():
        kept = VocabularyHead(model, frozen=True)
        before = kept(hidden_nd)
        weight = model.get_output_embeddings().weight
        weight.data = weight.data * 2
        assert torch.equal(kept(hidden_nd), before)
        assert not torch.equal(VocabularyHead(model)(hidden_nd), before)

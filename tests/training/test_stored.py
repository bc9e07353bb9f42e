"""The teacher's logits as bytes: the divergence of the listed tokens and the others as one, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny_families import tiny_model, tokens
from trenchcoat.runtime.head import VocabularyHead, run_to_head
from trenchcoat.training import stored
from trenchcoat.training.logits import log_probabilities
from trenchcoat.training.stored import StoredLogits, listed, packed_logits, token_bytes


def packed_and_exact(monkeypatch: pytest.MonkeyPatch, top: int) -> tuple[VocabularyHead, Tensor, Tensor]:
    """A head, stored logits [12, bytes] of a random model, and its log-probabilities in float64."""
    monkeypatch.setattr(stored, "TOP", top)
    model = tiny_model()
    with torch.no_grad():
        hidden_bTd, _ = run_to_head(model, input_ids=tokens(2, 6), use_cache=False)
        head = VocabularyHead(model)
        packed = packed_logits(head, hidden_bTd)
        exact = head(hidden_bTd.flatten(0, 1)).double().log_softmax(-1)
    assert packed.shape == (2, 6, token_bytes(97))
    assert packed.dtype == torch.uint8
    return head, packed.flatten(0, 1), exact


@pytest.mark.parametrize("top", [5, 40, 256])
def test_the_divergence_is_that_of_the_coarser_distributions(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head, packed, log_p = packed_and_exact(monkeypatch, top)
    student = torch.randn(12, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    log_q = student.log_softmax(-1)
    chosen = log_p.topk(listed(97)).indices
    parts = []
    for log in (log_p, log_q):
        rest = log.scatter(1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
        parts.append(torch.cat([log.gather(1, chosen), rest], -1))
    expected = (parts[0].exp() * (parts[0] - parts[1])).sum(-1)
    expected.sum().backward()
    with torch.no_grad():
        found, pull = StoredLogits(packed).divergence(head, torch.arange(12), log_probabilities(student))
        whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_q.detach().exp() - pull, student.grad, rtol=0, atol=2e-3)
    torch.testing.assert_close(pull.sum(-1), torch.ones(12, dtype=torch.float64), rtol=1e-9, atol=0)
    assert bool((found <= whole + 1e-3).all())
    if top == 256:
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


def test_the_divergence_from_oneself_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    head, packed, log_p = packed_and_exact(monkeypatch, 20)
    with torch.no_grad():
        found, pull = StoredLogits(packed).divergence(head, torch.arange(12), log_p.clone())
    assert float(found.abs().max()) < 1e-5
    torch.testing.assert_close(pull, log_p.exp(), rtol=0, atol=1e-3)


def test_places_choose_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    head, packed, log_p = packed_and_exact(monkeypatch, 20)
    at_n = torch.tensor([7, 2])
    whole = StoredLogits(packed).divergence(head, torch.arange(12), log_p.roll(1, 0))
    some = StoredLogits(packed).divergence(head, at_n, log_p.roll(1, 0)[at_n])
    for one, other in zip(whole, some, strict=True):
        assert torch.equal(one[at_n], other)

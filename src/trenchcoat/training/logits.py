"""Losses of the logits, with their gradients in closed form: next-token cross-entropy and KL(teacher || student).

Logits come in pieces of tokens (:mod:`trenchcoat.runtime.head`). For the log-softmax s of the student's logits, the
gradient of -s[y] is exp(s) - onehot(y), and that of KL(p || exp(s)) = sum p (log p - s) is exp(s) - p.

Shapes: b rows, T tokens, n tokens of a piece, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trenchcoat.runtime.head import VocabularyHead, run_to_head


class Taught(Protocol):
    """What a teacher says about the tokens of one micro-batch."""

    def divergence(self, head: VocabularyHead, at_n: Tensor, student_nV: Tensor) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) [n] and what its gradient subtracts from the student's probabilities [n, V].

        ``head`` is the student's, ``at_n`` are places in the flattened [b, T], ``student_nV`` are log-probabilities.
        """


Teacher = Callable[[nn.Module, Mapping[str, Tensor]], Taught]
"""What the student is compared with: called with the model and a micro-batch."""


def forward_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model's inputs for a micro-batch: no mask where there is no padding, no cache."""
    mask = batch.get("attention_mask")
    padded = mask is not None and not bool(mask.all())
    return {"input_ids": batch["input_ids"], "attention_mask": mask if padded else None, "use_cache": False}


def in_pieces(inputs: Mapping[str, Any], length: int, cache: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(first column, inputs) of pieces of ``length`` columns; ``cache`` carries what came before."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for start in range(0, ids.shape[1], length):
        stop = start + length
        seen = None if mask is None else mask[:, :stop]
        yield (
            start,
            {
                "input_ids": ids[:, start:stop],
                "attention_mask": seen,
                "past_key_values": cache,
                "use_cache": True,
            },
        )


def own_teacher(as_teacher: Callable[[nn.Module], AbstractContextManager[None]]) -> Teacher:
    """The model itself: one more forward pass, without gradients, inside ``as_teacher(model)``."""

    def teacher(model: nn.Module, batch: Mapping[str, Tensor]) -> Taught:
        """Run the pass; only its hidden states are kept."""
        hub: Any = model
        with torch.no_grad(), as_teacher(model):
            hidden_bTd, _ = run_to_head(model, **forward_inputs(batch))
            learned = any(p.requires_grad for p in hub.get_output_embeddings().parameters())
            return _Hidden(hidden_bTd.flatten(0, 1), VocabularyHead(model, frozen=True) if learned else None)

    return teacher


@dataclass(frozen=True)
class _Hidden:
    """Hidden states of the teacher [b T, d], and its head unless it is the student's."""

    states: Tensor
    head: VocabularyHead | None

    def divergence(self, head: VocabularyHead, at_n: Tensor, student_nV: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Taught`; the gradient subtracts the teacher's probabilities."""
        log_p_nV = log_probabilities((self.head or head)(self.states[at_n]))
        p_nV = log_p_nV.exp()
        return torch.linalg.vecdot(p_nV, log_p_nV.sub_(student_nV)), p_nV


@dataclass
class LogitLoss:
    """The loss of one micro-batch: its weights, and its sums so far."""

    kl_weight: float
    taught: Taught | None
    targets_n: Tensor
    """The label that each token of the flattened batch [b T] predicts; -100 for none."""
    real_n: Tensor | None
    """Whether a token is no padding, bool [b T]; None when all are real."""
    sums: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], kl_weight: float, taught: Taught | None) -> LogitLoss:
        """The loss of ``batch``; ``taught`` may be None where ``kl_weight`` is 0."""
        mask, targets_n = batch.get("attention_mask"), next_tokens(batch["labels"]).flatten()
        real_n = None if mask is None or bool(mask.all()) else mask.flatten() != 0
        return cls(kl_weight, taught, targets_n, real_n)

    def __post_init__(self) -> None:
        counted = self.targets_n != -100
        self.labels = int(counted.sum())
        self.tokens = len(counted) if self.real_n is None else int(self.real_n.sum())
        if self.kl_weight == 0:
            self._wanted = counted
        elif self.real_n is None:
            self._wanted = torch.ones_like(counted)
        else:
            self._wanted = self.real_n if self.kl_weight == 1 else self.real_n | counted

    def over(self, head: VocabularyHead, hidden_bTd: Tensor, first: int = 0) -> Tensor:
        """Sum the losses of the student's hidden states; returns their gradient [b, T, d], or zeros without gradients.

        The loss is a mean over the tokens of the batch. Call it once for each column: with all of them, or with spans
        of them that begin at column ``first``.
        """
        rows, columns = hidden_bTd.shape[:2]
        place_n = torch.arange(len(self._wanted), device=hidden_bTd.device).view(rows, -1)[:, first : first + columns]
        place_n = place_n.flatten()
        inside_n = self._wanted[place_n].nonzero()[:, 0]
        at_n = place_n[inside_n]
        flat_nd = hidden_bTd.detach().flatten(0, 1)
        found_nd = torch.zeros_like(flat_nd)
        found_nd[inside_n] = head.backward(
            flat_nd[inside_n], lambda where, logits_nV: self._piece(head, at_n[where], logits_nV)
        )
        return found_nd.view_as(hidden_bTd)

    def _piece(self, head: VocabularyHead, at_n: Tensor, logits_nV: Tensor) -> Tensor:
        """Add the losses of the tokens ``at_n``; returns the gradient for their logits."""
        student_nV, targets_n = log_probabilities(logits_nV), self.targets_n[at_n]
        kl_n, ce_n = (torch.zeros(len(at_n), dtype=student_nV.dtype, device=at_n.device) for _ in range(2))
        weight_kl_n, weight_ce_n, gradient_nV = kl_n, ce_n, None
        if self.kl_weight < 1:
            counted_n = (targets_n != -100).to(student_nV.dtype)
            ce_n = -student_nV.gather(1, targets_n.clamp_min(0)[:, None])[:, 0] * counted_n
            weight_ce_n = counted_n * ((1.0 - self.kl_weight) / max(self.labels, 1))
        if self.taught is not None:
            real_n = torch.ones_like(kl_n) if self.real_n is None else self.real_n[at_n].to(kl_n.dtype)
            kl_n, gradient_nV = self.taught.divergence(head, at_n, student_nV)
            kl_n, weight_kl_n = kl_n * real_n, real_n * (self.kl_weight / max(self.tokens, 1))
            gradient_nV = gradient_nV.mul_(-weight_kl_n[:, None])
        for name, losses_n in (("kl", kl_n), ("ce", ce_n)):
            self.sums[name] = self.sums.get(name, torch.zeros((), device=at_n.device)) + losses_n.sum()
        student_nV.exp_().mul_((weight_kl_n + weight_ce_n)[:, None])
        found_nV = student_nV if gradient_nV is None else gradient_nV.add_(student_nV)
        if self.kl_weight < 1:
            found_nV.scatter_add_(1, targets_n.clamp_min(0)[:, None], -weight_ce_n[:, None])
        return found_nV.to(logits_nV.dtype)

    def metrics(self) -> dict[str, float]:
        """``loss`` and ``tokens``, and the parts ``kl`` and ``ce`` where both have a weight."""
        zero = torch.zeros(())
        kl = float(self.sums.get("kl", zero)) / max(self.tokens, 1)
        ce = float(self.sums.get("ce", zero)) / max(self.labels, 1)
        if self.kl_weight == 0:
            return {"loss": ce, "tokens": float(self.labels)}
        if self.kl_weight == 1:
            return {"loss": kl, "tokens": float(self.tokens)}
        mixed = self.kl_weight * kl + (1.0 - self.kl_weight) * ce
        return {"loss": mixed, "kl": kl, "ce": ce, "tokens": float(self.tokens)}


def log_probabilities(logits_nV: Tensor) -> Tensor:
    """Log-softmax over the vocabulary, in float32 (float64 logits stay so); new memory [n, V]."""
    return F.log_softmax(logits_nV, -1, dtype=torch.promote_types(logits_nV.dtype, torch.float32))


def next_tokens(labels_bT: Tensor) -> Tensor:
    """The label that each token predicts: the next one's, and -100 at the end of a row [b, T]."""
    return F.pad(labels_bT[:, 1:], (0, 1), value=-100)

"""Scores of the teacher and the linearized model, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trenchcoat.conversion.blocks.model import local_names
from trenchcoat.conversion.blocks.run import BlockRun
from trenchcoat.evaluation.results import Scores
from trenchcoat.evaluation.scoring import EvalRows, score
from trenchcoat.models.attach import set_mode
from trenchcoat.models.hub import load_adapter_state
from trenchcoat.runtime import distributed
from trenchcoat.training.objectives import forward_decoder


def score_blocks(
    run: BlockRun, weights: Mapping[str, Tensor], text: EvalRows, *, batch_size: int
) -> tuple[Scores, Scores]:
    """(teacher, students) scores on N rows of text; ``weights`` are the parameters of all students.

    Both models go through the blocks together, so weights are read once; 2 N T d numbers are held in memory.
    """
    window = run.recipe.student.window
    teacher = forward_decoder(run.source.embedding(), {"input_ids": text.ids})
    student = teacher.clone()
    parts = [slice(first, first + batch_size) for first in range(0, len(text.ids), batch_size)]
    for block in run.blocks:
        following = block.number + 1 if block.number + 1 < len(run.blocks) else None
        model = run.load(block.number, following)
        _through(model, teacher, parts, run.source.device)
        if run.learns(block.number):
            run.attach(model, block)
            load_adapter_state(model, local_names(weights, block.first, block.stop))
            set_mode(model, "student")
        _through(model, student, parts, run.source.device)
        del model  # before the next one is built
    head = run.source.head()
    found = [score(_Head(head, states, batch_size), text, window=window, batch_size=batch_size)
             for states in (teacher, student)]  # fmt: skip
    return found[0], found[1]


def _through(model: nn.Module, states_NTd: Tensor, parts: list[slice], device: torch.device) -> None:
    """Replace every row in place by the output of ``model``'s layers."""
    for part in parts:
        states_NTd[part] = forward_decoder(model, {"inputs_embeds": states_NTd[part].to(device)}).to("cpu")


class _Head(nn.Module):
    """The vocabulary head with the interface of a causal LM, for :func:`trenchcoat.evaluation.scoring.score`; it
    ignores the token values and uses the given states in order."""

    def __init__(self, head: Any, states_NTd: Tensor, batch_size: int) -> None:
        super().__init__()
        self.head, self.states = head, states_NTd
        self._places: Iterator[int | None] = iter(distributed.share(range(0, len(states_NTd), batch_size)))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits [b, T, V] of the next rows."""
        first = next(self._places) or 0
        states = self.states[first : first + len(input_ids)].to(input_ids.device)
        return SimpleNamespace(logits=self.head(inputs_embeds=states, use_cache=use_cache).logits)

"""From hidden states to logits, a piece of tokens at a time: the logits of all tokens never exist together.

A family may change the logits after its vocabulary head (gemma2 caps them, cohere and granite scale them), and a new
one may do something else. So no formula is repeated here: the model's own ``forward`` runs, with given hidden states in
place of its layers.

Shapes: b rows, T tokens, n tokens of a piece (or of a batch, flattened), d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trenchcoat.runtime.sharding import is_sharded, run_decoder, whole

PIECE_ELEMENTS = 1 << 25
"""Logits of one piece: 262 tokens of a vocabulary of 128,000. The pieces of a loss hold about six arrays of this size
in float32 (0.75 GiB)."""


class VocabularyHead:
    """The logits of ``model`` for given hidden states.

    The head of a sharded model is gathered when this is made (a collective), and released with it. With ``frozen`` the
    weights of this moment are used, without gradients, also if the model's are replaced later.
    """

    def __init__(self, model: Any, *, frozen: bool = False) -> None:
        self._model = model
        head = model.get_output_embeddings()
        self.vocabulary = int(head.weight.shape[0])
        paths = {id(module): path for path, module in model.named_modules()}
        self._layers, self._head = paths[id(model.get_decoder())], paths[id(head)]
        self._weights: nn.Module | None = None
        if frozen or is_sharded(model):
            bias = getattr(head, "bias", None)
            self._weights = _Linear(*(None if t is None else whole(t.detach()) for t in (head.weight, bias)))

    def __call__(self, hidden_nd: Tensor) -> Tensor:
        """Logits [n, V] for hidden states after the final norm [n, d]."""
        others = {self._layers: _Given(hidden_nd[None])} | (
            {} if self._weights is None else {self._head: self._weights}
        )
        with _in_place(self._model, others):
            logits_1nV: Tensor = self._model.forward(inputs_embeds=hidden_nd[None], use_cache=False).logits
        return logits_1nV[0]

    def pieces(self, tokens: int) -> Iterator[slice]:
        """Slices that divide ``tokens`` tokens into pieces."""
        length = max(1, PIECE_ELEMENTS // self.vocabulary)
        return (slice(start, min(start + length, tokens)) for start in range(0, tokens, length))

    def backward(self, hidden_nd: Tensor, gradient: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """Visit the logits piece by piece; returns the gradient for ``hidden_nd`` [n, d].

        ``gradient(where, logits_nV)`` gets the place and the logits of a piece and returns the loss's gradient for
        them. Gradients of a trained head are added to its ``.grad``. Without gradients enabled, zeros are returned.
        """
        found_nd, learning = torch.zeros_like(hidden_nd), torch.is_grad_enabled()
        for where in self.pieces(len(hidden_nd)):
            part = hidden_nd[where].detach().requires_grad_(learning)
            logits_nV = self(part)
            with torch.no_grad():
                wanted_nV = gradient(where, logits_nV.detach())
            if learning:
                logits_nV.backward(wanted_nV)
                assert part.grad is not None
                found_nd[where] = part.grad
        return found_nd


class _Given(nn.Module):
    """Stands for the layers: returns the hidden states that it was made with."""

    def __init__(self, hidden_bTd: Tensor) -> None:
        super().__init__()
        self.hidden_bTd = hidden_bTd

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        """The hidden states, whatever the arguments."""
        return _Output(self.hidden_bTd)


class _Output:
    """What layers return: hidden states [b, T, d] as the first item and by name; every other field is None."""

    def __init__(self, hidden_bTd: Tensor) -> None:
        self.last_hidden_state = hidden_bTd

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _Linear(nn.Module):
    """Stands for the head: its weights as plain tensors."""

    def __init__(self, weight_Vd: Tensor | None, bias_V: Tensor | None) -> None:
        super().__init__()
        assert weight_Vd is not None
        self.tensors = (weight_Vd, bias_V)

    def forward(self, hidden_bTd: Tensor) -> Tensor:
        """The raw logits [b, T, V]."""
        weight_Vd, bias_V = (None if t is None else t.to(hidden_bTd.device) for t in self.tensors)
        assert weight_Vd is not None
        return F.linear(hidden_bTd, weight_Vd, bias_V)


@contextmanager
def _in_place(model: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block the ``others`` take the places of submodules, by their paths; hooks of those do not run."""
    places = [(model.get_submodule(path.rpartition(".")[0])._modules, path.rpartition(".")[2]) for path in others]
    own = [siblings[name] for siblings, name in places]
    try:
        for (siblings, name), other in zip(places, others.values(), strict=True):
            siblings[name] = other
        yield
    finally:
        for (siblings, name), module in zip(places, own, strict=True):
            siblings[name] = module


def run_to_head(model: nn.Module, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Forward pass of the layers: the hidden states after the final norm [b, T, d], and further outputs.

    A backward pass that starts at the hidden states must also start at the further outputs, with zeros: FSDP gathers
    what its root holds when the gradients of the root's outputs arrive.
    """
    if not is_sharded(model):
        return run_decoder(model, **inputs), []
    hub: Any = model
    found: list[Tensor] = []
    handle = hub.get_decoder().register_forward_hook(lambda module, args, output: found.append(output[0]))
    try:
        further = run_decoder(model, **inputs)
    finally:
        handle.remove()
    return found[0], [further]

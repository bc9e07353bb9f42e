"""The size of a generation cache at any length, from caches of a few short ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from trenchcoat.evaluation.results import CacheSize
from trenchcoat.models.cache import StateLayer, cache_nbytes
from trenchcoat.models.transformers_internals import window_of
from trenchcoat.runtime.sharding import compute_device

LENGTHS = (32, 64, 128)


def cache_size(model: nn.Module) -> CacheSize | None:
    """The cache of ``model`` for one sequence, as bytes + bytes a token + layers that stop growing at their window.

    The model reads ``LENGTHS`` tokens; what a layer grows by must be the same between them, else the size at other
    lengths is unknown and the answer is None. A layer with a window of its own (as in Mistral) grows up to it.
    """
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    ids = torch.arange(max(LENGTHS))[None].to(compute_device(model)) % vocabulary
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            caches = [model(input_ids=ids[:, :length], use_cache=True).past_key_values for length in LENGTHS]
    finally:
        model.train(was_training)
    constant, per_token, limited = 0, 0, []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        bounded = _bounded(layers[0])
        if bounded is not None:
            start, rate, most = bounded
            constant += start
            limited.append((rate, most))
            continue
        held = [cache_nbytes(cast("Any", SimpleNamespace(layers=[layer]))) for layer in layers]
        rate = (held[-1] - held[0]) // (LENGTHS[-1] - LENGTHS[0])
        start = held[0] - rate * LENGTHS[0]
        if [start + rate * length for length in LENGTHS] != held:
            return None
        constant, per_token = constant + start, per_token + rate
    return CacheSize(constant, per_token, limited)


def _bounded(layer: Any) -> tuple[int, int, int] | None:
    """(constant bytes, bytes a token, tokens held at most) of a layer whose keys have a window of their own."""
    if not isinstance(layer, StateLayer):
        window = window_of(layer)
        size = cache_nbytes(cast("Any", SimpleNamespace(layers=[layer])))
        return None if window is None else (0, size // min(LENGTHS[0], window), window)
    if layer.kept is None or layer.kept.window is None:
        return None
    kept = layer.kept.nbytes()
    return layer.nbytes() - kept, kept // len(layer.kept), layer.kept.window

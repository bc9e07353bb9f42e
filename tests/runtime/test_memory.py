"""The memory meter counts each live new storage once, and nothing that existed before."""

from __future__ import annotations

import torch

from trenchcoat.runtime.memory import live_tensor_memory

KIB = 1024


def test_live_and_peak_bytes() -> None:
    before = torch.zeros(256)
    with live_tensor_memory() as memory:
        before.add_(1)
        kept = torch.zeros(256)
        view = kept.view(16, 16)
        assert memory.live == KIB
        (view + 1).sum()
        assert memory.live == KIB
    assert 2 * KIB <= memory.peak <= 2 * KIB + 64


def test_what_autograd_keeps_is_counted() -> None:
    weight = torch.ones(256, requires_grad=True)
    with live_tensor_memory() as memory:
        out = weight.exp().exp().exp()
        assert memory.live == 3 * KIB
        out.sum().backward()
        del out
        assert memory.live == KIB
        assert weight.grad is not None

"""The kernels' benchmark: its arithmetic, its refusal without a GPU, and (with one) a quick run."""

from __future__ import annotations

import pytest
import torch

from trenchcoat import bench
from trenchcoat.bench import kernels
from trenchcoat.config import UserError


def test_operations_are_those_of_the_formula() -> None:
    """Per token and head at D = F = 128, W = 64: 82k multiply-adds forward, 229k backward, 66k for transfer."""
    sizes = kernels.Sizes()
    work = {name: ops / 2 / sizes.heads for name, (ops, _) in kernels.work_of(sizes, 1).items()}
    assert round(work["forward"] / 1e3) == 82
    assert round((work["training"] - work["forward"]) / 1e3) == 229
    assert round((work["transfer"] - work["forward"]) / 1e3) == 66


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_gpu_it_says_so(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="on a GPU"):
        bench.run("kernels", device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_quick_run() -> None:
    result = kernels.measure(quick=True)
    assert "roofline" in kernels.table(result)

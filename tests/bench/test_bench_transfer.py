"""The transfer benchmark runs, compares the same losses, and reports its figures."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from trenchcoat.bench import transfer
from trenchcoat.bench.ops import implementations
from trenchcoat.bench.registry import run_benchmark


def test_naive_implementation_computes_the_same_gradients() -> None:
    bench = transfer.small_step(2, 300)
    bench.gradients()
    ours = [parameter.grad.clone() for parameter in bench.parameters]
    bench.model.zero_grad()
    bench.naive_gradients()
    for mine, parameter in zip(ours, bench.parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6 * float(mine.abs().max()) + 1e-7)


def test_naive_implementation_keeps_its_maps_and_restores_the_model() -> None:
    shallow, deep = transfer.small_step(1, 256), transfer.small_step(3, 256)
    map_bytes = 8 * 256 * 256 * 4
    assert deep.peak(deep.naive_gradients) - shallow.peak(shallow.naive_gradients) > 2 * 2 * map_bytes
    assert deep.peak(deep.gradients) < 1.1 * shallow.peak(shallow.gradients)


def test_a_quick_run_writes_json_and_a_table(tmp_path: Path) -> None:
    text = run_benchmark("transfer", quick=True, out=str(tmp_path / "transfer.json"))
    result = json.loads((tmp_path / "transfer.json").read_text())
    growth, *by_length = result["targets"]
    assert growth["measured"] < 1.1
    assert [row["why"] for row in by_length] == ["not measured", "not measured"]
    row = result["seconds_by_tokens"]["128"]
    ratio = row["step"]["wall"] / row["teacher"]["wall"]
    assert f"{ratio:.4g}" in text
    assert row["step"]["processor"] > 0
    assert result["environment"]["implementation"] == implementations("cpu")[0]
    assert f"{growth['measured']:.4g}" in text
    assert "the naive implementation" in text

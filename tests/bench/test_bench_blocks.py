"""The benchmarks of block-wise transfer and clipping run and report their figures."""

from __future__ import annotations

import json
from pathlib import Path

from trenchcoat.bench.clip import draw_errors
from trenchcoat.bench.registry import run_benchmark


def test_quick_run_of_blocks(tmp_path: Path) -> None:
    text = run_benchmark("blocks", quick=True, threads=1, out=str(tmp_path / "blocks.json"))
    result = json.loads((tmp_path / "blocks.json").read_text())
    assert set(result["runs"]) == {"joint", "blocks of 1", "blocks of 2"}
    joint, *others = result["runs"].values()
    for run in others:
        assert run["throughput_ratio"] == joint["seconds"] / run["seconds"]
        assert run["memory_over_bound"] == run["held"] / run["bound_bytes"]
        assert run["held"] > run["held_before"] > 0
        assert f"{run['throughput_ratio']:.4g}" in text


def test_quick_run_of_clip(tmp_path: Path) -> None:
    text = run_benchmark("clip", quick=True, out=str(tmp_path / "clip.json"))
    result = json.loads((tmp_path / "clip.json").read_text())
    layer, together = (result["relative_error"][scope] for scope in ("layer", "global"))
    assert len(layer) == len(together) == len(result["scales"])
    assert result["perplexity"]["teacher"] < result["perplexity"]["layer"]
    assert f"{result['perplexity']['global']:.4g}" in text
    draw_errors(result, tmp_path / "clip.png")
    assert (tmp_path / "clip.png").read_bytes().startswith(b"\x89PNG")

"""The decoding benchmark runs, and its table shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trenchcoat.bench.registry import load_benchmark, run_benchmark
from trenchcoat.config import UsageError


def test_quick_measurement_is_written_and_printed(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    text = run_benchmark("decode", quick=True, out=str(out))
    result = json.loads(out.read_text(encoding="utf-8"))
    assert all(row["measured"] > 0 and row["why"] == "a quick run" for row in result["targets"])
    assert len(result["targets"]) == 5
    curves = result["milliseconds_by_context"]
    assert curves["32"]["student"]["bytes"] == curves["128"]["student"]["bytes"]
    assert curves["32"]["dynamic"]["bytes"] < curves["128"]["dynamic"]["bytes"]
    assert curves["32"]["per_kv_head"]["bytes"] < curves["32"]["student"]["bytes"]
    for length in ("32", "128"):
        kept, constant = curves[length]["kept groups"]["bytes"], curves[length]["student"]["bytes"]
        assert constant * 6 / 8 < kept < constant + curves[length]["dynamic"]["bytes"]
    assert curves["32"]["kept groups"]["bytes"] < curves["128"]["kept groups"]["bytes"]
    assert "128, kept layers" in text
    drift = result["drift"]
    assert drift["float32"]["128"]["state_error"] < drift["bfloat16"]["128"]["state_error"] < 0.1
    short, long = result["prompts"]["by_tokens"].values()
    assert short["state_bytes"] == long["state_bytes"]
    assert long["peak_bytes"] < 1.05 * short["peak_bytes"]
    assert "same memory" in text
    assert "<= 1 " in text
    assert {row["met"] for row in load_benchmark("decode").judged(result)} <= {True, False}


def test_some_parts_alone() -> None:
    benchmark = load_benchmark("decode")
    text = run_benchmark("decode", quick=True, only=["prompts"])
    assert "prompt, in chunks" in text
    assert "context" not in text.replace("longest context", "")
    assert {row["why"] for row in benchmark.judged({"model": {}})} == {"not measured"}
    with pytest.raises(UsageError, match="names 'speed'; its parts are contexts, batch, drift, prompts"):
        run_benchmark("decode", quick=True, only=["speed"])

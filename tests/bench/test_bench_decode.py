"""The decoding benchmark runs, and its table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from trenchcoat.bench import decode, run


def test_quick_measurement_is_written_and_printed(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    text = run("decode", quick=True, out=str(out))
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(decode.TARGETS) <= set(result)
    curves = result["milliseconds_by_context"]
    assert curves["32"]["student"]["bytes"] == curves["128"]["student"]["bytes"]
    assert curves["32"]["dynamic"]["bytes"] < curves["128"]["dynamic"]["bytes"]
    assert result["per_kv_head"]["32"]["student"]["bytes"] < curves["32"]["student"]["bytes"]
    drift = result["drift"]
    assert drift["float32"]["128"]["state_error"] < drift["bfloat16"]["128"]["state_error"] < 0.1
    short, long = result["prompts"]["by_tokens"].values()
    assert short["state_bytes"] == long["state_bytes"]
    assert long["peak_bytes"] < 1.05 * short["peak_bytes"]
    assert "same memory" in text
    assert "target <= 1.3" in decode.table({**result, "targets": decode.TARGETS})

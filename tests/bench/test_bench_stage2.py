"""The benchmark of stage 2 runs, and its figures are those of its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trenchcoat.bench.registry import run_benchmark
from trenchcoat.bench.stage2 import KEPT, SMOLLM2, Stage2Sizes
from trenchcoat.config.keep import kept_total
from trenchcoat.models.shapes import find_config


def test_a_quick_run_writes_json_and_a_table(tmp_path: Path) -> None:
    text = run_benchmark("stage2", quick=True, out=str(tmp_path / "stage2.json"))
    found = json.loads((tmp_path / "stage2.json").read_text())
    step, gates = (row["measured"] for row in found["targets"])
    assert step == pytest.approx(found["steps"]["kl"]["wall"] / found["steps"]["plain"]["wall"])
    assert gates == pytest.approx(found["selection"]["gates"]["wall"] / found["selection"]["plain"]["wall"])
    assert f"{step:.4g}" in text
    assert f"{gates:.4g}" in text


def test_the_full_sizes_are_those_of_the_reference() -> None:
    config, sizes = find_config("HuggingFaceTB/SmolLM2-135M-Instruct"), Stage2Sizes()
    shape = (config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers)
    assert shape == (SMOLLM2.hidden, SMOLLM2.inner, SMOLLM2.vocab, sizes.layers)
    assert (config.num_attention_heads, config.num_key_value_heads) == (SMOLLM2.heads, SMOLLM2.kv_heads)
    assert kept_total(SMOLLM2.student(keep=KEPT), sizes.layers, SMOLLM2.kv_heads) == 12

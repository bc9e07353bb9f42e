"""The check of the machine before a demo, and the time estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from trenchcoat.config import TransferConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.config.units import in_words
from trenchcoat.conversion.comparison import estimate_seconds, stage_tokens, stages_of
from trenchcoat.conversion.variants import open_variants
from trenchcoat.evaluation.rows import asked_rows
from trenchcoat.runtime import machine


def test_a_suitable_machine_is_described(tmp_path: Path) -> None:
    sentences = " ".join(machine.check_machine(tmp_path / "not" / "there", memory_gib=0.01, disk_gib=0.001))
    for word in ("Python", "torch", "cores", "memory", "disk", "GPUs"):
        assert word in sentences


@pytest.mark.parametrize(
    ("required", "said"),
    [
        ("torch>=99", "torch>=99 is required, "),
        ("no-such-library>=1", "no-such-library>=1 is required, none is installed"),
    ],
)
def test_an_unmet_requirement_is_named(
    required: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.metadata, "requires", lambda name: [required, 'ruff>=99; extra == "dev"'])
    with pytest.raises(UserError) as caught:
        machine.check_machine(tmp_path)
    assert said in str(caught.value)
    assert "ruff" not in str(caught.value)


def test_too_little_memory_and_disk_are_named_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: machine.GIB // 4)
    monkeypatch.setattr(machine, "free_disk", lambda directory: machine.GIB // 8)
    with pytest.raises(UserError, match=r"0\.2 GiB of memory.*0\.12 GiB of disk"):
        machine.check_machine(tmp_path)


def test_the_estimate_grows_with_the_work_and_ends_at_zero(tiny_overrides: list[str]) -> None:
    recipe = load_recipe("demo", tiny_overrides)
    longer = load_recipe("demo", [*tiny_overrides, "transfer.max_steps=400", "lora.max_steps=400"])
    with open_variants(recipe, []) as variants:
        short = estimate_seconds(variants, stages_of(recipe), len(asked_rows(recipe)))
        assert 0 < short < 60
        variants.recipe = longer
        assert estimate_seconds(variants, stages_of(recipe), len(asked_rows(recipe))) > 3 * short
        assert estimate_seconds(variants, [], len(asked_rows(recipe))) == 0
        batches = variants.batches(2)
        cfg = TransferConfig(max_steps=10, accumulation=2, batch_size=2, eval_every=5, eval_batches=1)
        assert stage_tokens(cfg, batches, 48) == (10 * 2 * 2 * 48, 3 * 2 * 48)


def test_durations_as_text() -> None:
    assert [in_words(s) for s in (1, 42, 240, 9000)] == ["5 s", "40 s", "4 min", "2.5 h"]

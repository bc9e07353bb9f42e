"""A new model family: one line, in ``KNOWN_FAMILIES`` if it is supported, in ``REASONS`` if it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tiny_families import BASE, logits, tokens
from trenchcoat.config import StudentConfig
from trenchcoat.models import auto, families, hub
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.families import REASONS, UnsupportedFamilyError


class TailorConfig(LlamaConfig):
    """Config of a new family in Transformers."""

    model_type = "tailor"


class TailorForCausalLM(LlamaForCausalLM):
    """Its model."""

    config_class = TailorConfig


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tiny model of a family that Transformers knows and this package does not."""
    AutoConfig.register("tailor", TailorConfig)
    AutoModelForCausalLM.register(TailorConfig, TailorForCausalLM)
    torch.manual_seed(0)
    yield TailorForCausalLM(TailorConfig(**BASE)).eval()
    mappings: list[Any] = [
        vars(auto.importlib.import_module(auto.AUTO_MODULE))["CONFIG_MAPPING"]._extra_content,
        AutoModelForCausalLM._model_mapping._extra_content,
    ]
    for mapping in mappings:
        for key in [key for key in mapping if "tailor" in str(getattr(key, "model_type", key))]:
            del mapping[key]


def test_a_family_that_works_is_named_and_its_merged_models_load(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "KNOWN_FAMILIES", (*families.KNOWN_FAMILIES, "tailor"))
    auto.register_families()
    attach_students(model, StudentConfig(window=4))
    set_mode(model, "student")
    hub.save_merged(model, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded).__name__ == "LinearizedTailorForCausalLM"
    ids = tokens(1, 12)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    with pytest.raises(UnsupportedFamilyError, match=r"Families known to work: .*, tailor$"):
        attach_students(torch.nn.Linear(1, 1), StudentConfig())


def test_a_family_that_cannot_work_is_refused_with_its_reason(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REASONS, "tailor", "its attention is sewn")
    with pytest.raises(UnsupportedFamilyError, match=r"family 'tailor' \(TailorForCausalLM\): its attention is sewn"):
        attach_students(model, StudentConfig(window=4))

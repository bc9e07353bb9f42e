"""Sizes read from configs: the shipped ones give the published parameter counts, other families count right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_families import tiny_model
from trenchcoat.config import LoraConfig, UserError
from trenchcoat.config.recipe_io import builtin_recipes, load_recipe
from trenchcoat.models.lora import add_lora
from trenchcoat.models.shapes import SHIPPED, SHIPPED_FOLDER, find_config, shapes_of


@pytest.mark.parametrize(
    ("path", "parameters", "layers", "heads"),
    [
        ("meta-llama/Llama-3.1-8B", 8_030_261_248, 32, 32),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496, 80, 64),
        ("meta-llama/Meta-Llama-3.1-405B", 405_853_388_800, 126, 128),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096, 32, 32),
    ],
)
def test_shipped_configs_have_the_published_sizes(path: str, parameters: int, layers: int, heads: int) -> None:
    shapes = shapes_of(find_config(path))
    assert shapes.parameters == parameters
    assert (shapes.layers, shapes.heads, shapes.kv_heads, shapes.head_dim) == (layers, heads, 8, 128)


def test_every_shipped_config_is_named_and_every_name_leads_to_one() -> None:
    assert {path.stem for path in SHIPPED_FOLDER.glob("*.json")} == set(SHIPPED.values())


def test_the_rotary_settings_of_llama_3_1() -> None:
    rope = find_config("meta-llama/Llama-3.1-405B").rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 500000.0)
    assert (rope["low_freq_factor"], rope["high_freq_factor"]) == (1.0, 4.0)
    assert rope["original_max_position_embeddings"] == 8192


def test_every_recipe_can_be_planned_without_a_network() -> None:
    for name in builtin_recipes():
        assert shapes_of(find_config(load_recipe(name).model.path)).parameters > 1_000_000


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma2", "mixtral"])
def test_families_count_like_the_real_model(family: str) -> None:
    model = tiny_model(family)
    shapes = shapes_of(model.config)
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    targets = ("q_proj", "v_proj", "o_proj")
    cfg = LoraConfig(rank=3, targets=targets)
    add_lora(model, cfg)
    assert shapes.lora_parameters(cfg) == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_a_token_uses_only_the_active_experts() -> None:
    shapes = shapes_of(tiny_model("mixtral").config)
    assert shapes.used_parameters < 0.9 * shapes.layer_parameters


def test_what_cannot_be_found_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        find_config(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        find_config("./nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"neither in the local cache nor among the shipped ones \(llama3_1_405b, "):
        find_config("nobody/no-such-model")
    config = json.loads((SHIPPED_FOLDER / "llama3_1_8b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert shapes_of(find_config(str(tmp_path))).layers == 3
    with pytest.raises(UserError, match=r"lora\.targets names 'none_proj'"):
        shapes_of(find_config(str(tmp_path))).lora_parameters(LoraConfig(targets=("none_proj",)))

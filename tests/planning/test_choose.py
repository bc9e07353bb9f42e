"""Settings for a model that has no recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import save_tiny_model
from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import load_recipe, names_model
from trenchcoat.planning import choose
from trenchcoat.planning.choose import instructed, recipe_for, run_folder


def test_names_of_models_and_of_recipes(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    recipes = ("demo", "demo.yaml", "recipes/mine.yaml", "llama3_1_8b", str(tmp_path), "runs/a", "./a/b", "nothing")
    assert not any(map(names_model, recipes))
    assert all(map(names_model, (str(tiny_model_dir), "org/Model-1.5B-Instruct", "model.Q4_0.gguf")))


def test_settings_fit_the_model(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=0, max_position_embeddings=300)
    found = recipe_for(str(model), ["transfer.lr=0.5"])
    recipe = found.recipe
    assert recipe.model.path == str(model)
    assert (recipe.data.seq_len, recipe.eval.seq_len, recipe.select.seq_len) == (300, 300, 300)
    assert recipe.student.window == 75
    assert recipe.transfer is not None
    assert recipe.transfer.lr == 0.5
    assert recipe.data.path == choose.BASE_DATA
    assert "2 layers with 2 key/value groups" in found.reasons[0]
    assert any(choose.CPU_RECIPE in reason and "data.seq_len=300" in reason for reason in found.reasons)
    planned = recipe_for(str(model), here=False)
    assert any(choose.GPU_RECIPE in reason for reason in planned.reasons)


def test_wider_models_get_a_lower_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_recipe(choose.CPU_RECIPE).lora
    assert reference is not None
    monkeypatch.setattr(choose, "CPU_WIDTH", 64)
    for width, rate in ((64, reference.lr), (128, reference.lr / 2)):
        model = str(save_tiny_model(tmp_path / str(width), seed=0, hidden_size=width))
        found = recipe_for(model)
        assert found.recipe.lora is not None
        assert found.recipe.lora.lr == pytest.approx(rate)
        assert any(f"lora.lr={rate:.1e}" in reason for reason in found.reasons) == (width > 64)
        chosen = recipe_for(model, ["lora.lr=0.3"]).recipe.lora
        assert chosen is not None
        assert chosen.lr == 0.3
    shipped = load_recipe(choose.GPU_RECIPE).lora
    assert shipped is not None
    assert 0.5 < reference.lr * 576 / 4096 / shipped.lr < 2


def test_how_long_texts_may_be_is_said_where_the_model_reaches_further(tmp_path: Path) -> None:
    short, long = (save_tiny_model(tmp_path / str(n), seed=0, max_position_embeddings=n) for n in (300, 9000))
    sentence = "for texts of up to 2,048 tokens, the rows it is trained on"
    growing = ["student.name=terrace"]
    assert any(sentence in reason for reason in recipe_for(str(long), growing).reasons)
    for model, typed in ((short, growing), (long, [*growing, "data.seq_len=9000"]), (long, [])):
        assert not any("for texts of up to" in reason for reason in recipe_for(str(model), typed).reasons)


def test_the_text_follows_the_model_unless_it_is_named(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    own = recipe_for(str(tiny_model_dir), data=str(text_file)).recipe.data
    assert (own.path, own.format, own.streaming, own.validation_fraction) == (str(text_file), "auto", False, 0.05)
    chat = save_tiny_model(tmp_path / "chat", seed=0)
    settings = chat / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": "{{ messages }}"}))
    assert recipe_for(str(chat)).recipe.data.path == choose.INSTRUCT_DATA
    assert [instructed(name) for name in ("a/B-Instruct", "a/b-it", "a/b-chat", "a/Llama-3.1-8B", "a/Mitra")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_no_two_models_share_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
    folders = {run_folder(str(tmp_path / name / "model")) for name in ("a", "b")} | {run_folder("org/model")}
    assert len(folders) == 3
    assert run_folder("org/model") == "runs/org--model"


def test_a_model_without_memory_for_it_is_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"this machine has 0 GiB free\. Block by block"):
        recipe_for(str(tiny_model_dir))
    assert recipe_for(str(tiny_model_dir), here=False).recipe.model.path == str(tiny_model_dir)

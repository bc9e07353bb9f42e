"""Recipes: reading, overriding, checking; every mistake names the field by its path and says what was expected."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from trenchcoat.config import (
    DataConfig,
    FeatureMapConfig,
    LoraConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    TransferConfig,
    UserError,
    dump_recipe,
)
from trenchcoat.config.paths import require_writable, require_writable_folder, same_place
from trenchcoat.config.recipe_io import (
    RECIPES,
    builtin_recipes,
    field_docs,
    field_paths,
    load_recipe,
    plain_recipe,
    recipe_from_dict,
    settings_help,
)
from trenchcoat.config.settings import PATHS, Constraint


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("student: {window: 32}\ntransfer: {lr: 2e-3}\nlora: null\n")
    return path


def test_a_file_and_overrides_become_one_recipe(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["transfer.epochs=1", "student.keep_softmax=[0,3]", "lora.rank=4"])
    assert recipe.student.window == 32
    assert recipe.transfer is not None
    assert recipe.transfer.lr == 2e-3  # YAML 1.1 would read 2e-3 as a string
    assert recipe.transfer.epochs == 1.0
    assert recipe.student.keep_softmax == (0, 3)
    assert recipe.lora == LoraConfig(rank=4)
    assert load_recipe(recipe_file).lora is None
    assert load_recipe(recipe_file, ["transfer=null"]).transfer is None


def test_the_run_folder_is_named_after_the_recipe_unless_given(recipe_file: Path, tmp_path: Path) -> None:
    assert load_recipe(recipe_file).run.dir == "runs/mine"
    assert load_recipe(recipe_file, ["run.dir=elsewhere"]).run.dir == "elsewhere"
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe_file)))
    assert load_recipe(moved).run.dir == str(moved)


def test_a_dumped_recipe_loads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["transfer.min_lr=1e-07", "student.feature_map.eps=1e-30"])
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("name", ["demo", "lolcats_llama3_1_8b", "lolcats_llama3_8b", "lolcats_mistral_7b"])
def test_the_built_in_recipes_load(name: str) -> None:
    assert name in builtin_recipes()
    assert load_recipe(name).run.dir == f"runs/{name}"
    assert load_recipe(f"{name}.yaml") == load_recipe(name)


@pytest.mark.parametrize("name", ["lolcats_llama3_1_8b", "lolcats_llama3_8b", "lolcats_mistral_7b"])
def test_the_large_recipes_hold_the_papers_hyperparameters(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.student.name == "terrace"
    assert (recipe.student.window, recipe.student.feature_map.feature_dim) == (64, 64)
    assert (recipe.data.path, recipe.data.seq_len) == ("yahma/alpaca-cleaned", 1024)
    for stage, lr in ((recipe.transfer, 1e-2), (recipe.lora, 1e-4)):
        assert stage is not None
        assert (stage.lr, stage.epochs, stage.batch_size, stage.accumulation) == (lr, 2.0, 1, 8)
        assert (stage.clip, stage.schedule, stage.plateau_factor, stage.plateau_patience) == (1.0, "plateau", 0.1, 10)
    assert recipe.transfer is not None
    assert recipe.transfer.mse_weight == 1000
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (8, 16, 0)
    assert recipe.lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_the_variants_written_in_the_recipes_load() -> None:
    for name in builtin_recipes():
        variants = [
            line
            for line in (RECIPES / f"{name}.yaml").read_text().splitlines()
            if line.startswith("#   ") and "student." in line
        ]
        for line in variants:
            load_recipe(name, [word for word in line.split() if "=" in word])
        assert variants or name == "demo"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.windw=3", "unknown key student.windw: did you mean student.window?"),
        ("lr=3", "unknown key lr: did you mean transfer.lr or lora.lr?"),
        ("transfr.lr=3", "unknown key transfr: did you mean transfer?"),
        ("student.zzzz=3", "unknown key student.zzzz: expected one of student.name, student.window"),
        ("student.window=0", "student.window must be at least 1, got 0"),
        ("student.window=4096", "student.window must be at most data.seq_len (1024), got 4096"),
        ("student.sinks=1024", "student.sinks must be below data.seq_len (1024)"),
        ("student.mix_init=1.0", "student.mix_init must be above 0 and below 1, got 1.0"),
        ("student.feature_map.name=hedghog", "got 'hedghog'; did you mean hedgehog?"),
        ("student.feature_map.feature_dim=0", "student.feature_map.feature_dim must be at least 1, got 0"),
        ("student.feature_map=7", "student.feature_map must be a mapping of fields, got 7"),
        ("student.keep_softmax=[1,2.5]", "student.keep_softmax[1] must be a whole number, got 2.5"),
        ("student.keep_softmax=[-1]", "student.keep_softmax[0] must be at least 0, got -1"),
        ("student.tied=3", "student.tied must be true or false, got 3"),
        ("transfer.lr=-1", "transfer.lr must be above 0 and finite, got -1.0"),
        ("transfer.lr=nan", "transfer.lr must be"),
        ("transfer.epochs=.inf", "transfer.epochs must be above 0 and finite, got inf"),
        ("transfer.lr=fast", "transfer.lr must be a number, got 'fast'"),
        ("transfer.mse_weight=0", "transfer.mse_weight and transfer.xent_weight are both 0"),
        ("transfer.schedule=plato", "got 'plato'; did you mean plateau?"),
        ("lora.min_lr=1", "lora.min_lr must be at most lora.lr (0.0001), got 1"),
        ("lora.targets=[]", "lora.targets must be the names of one linear layer or more"),
        ("lora.dropout=1", "lora.dropout must be at least 0 and below 1, got 1.0"),
        ("data.seq_len=1.5", "data.seq_len must be a whole number, got 1.5"),
        ("data.path=''", "data.path must be text that is not empty"),
        ("run=3", "run must be a mapping of fields, got 3"),
        ("run.seed=-1", "run.seed must be at least 0, got -1"),
        ("student.window=null", "student.window must be a whole number, got None"),
        ("transfer.lr", "override 'transfer.lr' is not of the form key=value"),
        ("transfer.lr=[", "override 'transfer.lr=['"),
        ("run.seed=${nothing}", "nothing"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.min_tokens=9", "data.max_tokens=8"], "data.min_tokens must be at most data.max_tokens (8), got 9"),
        (["data.select=esl"], "data.select=esl and data.select_rows=None do not fit: set both"),
        (["data.select_rows=5"], "data.select=none and data.select_rows=5 do not fit: set both"),
        (["data.streaming=true"], "data.streaming=true needs transfer.max_steps"),
        (
            ["data.streaming=true", "transfer.max_steps=5", "lora.max_steps=null"],
            "data.streaming=true needs lora.max_steps",
        ),
        (["data.streaming=true", "data.max_rows=5"], "data.max_rows=5 needs to see all rows"),
        (["data.streaming=true", "data.validation_fraction=0.1"], "(data.validation_rows works)"),
    ],
)
def test_incompatible_data_settings(recipe_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe(recipe_file, overrides)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_data_settings_for_long_text(recipe_file: Path) -> None:
    chosen = ["data.path=some/rp.json[50000]", "data.min_tokens=1024", "data.select=esl", "data.select_rows=5000"]
    data = load_recipe(recipe_file, chosen).data
    assert (data.path, data.min_tokens, data.select, data.select_rows) == ("some/rp.json[50000]", 1024, "esl", 5000)
    stream = ["data.streaming=true", "transfer=null", "lora.max_steps=5"]
    assert load_recipe(recipe_file, stream).data.streaming


def test_words_that_yaml_reads_as_booleans(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["run.progress=off"]).run.progress == "off"


def test_linear_students_have_no_window_to_compare(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["student.name=linear", "data.seq_len=16"]).data.seq_len == 16


def _student_recipe(tmp_path: Path, **student: Any) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"student": student}))
    return path


@pytest.mark.parametrize(
    ("student", "typed", "message"),
    [
        # set for this student: by an override, in its file, to the default too
        ({}, ["student.name=linear", "student.window=8"], "student.name=linear does not use student.window=8"),
        ({}, ["student.name=linear", "student.window=64"], "does not use student.window=64"),
        ({}, ["student.mix_init=0.5", "student.name=linear"], "does not use student.mix_init=0.5"),
        ({}, ["student={name: linear, affine: true}"], "does not use student.affine=true"),
        ({"name": "linear", "window": 8, "sinks": 4}, [], "does not use student.window=8, student.sinks=4: leave"),
        ({"name": "linear"}, ["student.affine=false"], "does not use student.affine=false"),
        ({"name": "linear", "window": 8}, ["student.name=linear"], "does not use student.window=8"),
        ({"name": "window_sinks"}, ["student.feature_map.name=elu"], "does not use student.feature_map: leave"),
    ],
)
def test_a_setting_that_the_student_does_not_use_is_refused(
    student: dict[str, Any], typed: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(_student_recipe(tmp_path, **student), typed)


def test_settings_of_a_student_that_an_override_replaces_are_left_out(tmp_path: Path) -> None:
    path = _student_recipe(tmp_path, name="sliding", window=8, mix_init=0.5, feature_map={"name": "elu"})
    recipe = load_recipe(path, ["student.name=linear", "data.seq_len=32"])
    assert recipe.student == StudentConfig(name="linear", feature_map=FeatureMapConfig(name="elu"))
    kept = tmp_path / "run" / "recipe.yaml"
    kept.parent.mkdir()
    kept.write_text(dump_recipe(recipe))
    assert load_recipe(kept).student == recipe.student  # what a run's folder records is read back
    assert load_recipe(path, ["student.name=terrace"]).student.window == 8
    for name in builtin_recipes():
        assert load_recipe(name, ["student.name=linear"]).student.name == "linear"
    with pytest.raises(UserError, match=r"does not use student\.sinks=4"):
        plain_recipe(["student.name=linear", "student.sinks=4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: [1, 2]", "student must be a mapping of fields, got [1, 2]"),
        ("- a\n- b\n", "a recipe is a mapping of sections"),
        ("student: {window: 3", "is not valid YAML"),
        ("student:\n  window: 3\n  window: 4\n", "is not valid YAML"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["${oc.env:TRENCHCOAT_SECRET}", "a ${oc.env:TRENCHCOAT_SECRET} b", "${model.path}", "${"]
)
def test_nothing_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRENCHCOAT_SECRET", "hunter2")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run:\n  project: '{value}'\n")
    for arguments in ((path,), ("demo", [f"run.project={value}"]), ("demo", [f"run={{project: '{value}'}}"])):
        with pytest.raises(UserError, match="filled in") as raised:
            load_recipe(*arguments)  # type: ignore[arg-type]
        assert "hunter2" not in str(raised.value)
    path.write_text("# ${HOME} in a comment\nrun: {project: costs $5}\n")
    assert load_recipe(path).run.project == "costs $5"


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]", "[" * 3000, "run: {seed: !!int x}", "run: {? [1]: 2}", "{? {a: 1} : 2}", "a: !!binary 'é'", "\0"],
)
def test_yaml_that_the_parser_refuses(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml") as raised:
        load_recipe(path)
    assert "\n" not in str(raised.value)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'llama3_1_8b'"):
        load_recipe("llama3.1_8b")
    with pytest.raises(UserError, match="no recipe or model folder"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"folder without a recipe\.yaml"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: {dir: caf\xe9}".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_a_bad_value_in_a_file_names_the_file_and_one_of_an_override_does_not(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("transfer: {lr: null}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: transfer\.lr must be a number, got None"):
        load_recipe(file)
    assert load_recipe(file, ["transfer.lr=1e-3"]).transfer is not None
    with pytest.raises(UserError, match=r"^student\.window must be at least 1"):
        load_recipe(file, ["transfer.lr=1e-3", "student.window=0"])


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    recipe = load_recipe(tmp_path / "empty.yaml")
    assert dataclasses.replace(recipe, run=Recipe().run) == Recipe()


def test_the_defaults_are_in_range_and_every_field_has_a_help_text() -> None:
    assert recipe_from_dict(dataclasses.asdict(Recipe())) == Recipe()
    text = settings_help()
    for path, _ in field_paths(Recipe):
        assert path in text
    for cls in (Recipe, TransferConfig, LoraConfig, StageConfig):
        docs = field_docs(cls)
        assert all(docs.get(field.name) for field in dataclasses.fields(cls)), f"a field of {cls} has no docstring"


WITHOUT_A_RANGE: set[str] = set()
"""Numeric fields that may have any value."""


def test_every_number_has_a_range_or_is_deliberately_free() -> None:
    def is_number(hint: Any) -> bool:
        return hint in (int, float) or any(map(is_number, typing.get_args(hint)))

    def is_ranged(hint: Any) -> bool:
        return isinstance(hint, Constraint) or any(map(is_ranged, typing.get_args(hint)))

    numbers = {path: hint for path, hint in field_paths(Recipe) if is_number(hint)}
    assert len(numbers) > 50
    assert {path for path, hint in numbers.items() if not is_ranged(hint)} == WITHOUT_A_RANGE


def test_settings_help_shows_defaults_ranges_choices_and_only_the_requested_sections() -> None:
    text = settings_help(["transfer"])
    assert "transfer.lr=0.01  (above 0 and finite)" in text
    assert "plateau | cosine | linear | constant" in text
    assert "lora.rank" not in text


def test_a_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    named = {"path", "dir", "directory", "file", "folder"}
    looks = {path for path, _ in field_paths(Recipe) if named & set(path.rpartition(".")[2].split("_"))}
    assert looks <= set(PATHS), "a setting that is named like a path is not marked as one"
    for path in PATHS:
        section, name = path.split(".")
        recipe = load_recipe("demo", [f"{path}=~/some where/x"])
        assert getattr(getattr(recipe, section), name) == f"{tmp_path}/some where/x"
        assert "~" not in dump_recipe(recipe)
        with pytest.raises(UserError, match="no home folder ~no-such-user"):
            load_recipe("demo", [f"{path}=~no-such-user/x"])
    assert DataConfig(path="~/x.jsonl[5]").path == f"{tmp_path}/x.jsonl[5]"
    (tmp_path / "own.yaml").write_text("run: {seed: 7}")
    assert load_recipe("~/own.yaml").run.seed == 7


def test_a_recipe_that_in_a_file_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text("")
    given = ["model.path=models/llama", "data.path=rows.jsonl[5]", "data.validation_path=org/on-the-hub",
             "lora.teacher_logits=logits"]  # fmt: skip
    kept = recipe_from_dict(yaml.safe_load(dump_recipe(load_recipe("demo", given))))
    assert kept.model.path == str(tmp_path / "models" / "llama")
    assert kept.data.path == str(tmp_path / "rows.jsonl[5]")
    assert kept.data.validation_path == "org/on-the-hub"
    assert kept.lora is not None
    assert kept.lora.teacher_logits == str(tmp_path / "logits")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("m/llama", "/a/m/llama", True), ("./llama", "/a/m/llama", True), ("../m/llama", "/a/m/llama", True),
     ("m/llama", "m/llama", True), ("m/llama", "/a/n/llama", False), ("/b/m/llama", "/a/m/llama", False),
     ("llama", "m/llama", False), (None, "/a", False), ("", "/a", False), (5, 5, True)],
)  # fmt: skip
def test_a_path_recorded_as_relative_is_the_same_place(one: object, other: object, same: bool) -> None:
    assert same_place(one, other) == same_place(other, one) == same


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_writable(tmp_path / "new" / "deep" / "x.json", "--out")
    require_writable(tmp_path / "file", "--out")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    for target, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "is a file"), ("/proc/x", "can be")):
        with pytest.raises(UserError, match=f"--out: .*{message}"):
            require_writable(target, "--out")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_writable_folder(tmp_path / "new" / "deep", "run.dir")
    require_writable_folder(tmp_path, "run.dir")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    for target, message in (
        (tmp_path / "file", "is a file; give the path of a folder"),
        (tmp_path / "file" / "x", "is a file"),
        ("/proc/x", "nothing can be written in /proc"),
    ):
        with pytest.raises(UserError, match=f"run.dir: .*{message}"):
            require_writable_folder(target, "run.dir")

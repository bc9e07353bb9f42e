"""`trenchcoat export`: the dtype of what it writes, the model card, and the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors import safe_open

import trenchcoat
from conftest import save_tiny_model
from hub_stand_in import hub_stand_in, use_hub
from tiny_families import logits, tokens
from trenchcoat.cli import app as cli
from trenchcoat.config import FeatureMapConfig, LoraConfig, ModelConfig, StudentConfig
from trenchcoat.models import hub, saving
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.card import base_facts
from trenchcoat.models.hub import adapter_state
from trenchcoat.models.licence import copy_licences
from trenchcoat.models.loading import load_model, stored_dtype
from trenchcoat.models.lora import add_lora

REPOSITORY = Path(__file__).parents[2]
STUDENT = StudentConfig(window=4, keep=("1.0",), feature_map=FeatureMapConfig(feature_dim=6))


LICENCES = {"LICENSE.txt": "Wear it in the rain.", "NOTICE": "Made of cotton.", "USE_POLICY.md": "Not as a tent."}
"""Files of the base."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` (in bfloat16) and the `adapter` that was made of it."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny_model(folder / "base", seed=0)
    for name, text in LICENCES.items():
        (folder / "base" / name).write_text(text)
    plain, words = load_model(ModelConfig(path=str(folder / "base"), device="cpu", dtype="bfloat16"))
    plain.save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    cfg = ModelConfig(path=str(folder / "base"), device="cpu", dtype="float32")
    model, _ = load_model(cfg)
    attach_students(model, STUDENT)
    add_lora(model, LoraConfig(rank=2, targets=("q_proj", "v_proj")))
    set_mode(model, "student")
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    hub.save_adapter(model, folder / "adapter", base=cfg)
    return folder


def stored(folder: Path) -> dict[str, set[str]]:
    """The dtypes in the files: of the students, and of everything else."""
    found: dict[str, set[str]] = {"students": set(), "weights": set()}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found["students" if ".student." in name else "weights"].add(opened.get_slice(name).get_dtype())
    return found


@pytest.mark.parametrize(("option", "dtype"), [([], "BF16"), (["--dtype", "float32"], "F32")])
def test_a_complete_model_keeps_the_dtype_of_the_base(
    made: Path, tmp_path: Path, option: list[str], dtype: str
) -> None:
    assert stored_dtype(str(made / "base")) == "bfloat16"
    assert cli.main(["export", str(made / "adapter"), "--merge", "--out", str(tmp_path / "out"), *option]) == 0
    assert stored(tmp_path / "out") == {"students": {"F32"}, "weights": {dtype}}
    name = {"BF16": "bfloat16", "F32": "float32"}[dtype]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    model, _ = trenchcoat.load(tmp_path / "out", device="cpu", dtype="stored")
    assert model.dtype == getattr(torch, name)
    expected = logits(trenchcoat.load(made / "adapter", device="cpu")[0], tokens(1, 20))
    near = 0.1 if dtype == "BF16" else 1e-4
    torch.testing.assert_close(logits(model, tokens(1, 20)).float(), expected, rtol=0, atol=near)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --out DIR"),
        (["--out", "x", "--dtype", "bfloat16"], "--dtype is that of a complete model"),
        (["--out", "x", "--private"], "--private goes with --push-to-hub"),
        (["--out", "x", "--to", "lolcats", "--push-to-hub", "me/x"], "leave out --to"),
    ],
)
def test_wrong_usage(made: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(made / "adapter"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_complete_model_has_no_adapter_to_write(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(made / "adapter"), "--merge", "--out", str(tmp_path / "whole")]) == 0
    assert cli.main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "adapter")]) == 1
    assert "is a complete model, which holds no adapter to write: give --merge" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


OPENS = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/coat", trust_remote_code=True)
print(model(torch.arange(3, 20)[None]).logits.double().sum().item())
import trenchcoat
model, _ = trenchcoat.load("me/coat", revision="main", dtype="stored", device="cpu")
print(model(torch.arange(3, 20)[None]).logits.double().sum().item())
trenchcoat.load("me/coat", revision="nope")
"""


def test_push_to_hub_and_open_it_elsewhere(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub_stand_in() as stand_in:
        use_hub(stand_in, monkeypatch)
        assert cli.main(["export", str(made / "adapter"), "--push-to-hub", "me/coat"]) == 0
        assert f"uploaded: {stand_in.endpoint}/me/coat/commit/" in capsys.readouterr().out.replace("\n", "")
        files = stand_in.files["me/coat"]
        wanted = {"README.md", "config.json", "model.safetensors", "modeling_trenchcoat.py", "tokenizer.json"}
        assert wanted <= set(files)
        assert not stand_in.private["me/coat"]
        assert all(str(made).encode() not in content for content in files.values())
        environment = {**stand_in.environment(tmp_path), "PYTHONPATH": str(REPOSITORY / "src")}
        done = subprocess.run(
            [sys.executable, "-c", OPENS], capture_output=True, text=True, timeout=120, env=environment, check=False
        )
    assert "UserError: cannot read the config of 'me/coat'" in done.stderr, done.stderr
    cli.main(["export", str(made / "adapter"), "--merge", "--out", str(tmp_path / "out")])
    model, _ = trenchcoat.load(tmp_path / "out", device="cpu", dtype="stored")
    expected = model(torch.arange(3, 20)[None]).logits.double().sum().item()
    assert [float(line) for line in done.stdout.split()] == pytest.approx([expected] * 2)


def test_a_model_in_memory_is_pushed_with_its_card(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trenchcoat.load(made / "adapter", device="cpu", dtype="stored")
    with hub_stand_in() as stand_in:
        use_hub(stand_in, monkeypatch)
        model.push_to_hub("me/again", private=True, tags=["mine"])
    assert stand_in.private["me/again"]
    card = ModelCard(stand_in.files["me/again"]["README.md"].decode())
    assert {"trenchcoat", "mine"} <= set(card.data.tags)
    assert "Linearized: base" in card.text


def test_the_licence_of_a_base_of_the_hub_is_asked_for(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(ModelConfig(path=str(tiny_model_dir), device="cpu", dtype="float32"))
    model.trenchcoat_adapter = {"base": {"path": "someone/tiny", "revision": None}}
    known = {"name": "someone/tiny", "hub": "someone/tiny"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with hub_stand_in() as stand_in:
        use_hub(stand_in, monkeypatch)
        stand_in.files["someone/tiny"] = {"README.md": b"---\nlicense: other\nlicense_name: coat-1\n---\n"}
        assert base_facts(model) == known
        licence = {"license": "other", "license_name": "coat-1"}
        assert base_facts(model, online=True) == {**known, "licence": licence}


def licences_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name in LICENCES}


def test_the_licences_of_the_base_are_in_the_complete_model(made: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(made / "adapter"), "--merge", "--out", str(tmp_path / "out")]) == 0
    assert licences_in(tmp_path / "out") == LICENCES
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other"
    assert card.data.to_dict()["license_link"] == "LICENSE.txt"
    assert "see [LICENSE.txt](LICENSE.txt), [NOTICE](NOTICE), [USE_POLICY.md](USE_POLICY.md); it applies" in card.text
    assert cli.main(["export", str(tmp_path / "out"), "--merge", "--out", str(tmp_path / "again")]) == 0
    assert licences_in(tmp_path / "again") == LICENCES
    model, _ = trenchcoat.load(tmp_path / "again", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    assert licences_in(tmp_path / "saved") == LICENCES


def test_the_licences_of_a_base_of_the_hub_are_fetched_and_then_cached(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(ModelConfig(path=str(tiny_model_dir), device="cpu", dtype="float32"))
    model.trenchcoat_adapter = {"base": {"path": "someone/tiny", "revision": None}}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("before", "online", "cached"):
        (tmp_path / name).mkdir()
    with hub_stand_in() as stand_in:
        use_hub(stand_in, monkeypatch)
        own = {name: text.encode() for name, text in LICENCES.items()}
        stand_in.files["someone/tiny"] = {**own, "model.safetensors": b"", "licensed.py": b""}
        copy_licences(model, tmp_path / "before")
        assert not licences_in(tmp_path / "before")
        copy_licences(model, tmp_path / "online", online=True)
    copy_licences(model, tmp_path / "cached", online=True)  # the hub is gone
    for name in ("online", "cached"):
        assert licences_in(tmp_path / name) == LICENCES
        assert len(list((tmp_path / name).iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [("not a name", "hf_any", "Repo id must use"), ("me/coat", None, "nobody is logged in")],
)
def test_what_cannot_be_uploaded_is_said_before_anything_is_loaded(
    name: str, token: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving, "get_token", lambda: token)
    assert cli.main(["export", "no-such-folder", "--push-to-hub", name]) == 1
    shown = capsys.readouterr().err
    assert f"cannot upload to {name!r}: {said}" in shown
    assert "hf auth login" in shown


def test_a_hub_that_refuses_is_said_in_a_line(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub_stand_in() as stand_in:
        use_hub(stand_in, monkeypatch, token="hf_wrong")
        assert cli.main(["export", str(made / "adapter"), "--push-to-hub", "me/coat"]) == 1
    said = capsys.readouterr().err
    assert "cannot upload to 'me/coat'" in said
    assert "hf auth login" in said
    assert not stand_in.files

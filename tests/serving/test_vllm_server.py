"""Which server `trenchcoat serve` starts, and vLLM's command line; a package of the same name stands in for vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiny_families import tiny_model
from trenchcoat.config import FeatureMapConfig, StudentConfig, UserError
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.serving import vllm_server
from trenchcoat.serving.server import ServeSettings

VLLM = SimpleNamespace(origin="vllm/__init__.py")
SHOWS_ITS_ARGUMENTS = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('VLLM_API_KEY')]))"


def merged(family: str, folder: Path, **student: Any) -> Path:
    model = tiny_model(family)
    attach_students(model, StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=6), **student))
    set_mode(model, "student")
    hub.save_merged(model, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged folder of a family that vLLM has a class for."""
    return merged("llama", tmp_path_factory.mktemp("merged") / "coat")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM can be found."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: VLLM if name == "vllm" else real(name))


def chosen(path: Path, **settings: Any) -> tuple[bool, str]:
    said: list[str] = []
    return vllm_server.wants_vllm(path, ServeSettings(**settings), said.append), "".join(said)


def test_vllm_takes_the_place_of_the_process(folder: Path, tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").touch()
    (package / "api_server.py").write_text(SHOWS_ITS_ARGUMENTS)
    path = os.pathsep.join([str(tmp_path), str(Path(vllm_server.__file__).parents[2])])
    options = [
        "--port",
        "8123",
        "--context",
        "64",
        "--dtype",
        "float32",
        "--name",
        "team/coat",
        "--grace",
        "5",
        "--vllm-option=--enforce-eager",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "trenchcoat", "serve", str(folder), *options],
        env={**os.environ, "PYTHONPATH": path, "TRENCHCOAT_API_KEY": "secret"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vLLM serves team/coat at http://127.0.0.1:8123/v1" in done.stderr + done.stdout
    arguments, key = json.loads(done.stdout.splitlines()[-1])
    assert arguments.pop() == "--enforce-eager"
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given == {
        "--model": str(folder), "--served-model-name": "team/coat", "--host": "127.0.0.1", "--port": "8123",
        "--dtype": "float32", "--max-model-len": "64", "--shutdown-timeout": "5", "--uvicorn-log-level": "info",
    }  # fmt: skip
    assert key == "secret"


def test_the_embedded_server_where_vllm_is_not_installed(folder: Path) -> None:
    assert importlib.util.find_spec("vllm") is None
    wanted, said = chosen(folder, engine="auto")
    assert (wanted, "one request at a time; not vLLM: it is not installed" in said) == (False, True)
    assert chosen(folder, engine="embedded") == (False, "")
    with pytest.raises(UserError, match="--engine vllm: it is not installed"):
        chosen(folder, engine="vllm")
    with pytest.raises(UserError, match="--vllm-option is for vLLM, which does not serve this: it is not installed"):
        chosen(folder, engine="auto", vllm_option=("--enforce-eager",))
    with pytest.raises(UserError, match=r"--vllm-option is for vLLM.*--engine is embedded"):
        chosen(folder, engine="embedded", vllm_option=("--enforce-eager",))
    with pytest.raises(UserError, match="--engine is 'vlm'; known: auto, vllm, embedded"):
        chosen(folder, engine="vlm")


def test_a_folder_of_that_name_is_not_vllm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "not installed" in chosen(folder, engine="auto")[1]


def test_what_vllm_cannot_serve_is_said(folder: Path, installed: None, tmp_path: Path) -> None:
    assert chosen(folder, engine="auto") == (True, "")
    assert chosen(folder, engine="vllm") == (True, "")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "trenchcoat.json").write_text("{}")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "run", {}, "is an adapter or a run; `trenchcoat export"),
        (tmp_path, {}, "no merged folder"),
        (merged("olmo2", tmp_path / "olmo2"), {}, "is LinearizedOlmo2ForCausalLM"),
        (merged("llama", tmp_path / "scaled", keep=("0.1",), kept_log_scale=600.0), {}, "no scale by position"),
        (folder, {"queue": 3}, "it has no --queue; leave it out"),
        (folder, {"allow_host": ("coat.example",)}, "it has no --allow-host"),
        (folder, {"device": "cpu"}, "it has no --device"),
    ]
    for path, settings, reason in cases:
        wanted, said = chosen(path, engine="auto", **settings)
        assert (wanted, reason in said) == (False, True), said
        with pytest.raises(UserError, match="--engine vllm: "):
            chosen(path, engine="vllm", **settings)

"""Every Python block of the documents runs as it is printed, on a tiny model, or says in a comment why it does not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from serve_kit import Running
from test_docs import FRONT, PAGES, REPOSITORY
from trenchcoat.evaluation.report.plots import LOOK
from trenchcoat.planning import choose

pytest_plugins = ["serve_fixtures"]

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
SETTINGS = """
model: {dtype: float32, device: cpu}
student: {window: 8, feature_map: {feature_dim: 8}}
select: {rows: 1, frontier: []}
data: {format: text, seq_len: 48, validation_rows: 10, cache_dir: cache}
transfer: {max_steps: 2, accumulation: 1, schedule: constant, eval_batches: 1}
lora: {max_steps: 2, accumulation: 1, schedule: constant, eval_batches: 1}
eval: {rows: 2, length_factors: [1], copy_rows: 0, baselines: false, decode_lengths: []}
"""
"""Stands in for the built-in recipes: seconds instead of an hour."""


def _blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def _run(page: str) -> dict[str, Any]:
    """The names that the blocks of ``page`` leave behind, run in one interpreter after one another."""
    names: dict[str, Any] = {}
    for block in _blocks(REPOSITORY / page):
        if block["reason"] is None:
            exec(compile(block["code"], page, "exec"), names)
    return names


@pytest.fixture
def place(tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the blocks name: the model (as a folder in place of the hub's) and texts."""
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(tiny_model_dir)
    shutil.copy(text_file, tmp_path / "books.jsonl")
    (tmp_path / "manual.txt").write_text("Press the button twice. " * 20)
    (tmp_path / "essays").mkdir()
    for name, text in enumerate(text_file.read_text().splitlines()):
        (tmp_path / "essays" / f"{name}.txt").write_text(text)
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    for name in ("CPU_RECIPE", "GPU_RECIPE"):
        monkeypatch.setattr(choose, name, str(tmp_path / "tiny.yaml"))
    monkeypatch.setitem(LOOK, "savefig.dpi", 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_run_here_or_says_why_not() -> None:
    """The pages with blocks that are run are those that the tests below name."""
    pages = {page.name for page in (*FRONT, *PAGES) if any(block["reason"] is None for block in _blocks(page))}
    assert pages == {"README.md", "CONVERT.md", "GENERATE.md", "SERVE.md"}


def test_converting_loading_and_the_state_as_a_file(place: Path) -> None:
    """GENERATE.md begins with the run of another page."""
    found = _run("README.md")
    assert found["results"].rows
    assert found["tokenizer"].decode(found["ids"][0]) == "Once upon a time"
    shutil.copytree("runs/mine", "runs/demo")
    session = _run("docs/GENERATE.md")["session"]
    read = session.seen + len(session.pending)  # the last token is pending until something follows
    assert read == len((place / "manual.txt").read_text())  # a byte is a token here


@pytest.mark.usefixtures("place")
def test_settings_and_texts_in_memory() -> None:
    found = _run("docs/CONVERT.md")["results"]
    assert found.stages[0].steps == 100


def test_the_openai_client(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPOSITORY / "docs/SERVE.md").read_text(encoding="utf-8")
    code = BLOCK.findall(text)[0][1]
    assert code.count(":8000") == 1
    exec(compile(code.replace(":8000", f":{server.port}"), "SERVE.md", "exec"), {})
    assert len(capsys.readouterr().out) > 10

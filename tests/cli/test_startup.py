"""Help and mistakes are answered at once: without importing PyTorch, Transformers or anything as heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trenchcoat.cli.app import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "peft", "matplotlib")
CODE = f"""
import sys
from trenchcoat.cli.app import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print("imported:", *[name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""


def _answer(line: str) -> tuple[int, str]:
    """(exit code, output) of a command line, which must import nothing heavy."""
    done = subprocess.run([sys.executable, "-c", CODE, *line.split()], capture_output=True, text=True, check=False)
    *output, imported = done.stdout.splitlines()
    assert imported == "imported:", f"trenchcoat {line} imports {imported}"
    return done.returncode, "\n".join([*output, done.stderr])


@pytest.mark.parametrize("command", ["", *[name for name in COMMANDS if name != "lm-eval"], "blocks run"])
def test_help_imports_nothing_heavy(command: str) -> None:
    """Of `lm-eval` the help is the harness's own."""
    code, output = _answer(f"{command} --help")
    assert code == 0
    assert "usage: trenchcoat" in output


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("linearise demo", "invalid choice: 'linearise'"),
        ("linearize demo --nope", "unrecognized arguments: --nope"),
        ("bench everything", "invalid choice: 'everything'"),
        ("linearize dem", "did you mean 'demo'?"),
        ("linearize demo student.windw=8", "did you mean student.window?"),
        ("blocks run llama3_1_8b lora.rank=none", "lora.rank must be a whole number"),
        ("eval somewhere eval.row=2", "did you mean eval.rows?"),
    ],
)
def test_a_typo_imports_nothing_heavy(line: str, answer: str) -> None:
    code, output = _answer(line)
    assert code == 2
    assert answer in output


@pytest.mark.parametrize(
    "line",
    ["generate x --prompt a --out {file}/x", "generate x --prompt a --save-state {file}/x", "eval x --out {file}/x",
     "export x --out {file}", "chat x --save-state {file}/x", "plan demo --json {file}/x", "eval x --out {folder}",
     "blocks shard demo --out {file}", "import-lolcats --maps x --base x --out {file}", "report x --out {file}"],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_wrong_usage(tmp_path: Path, line: str) -> None:
    (tmp_path / "file").write_text("")
    code, output = _answer(line.format(file=tmp_path / "file", folder=tmp_path))
    assert code == 2
    assert "to write: " in output
    assert str(tmp_path) in output

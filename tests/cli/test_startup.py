"""Help and mistakes are answered at once: without importing PyTorch, Transformers or anything as heavy."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trenchcoat.cli.app import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "peft", "matplotlib")
CODE = f"""
import contextlib, io, json, sys
from trenchcoat.cli.app import main
for line in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = main(line.split())
        except SystemExit as ended:
            code = ended.code
    heavy = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps([code, out.getvalue(), heavy]), flush=True)
    if heavy:
        break
"""
COMPLETE = "from trenchcoat.cli.app import main\nmain([])"
COMMAND_HELP = ["", *[name for name in COMMANDS if name != "lm-eval"], "blocks run"]
"""Of `lm-eval` the help is the harness's own."""


def _answers(lines: list[str]) -> list[tuple[int, str]]:
    """(exit code, output) of command lines, one after the other in a new process; none may import anything heavy."""
    given = json.dumps(lines)
    done = subprocess.run([sys.executable, "-c", CODE], input=given, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for line, (_, _, heavy) in zip(lines, found, strict=False):
        assert not heavy, f"trenchcoat {line} imports {heavy}"
    assert len(found) == len(lines), done.stderr
    return [(code, output) for code, output, _ in found]


def _answer(line: str) -> tuple[int, str]:
    return _answers([line])[0]


TYPOS = [
    ("linearise demo", "there is no command 'linearise'; did you mean linearize?"),
    ("some-lab/model-1b", "to convert that model: trenchcoat linearize some-lab/model-1b"),
    ("linearize demo --nope", "trenchcoat linearize has no option --nope; see trenchcoat linearize --help"),
    ("bench everything", "invalid choice: 'everything'"),
    ("bench kernel", "invalid choice 'kernel', the nearest is 'kernels'"),
    ("blocks rnu demo", "invalid choice 'rnu', the nearest is 'run'"),
    ("linearize demo --lr 5e-3", "it is a setting: transfer.lr=5e-3 or lora.lr=5e-3"),
    ("linearize --lr=5e-3 demo", "it is a setting: transfer.lr=5e-3 or lora.lr=5e-3"),
    ("linearize demo --transfer.max-steps 3", "it is a setting: transfer.max_steps=3"),
    ("transfer demo --model some-lab/x", "it is a setting: model.path=some-lab/x"),
    ("plan demo --gpu-memori 8GB", "did you mean --gpu-memory?"),
    ("generate x --promt a --prompt b", "did you mean --prompt?"),
    ("generate x --prompt a lora=null", "trenchcoat generate takes no settings: lora=null"),
    ("export x --out y --lr 3", "trenchcoat export has no option --lr; see trenchcoat export --help"),
    ("linearize dem", "did you mean 'demo'?"),
    ("linearize demo student.windw=8", "did you mean student.window?"),
    ("linearize demo student.name=terace", "did you mean terrace?"),
    ("linearize some-lab/model-1b student.name=terace", "did you mean terrace?"),
    ("linearize some-lab/model-1b lora.rnk=8", "did you mean lora.rank?"),
    ("linearize demo student.feature_map.name=hedgehg", "did you mean hedgehog?"),
    ("linearize demo student.name=linear student.window=64", "student.name=linear does not use student.window=64"),
    ("finetune demo lora.loss=kll", "did you mean kl?"),
    ("transfer demo transfer.schedule=cosin", "did you mean cosine?"),
    ("transfer demo data.format=alpacca", "did you mean alpaca?"),
    ("select demo select.method=gate", "did you mean gates?"),
    ("blocks run llama3_1_8b lora.rank=none", "lora.rank must be a whole number"),
    ("eval somewhere eval.row=2", "did you mean eval.rows?"),
    ("plan absent.gguf", "there is no file or folder absent.gguf"),
    ("linearize /absent/model", "there is no file or folder /absent/model"),
    ("linearize some-lab/model-1b --data absent.jsonl", "there is no data file absent.jsonl; check data.path"),
    ("transfer demo data.path=absent.txt", "there is no data file absent.txt; check data.path"),
    ("transfer demo data.path=absent.csv[50]", "there is no data file absent.csv; check data.path"),
    ("finetune demo data.validation_path=absent/*.json", "no file matches absent/*.json"),
]


def test_help_imports_nothing_heavy() -> None:
    for name, (code, output) in zip(COMMAND_HELP, _answers([f"{name} --help" for name in COMMAND_HELP]), strict=True):
        assert code == 0, name
        assert f"usage: trenchcoat {name}".rstrip() in output


def test_a_typo_imports_nothing_heavy() -> None:
    for (line, answer), (code, output) in zip(TYPOS, _answers([line for line, _ in TYPOS]), strict=True):
        assert code == 2, f"{line}: {output}"
        assert answer in output, line


@pytest.mark.parametrize("line", ["linearize demo --lr 5e-3", "linearize demo student.name=terace"])
def test_a_typo_is_answered_in_under_a_second(line: str) -> None:
    """In seconds of the processor: other programs may be running."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _answer(line)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("trenchcoat li", ["linearize"]),
        ("trenchcoat plan smol", ["smollm2_135m"]),
        ("trenchcoat linearize demo transfer.l", ["transfer.lr="]),
        ("trenchcoat blocks s", ["stitch", "shard", "status"]),
        ("trenchcoat export x --m", ["--merge"]),
    ],
)
def test_the_shell_completes(line: str, offered: list[str], tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    code = f"import os\nos.dup2(os.open({str(answers)!r}, os.O_WRONLY | os.O_CREAT), 8)\n{COMPLETE}"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " ", "COMP_LINE": line, "COMP_POINT": str(len(line)),
             "COMP_TYPE": "9", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_COMP_WORDBREAKS": "=:"}  # fmt: skip
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, cwd=tmp_path, check=True)
    assert answers.read_text().split() == offered


def test_each_shell_has_its_completion() -> None:
    expected = {"bash": "complete -o", "zsh": "compdef", "fish": "complete --command"}
    for (shell, words), (code, output) in zip(
        expected.items(), _answers([f"completion {shell}" for shell in expected]), strict=True
    ):
        assert code == 0, shell
        assert "trenchcoat" in output
        assert words in output


UNWRITABLE = [
    "generate x --prompt a --out {file}/x", "generate x --prompt a --save-state {file}/x", "eval x --out {file}/x",
    "export x --out {file}", "chat x --save-state {file}/x", "plan demo --json {file}/x", "eval x --out {folder}",
    "blocks shard demo --out {file}", "import-lolcats --maps x --base x --out {file}", "report x --out {file}",
]  # fmt: skip


def test_an_output_that_cannot_be_written_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = [line.format(file=tmp_path / "file", folder=tmp_path) for line in UNWRITABLE]
    for line, (code, output) in zip(lines, _answers(lines), strict=True):
        assert code == 2, line
        assert "to write: " in output
        assert str(tmp_path) in output

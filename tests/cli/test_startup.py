"""Help and mistakes are answered at once: without importing PyTorch, Transformers or anything as heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
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
    ],
)
def test_a_typo_imports_nothing_heavy(line: str, answer: str) -> None:
    code, output = _answer(line)
    assert code == 2
    assert answer in output


@pytest.mark.parametrize("line", ["linearize demo --lr 5e-3", "linearize demo student.name=terace"])
def test_a_typo_is_answered_in_under_a_second(line: str) -> None:
    seconds = []
    for _ in range(3):  # other programs may be running
        start = time.perf_counter()
        _answer(line)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


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
    code = f"import os\nos.dup2(os.open({str(answers)!r}, os.O_WRONLY | os.O_CREAT), 8)\n{CODE}"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " ", "COMP_LINE": line, "COMP_POINT": str(len(line)),
             "COMP_TYPE": "9", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_COMP_WORDBREAKS": "=:"}  # fmt: skip
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, cwd=tmp_path, check=True)
    assert answers.read_text().split() == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_completion(shell: str) -> None:
    code, output = _answer(f"completion {shell}")
    assert code == 0
    assert "trenchcoat" in output
    assert {"bash": "complete -o", "zsh": "compdef", "fish": "complete --command"}[shell] in output


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

"""What the documents show works: commands parse, recipes load, the contributor's example runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from block_commands import parse_trenchcoat
from trenchcoat.cli import app as cli
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.config.recipe_io import builtin_recipes, load_recipe
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.students import STUDENTS, register_student

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
FRONT = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


PLACEHOLDER = re.compile(r"\b(RECIPE|MODEL|DIR|RUN|NAME)\b")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _commands() -> list[str]:
    texts = [path.read_text(encoding="utf-8").replace("\\\n", " ") for path in FRONT + PAGES]
    lines = [line for text in texts for block in _blocks(text, "sh") for line in block.splitlines()]
    lines = [line for line in lines if not PLACEHOLDER.search(line.partition("#")[0])]
    inline = re.findall(r"`(trenchcoat [^`\n]+)`", README + CONTRIBUTING)
    recipes = [line.lstrip("# ") for path in (REPOSITORY / "src/trenchcoat/config/recipes").glob("*.yaml")
               for line in path.read_text().splitlines() if re.match(r"#\s+trenchcoat \w+ \w+ ", line)]  # fmt: skip
    return [line for line in (*lines, *inline, *recipes) if line.strip() and "COMMAND" not in line]


@pytest.mark.parametrize("line", [line for line in _commands() if line.startswith("trenchcoat ")])
def test_the_commands_shown_parse(line: str) -> None:
    words = shlex.split(line.partition(" < ")[0], comments=True)[1:]
    if words[0] == "blocks":
        line = re.sub(r" \([^()]*\)$", "", line)  # a remark after the command
        parse_trenchcoat(shlex.split(line, comments=True))
        return
    args = cli._parse(words)
    if getattr(args, "recipe", None) in builtin_recipes():
        overrides = [item for item in args.overrides if "terrace_sinks" not in item]
        load_recipe(args.recipe, overrides)


@pytest.mark.parametrize("page", FRONT + PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        place, _, anchor = target.partition("#")
        found = (page.parent / place) if place else page
        assert found.exists(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.*)", found.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, f"{page.name}: {target}"


def test_every_page_is_in_the_site() -> None:
    site = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if not re.search(rf"\b{page.name}\b", site)] == []


def test_the_make_targets_shown_exist() -> None:
    targets = set(re.findall(r"^(\w+):", MAKEFILE, flags=re.MULTILINE))
    shown = set(re.findall(r"make (\w+)", " ".join(_blocks(README, "sh") + _blocks(CONTRIBUTING, "sh"))))
    assert {"demo", "test"} <= shown <= targets


def test_the_first_screen_says_what_it_is() -> None:
    screen = "\n".join(README.splitlines()[:40])
    for word in ("softmax", "linear-time", "make demo", "make test", "reference-table", "linearize llama3_1_8b"):
        assert word in screen, word


def test_the_first_table_is_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("reference_table", REPOSITORY / "scripts" / "reference_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = README.split("<!-- reference-table -->\n")[1].split("<!-- /reference-table -->")[0]
    assert shown == module.table()


def test_the_contributors_student_works(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = _blocks(CONTRIBUTING, "python")
    space: dict[str, object] = {"__name__": "terrace_sinks"}
    exec(compile(code, "terrace_sinks.py", "exec"), space)
    entry = r'\s*"(\w+)": StudentEntry\("trenchcoat\.students\.terrace_sinks\.(\w+)"\),\s*'
    name, class_name = re.fullmatch(entry, line).groups()  # type: ignore[union-attr]
    monkeypatch.setattr("trenchcoat.students.registry.STUDENTS", dict(STUDENTS))
    register_student(name, space[class_name])  # type: ignore[arg-type]

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    attach_students(model, StudentConfig(name=name, window=4, feature_map=FeatureMapConfig(feature_dim=8)))
    set_mode(model, "student")
    ids = torch.randint(3, 259, (1, 25))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        prefix = model(input_ids=ids[:, :17], use_cache=True)
        stepped = [prefix.logits]
        cache = prefix.past_key_values
        for position in range(17, 25):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            stepped.append(out.logits)
            cache = out.past_key_values
    torch.testing.assert_close(torch.cat(stepped, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_the_package_metadata_agrees_with_the_pins() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert pins["torch"] == "2.13.0"
    wanted = (REPOSITORY / "pyproject.toml").read_text()
    for name in (
        "torch",
        "transformers",
        "peft",
        "datasets",
        "safetensors",
        "omegaconf",
        "rich",
        "matplotlib",
        "pytest",
    ):
        assert name in pins
        assert f'"{name}>=' in wanted


def test_every_row_of_i_want_to_add_has_an_example_that_runs() -> None:
    """The last cell of a row names the test; every test of `tests/extending` is in a row."""
    start = CONTRIBUTING.index("## I want to add")
    rows = [
        line for line in CONTRIBUTING[start:].splitlines() if line.startswith("| ") and not line.startswith("| what")
    ]
    named = [re.findall(r"\]\((tests/[\w/]+\.py)\)", row.rsplit("|", 2)[1]) for row in rows]
    assert all(len(found) == 1 for found in named), rows
    examples = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "tests/extending").glob("test_*.py")}
    assert examples == {found[0] for found in named} - {"tests/config/test_config.py"}

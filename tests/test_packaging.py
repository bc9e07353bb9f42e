"""A wheel built from the source tree contains what runs need: code, recipes, embedded teacher, entry point."""

from __future__ import annotations

import ast
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy so that nothing is left in the repository."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    shutil.copytree(
        REPOSITORY / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".mypy_cache")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(place), str(tree)], check=True, capture_output=True, text=True)
    return next(place.glob("trenchcoat-*.whl"))


def test_the_wheel_holds_what_runs_need(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = REPOSITORY / "src" / "trenchcoat"
    kept = [
        path
        for pattern in (
            "*.py",
            "config/recipes/*.yaml",
            "models/embedded_teacher/*",
            "evaluation/harness_tasks/*/*",
            "py.typed",
        )
        for path in source.rglob(pattern)
    ]
    for path in kept:
        assert str(path.relative_to(source.parent)) in names, path.name
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "trenchcoat = trenchcoat.cli.app:main" in zipfile.ZipFile(wheel).read(entry).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_library_that_is_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "dev"}
    listed = itertools.chain(project["dependencies"], *extras.values())
    declared = {re.split("[>=;]", one)[0] for one in listed}
    names = {"pyyaml": "yaml", "markdown-it-py": "markdown_it"}
    known = {names.get(name, name.replace("-", "_")) for name in declared} | {"trenchcoat"} | sys.stdlib_module_names
    for path in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in known, (
                    f"{path.name} imports {module}, which pyproject.toml does not name"
                )


def test_recipes_load_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import trenchcoat; print(trenchcoat.__file__, trenchcoat.load_recipe('llama3_1_8b').transfer.lr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path) in done.stdout
    assert "0.01" in done.stdout

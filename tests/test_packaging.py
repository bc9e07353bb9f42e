"""A wheel built from the source tree contains what runs need: code, recipes, embedded teacher, entry point."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from trenchcoat.config.package import DISTRIBUTION

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy so that nothing is left in the repository."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    shutil.copytree(
        REPOSITORY / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".mypy_cache")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(REPOSITORY / name, tree / name)
    prepared = ["-o", f"{sys.prefix}/.installed-with-constraints", f"VENV={sys.prefix}"]
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        ["make", *prepared, "wheel"], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next((tree / "dist").glob("trenchcoat_lm-*.whl"))


def test_the_wheel_holds_what_runs_need(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = REPOSITORY / "src" / "trenchcoat"
    kept = [
        path
        for pattern in (
            "*.py",
            "config/recipes/*.yaml",
            "models/embedded_teacher/*",
            "ops/compiled/source/*",
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
    names = {"pyyaml": "yaml", "markdown-it-py": "markdown_it", "fla-core": "fla"}
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


def test_the_demo_runs_from_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The environment sees the libraries that are installed here, but no installation of this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    binaries, home = tmp_path / "env" / "bin", tmp_path / "home"
    home.mkdir()
    install = [sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--quiet", str(wheel)], check=True, capture_output=True, text=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    settings = [
        "run.dir=run", "run.progress=plain", "data.max_rows=6", "data.seq_len=32", "data.validation_rows=2",
        "data.cache_dir=cache", "student.window=4", "student.keep=none", "student.feature_map.feature_dim=16",
        "transfer.max_steps=1", "lora.max_steps=1",
        "transfer.accumulation=1", "lora.accumulation=1", "transfer.batch_size=1", "lora.batch_size=1",
        "eval.rows=2", "eval.baselines=false", "eval.seq_len=null", "eval.length_factors=[1]", "eval.copy_rows=1",
        "eval.decode_lengths=[16]",
    ]  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(binaries / "trenchcoat"), "demo", *settings],
        cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (home / "run" / "report.md").is_file()
    code = "import sys, trenchcoat; print(trenchcoat.__file__)"
    where = subprocess.run(
        [str(binaries / "python"), "-c", code], cwd=home, env=environment, capture_output=True, text=True, check=True
    )
    assert where.stdout.strip() == str(packages / "trenchcoat" / "__init__.py")


def test_nobody_is_told_to_install_the_other_project_of_that_name() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION != "trenchcoat"
    told = re.compile(r"pip install (?:-\S+ )*['\"]?trenchcoat(?!-lm)\b")
    places = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "docs").rglob("*.ipynb")]
    for path in [*places, *(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "scripts").iterdir()]:
        if path.is_file():
            assert not told.search(path.read_text(encoding="utf-8")), path

"""The layout of the code: one order of packages, which folders may import a library, small files with docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "trenchcoat"

PACKAGES = (
    "config",
    "ops",
    "runtime",
    "students",
    "models",
    "data",
    "training",
    "planning",
    "generation",
    "serving",
    "evaluation",
    "conversion",
    "bench",
    "cli",
)
"""The packages under ``trenchcoat``; one imports only itself and those before it."""

ALLOWED: dict[str, tuple[str, ...]] = {
    "triton": ("ops/triton",),
    "fla": ("ops/fla_kernels.py",),
    "omegaconf": ("config",),
    "torch.distributed": ("runtime", "training/checkpoints.py", "planning/simulate.py", "conversion/blocks"),
    "peft": ("models/lora.py",),
    "uvicorn": ("serving/process.py",),
    "vllm": ("serving/vllm_plugin",),
    "lm_eval": ("evaluation",),
    "submitit": ("conversion/blocks",),
}
"""The folders (or files) that may import a library."""


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _files() -> list[tuple[str, ast.Module]]:
    """(path below the package, syntax tree) of every file."""
    return [(str(path.relative_to(SOURCE)), _tree(path)) for path in sorted(SOURCE.rglob("*.py"))]


def _imports(tree: ast.Module) -> Iterator[str]:
    """Absolute names of what is imported anywhere in a file, ``from a import b`` as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_packages_are_those_of_the_order() -> None:
    assert {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(PACKAGES)
    assert {path.name for path in SOURCE.iterdir() if path.is_file()} == {"__init__.py", "__main__.py", "py.typed"}


def test_a_package_imports_only_packages_before_it() -> None:
    for path, tree in _files():
        own = path.split("/")[0]
        for name in _imports(tree):
            other = name.split(".")[1] if name.startswith("trenchcoat.") else None
            if own in PACKAGES and other in PACKAGES:
                assert PACKAGES.index(other) <= PACKAGES.index(own), f"{path} imports {name}, which comes after {own}"


def test_files_import_modules_of_their_own_package_not_its_init() -> None:
    for path, tree in _files():
        parts = path.split("/")
        folders = {".".join(["trenchcoat", *parts[:depth]]) for depth in range(1, len(parts))}
        for name in _imports(tree):
            package, _, last = name.rpartition(".")
            inside = SOURCE.joinpath(*package.split(".")[1:], last)
            module = inside.is_dir() or inside.with_suffix(".py").is_file()
            assert package not in folders or module or parts[-1] == "__init__.py", f"{path} imports {name}"


def test_libraries_are_imported_only_where_allowed() -> None:
    for path, tree in _files():
        for name in _imports(tree):
            for library, places in ALLOWED.items():
                if f"{name}.".startswith(f"{library}."):
                    allowed = any(path == place or path.startswith(f"{place}/") for place in places)
                    assert allowed, f"{path} imports {name}; only {', '.join(places)} may"


def test_nothing_prints_but_the_command_line() -> None:
    for path, tree in _files():
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not lines or path.startswith("cli"), f"{path}:{lines[0]} prints; return a value, or write to the log"


def test_no_handler_catches_everything() -> None:
    for path, tree in _files():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                names = (
                    {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {"all"}
                )
                assert not names & {"Exception", "BaseException", "all"}, f"{path}:{node.lineno} catches everything"


def test_files_open_with_a_docstring_and_stay_small() -> None:
    for path, tree in _files():
        assert ast.get_docstring(tree), f"{path} has no docstring"
        lines = len((SOURCE / path).read_text(encoding="utf-8").splitlines())
        assert lines <= 600, f"{path} has {lines} lines, more than 600: split it"


def test_functions_stay_small() -> None:
    for path, tree in _files():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 70, f"{path}:{node.lineno} {node.name} has {length} lines, more than 70"

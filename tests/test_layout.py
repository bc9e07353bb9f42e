"""The house rules a machine can read: imports go down the floors, libraries stay behind fences, files are small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "trenchcoat"

FLOORS: list[set[str]] = [
    {"config", "ops", "embedded", "memory"},
    {"units", "slurmoptions"},
    {"students", "cache", "files", "families", "recipe_io", "interrupts", "schedules", "trainstate", "machine"}
    | {"local_tasks"}
    | {"distributed", "trackers"},
    {"sharding", "shapes", "lock", "chain"},
    {"identity"},
    {"interface", "runlog", "results", "data", "hidden", "objectives", "gradients", "checkpoint", "runfolder"}
    | {"continuations"},
    {"surgery", "verdicts", "flops", "keeper", "loading", "task_results", "pages"},
    {"auto", "plots", "esl", "sums", "layerwise", "blockmodel", "blockdata", "blockfolder", "blockmerge", "bandwidth"}
    | {"letters", "probes", "statefile"},
    {"vllm_plugin"},
    {"train", "footprint", "simulate", "task_report"},
    {"hub", "plan"},
    {"lolcats", "serving"},
    {"blockpass", "blocksize", "blockchecks"},
    {"blockways"},
    {"blockplan"},
    {"workshop", "evaluate", "generate", "report", "advice", "blockplan_report", "harness", "compare_runs"},
    {"comparison", "estimate", "plan_report", "blocks", "tasks", "conversation"},
    {"blockscore", "pipeline"},
    {"stages"},
    {"blockstages"},
    {"jobtask"},
    {"jobs"},
    {"launch"},
    {"bench"},
    {"cli_blocks", "cli_interop", "cli_eval", "cli_generate"},
    {"cli"},
    {"compat"},
    {"__init__", "__main__"},
]
"""Parts of the package from the ground up; a part imports only from floors below its own."""

FENCES: dict[str, set[str]] = {
    "triton": {"ops/triton_parts.py", "ops/triton_forward.py", "ops/triton_backward.py", "ops/triton_near.py"}
    | {
        "ops/triton_decode.py",
        "ops/triton_prepare.py",
        "ops/triton_crossent.py",
        "ops/triton_features.py",
        "ops/triton_maps.py",
        "ops/triton_launch.py",
        "ops/triton_interpreter.py",
        "ops/triton_check.py",
        "ops/triton_passes.py",
    },
    "peft": {"surgery.py"},
    "lm_eval": {"harness.py"},
    "omegaconf": {"recipe_io.py"},
    "submitit": {"jobs.py", "jobtask.py"},
    "fastapi": {"serving/parts.py"},
    "starlette": {"serving/parts.py"},
    "vllm": {"vllm_plugin/__init__.py", "vllm_plugin/models.py"},
    "uvicorn": {"serving/parts.py"},
    "torch.distributed": {"distributed.py", "sharding.py", "checkpoint.py", "simulate.py", "chain.py"},
}
"""The only files that may import these libraries."""


def _files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _part(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> list[str]:
    """Absolute names of every module imported anywhere in the file, `from trenchcoat import x` as `trenchcoat.x`."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; write the whole name"
            plain = node.module or ""
            names += [f"{plain}.{alias.name}" for alias in node.names] if plain in ("trenchcoat", "torch") else [plain]
    return names


def _floor(part: str) -> int:
    for number, parts in enumerate(FLOORS):
        if part in parts:
            return number
    raise AssertionError(f"{part} stands on no floor: give it one in tests/test_layout.py")


def test_every_part_has_one_floor_and_every_floor_exists() -> None:
    present = {_part(path) for path in _files()}
    for part in present:
        _floor(part)
    named = [part for parts in FLOORS for part in parts]
    assert len(named) == len(set(named))
    assert set(named) - present <= {"__main__"}


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    own = _part(path)
    for name in _imports(path):
        if name.split(".")[0] != "trenchcoat" or name == "trenchcoat":
            continue
        other = name.split(".")[1]
        if other == own:
            _check_inside(path, name)
        else:
            assert _floor(other) < _floor(own), f"{path.relative_to(SOURCE)} imports {name}, which is not below it"


def _check_inside(path: Path, name: str) -> None:
    """Inside a package, ``__init__`` imports its parts and never the other way round."""
    parts = name.split(".")
    if path.name != "__init__.py":
        assert len(parts) > 2, f"{path.relative_to(SOURCE)} imports its own package's __init__"


@pytest.mark.parametrize("library", FENCES)
def test_libraries_stay_behind_their_fences(library: str) -> None:
    for path in _files():
        inside = str(path.relative_to(SOURCE))
        used = [name for name in _imports(path) if name == library or name.startswith(f"{library}.")]
        assert not used or inside in FENCES[library], f"{inside} imports {used[0]}; only {FENCES[library]} may"


def test_nothing_prints_but_the_command_line() -> None:
    for path in _files():
        if path.name in ("cli.py", "__main__.py"):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not lines, f"{path.relative_to(SOURCE)}:{lines[0]} prints; return a value, or write to the run's log"


def test_no_handler_catches_everything() -> None:
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                names = (
                    {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {"all"}
                )
                assert not names & {"Exception", "BaseException", "all"}, (
                    f"{path.name}:{node.lineno} catches everything"
                )


def test_files_open_with_a_docstring_and_stay_small() -> None:
    for path in _files():
        text = path.read_text(encoding="utf-8")
        inside = path.relative_to(SOURCE)
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{inside} does not say what it is for"
        assert len(text.splitlines()) <= 420, f"{inside} has outgrown 420 lines: look for the second idea in it"


def test_functions_stay_small() -> None:
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 70, f"{path.relative_to(SOURCE)}:{node.lineno} {node.name} has {length} lines"

"""The structure of the code in one table: packages, imports between them, sizes, docstrings, start-up time.

    python scripts/structure.py            # this checkout
    python scripts/structure.py DIR        # another one, for comparison

A package is any package or module directly under ``src/trenchcoat``; an import is a pair of packages where the first
imports the second anywhere. Code lines are lines with code: no blanks, comments or docstrings.
"""

from __future__ import annotations

import ast
import io
import os
import resource
import subprocess
import sys
import tokenize
from collections import defaultdict
from functools import cached_property
from pathlib import Path

ORDER = (
    "config ops runtime students models data training planning generation serving evaluation linearize bench cli"
).split()
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class File:
    """One file: its tree, its lines of code, what it imports."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        inside = path.relative_to(source).with_suffix("")
        self.module = ".".join(part for part in inside.parts if part != "__init__")
        self.package = inside.parts[0]

    @cached_property
    def code_lines(self) -> int:
        """Number of lines with code; standalone strings count as documentation."""
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in NO_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        return len(lines)

    def imports(self, modules: set[str], *, top: bool = False) -> set[str]:
        """Modules of the package that are imported: anywhere, or at the ``top`` level and not for type checking."""
        found: set[str] = set()
        for node in self.tree.body if top else ast.walk(self.tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.startswith("trenchcoat."):
                    parts = name.split(".")[1:]
                    while parts and ".".join(parts) not in modules:
                        parts.pop()
                    found.add(".".join(parts))
        return found

    @cached_property
    def public(self) -> list[ast.ClassDef | Function]:
        """Public top-level functions and classes, and public methods of public classes."""
        found: list[ast.ClassDef | Function] = []
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                found.append(node)
                if isinstance(node, ast.ClassDef):
                    found += [n for n in node.body if isinstance(n, Function) and not n.name.startswith("_")]
        return found

    @cached_property
    def names(self) -> set[str]:
        """Public names the file defines at the top level."""
        found = {node.name for node in self.tree.body if isinstance(node, ast.ClassDef | Function)}
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        return {name for name in found if not name.startswith("_")}


def read(root: Path) -> list[File]:
    """Every file of the package except the embedded teacher's."""
    source = root / "src" / "trenchcoat"
    return [File(path, source) for path in sorted(source.rglob("*.py"))]


def closure(files: list[File], start: str) -> int:
    """Code lines read by importing ``start`` at the top level, without Triton kernels."""
    known = {file.module: file for file in files}
    seen, todo = set(), [start]
    while todo:
        module = todo.pop()
        if module in seen or "triton" in module:
            continue
        seen.add(module)
        parts = module.split(".")
        parents = [".".join(parts[:n]) for n in range(1, len(parts)) if ".".join(parts[:n]) in known]
        todo += [*parents, *known[module].imports(set(known), top=True)]
    return sum(known[module].code_lines for module in seen)


def is_kernel(node: Function) -> bool:
    """Whether the function is a Triton kernel."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def parameters(node: Function) -> int:
    """Number of parameters of a function, without ``self``."""
    names = [arg.arg for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")])


def cpu_seconds(root: Path, code: str) -> float:
    """CPU time of a fresh interpreter that runs ``code``; the minimum of three."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def table(root: Path) -> list[tuple[str, str]]:
    """(what, value) of every figure."""
    files = read(root)
    modules = {file.module for file in files}
    packages = {file.package for file in files} - {"__init__", "__main__"}
    edges = {
        (file.package, name.split(".")[0])
        for file in files
        if file.package in packages
        for name in file.imports(modules)
        if name
    }
    edges = {(a, b) for a, b in edges if a != b}
    upward = [(a, b) for a, b in edges if a in ORDER and b in ORDER and ORDER.index(b) > ORDER.index(a)]
    functions = [(node, file) for file in files for node in ast.walk(file.tree) if isinstance(node, Function)]
    lengths = {f"{f.path.name}:{n.name}": (n.end_lineno or n.lineno) - n.lineno + 1 for n, f in functions}
    longest = max(lengths, key=lambda name: lengths[name])
    file = max(files, key=lambda one: len(one.text.splitlines()))
    loop = "training.loop" if "training.loop" in modules else "train"
    public = [(node, one) for one in files for node in one.public]
    widths = {
        f"{one.path.name}:{node.name}": parameters(node)
        for node, one in public
        if isinstance(node, Function) and not is_kernel(node)
    }
    widest = max(widths, key=lambda name: widths[name])
    homes: dict[str, set[str]] = defaultdict(set)
    for one in files:
        for name in one.names:
            homes[name].add(one.package)
    twice = sorted(name for name, where in homes.items() if len(where) > 1)
    named = [n for one in files for n in ast.walk(one.tree) if isinstance(n, ast.ClassDef | Function)]
    named = [node for node in named if not node.name.startswith("_")]
    documented = sum(ast.get_docstring(node) is not None for node in named)
    modules_documented = sum(ast.get_docstring(one.tree) is not None for one in files)
    trenchcoat_help = "import sys; sys.argv = ['trenchcoat', '--help']; import runpy; runpy.run_module('trenchcoat')"
    return [
        ("packages under trenchcoat/", f"{len(packages)}"),
        ("imports between packages, upward ones among them", f"{len(edges)}, {len(upward)}"),
        ("longest file, lines", f"{len(file.text.splitlines())} ({file.path.name})"),
        ("longest function, lines", f"{lengths[longest]} ({longest})"),
        ("code lines", f"{sum(one.code_lines for one in files):,}"),
        ("code lines read by importing the training loop", f"{closure(files, loop):,}"),
        ("most parameters of a public function", f"{widths[widest]} ({widest})"),
        ("docstrings of names without an underscore", f"{100 * documented / len(named):.1f} %"),
        ("module docstrings", f"{100 * modules_documented / len(files):.1f} %"),
        ("public names in two packages", f"{len(twice)} ({', '.join(twice)})"),
        ("CPU seconds of `import trenchcoat`", f"{cpu_seconds(root, 'import trenchcoat'):.2f}"),
        ("CPU seconds of `trenchcoat --help`", f"{cpu_seconds(root, trenchcoat_help):.2f}"),
    ]


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    for what, value in table(root):
        print(f"{what:50} {value}")

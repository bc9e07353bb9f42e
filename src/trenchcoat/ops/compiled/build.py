"""Builds the C++ source once for this machine, and loads it.

The library is kept in ``$XDG_CACHE_HOME/trenchcoat`` (``~/.cache/trenchcoat``) under a name made of everything that
determines it: source, flags, compiler, processor and OpenMP library. It needs no headers but the compiler's own.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

_log = logging.getLogger("trenchcoat")
SOURCE = Path(__file__).parent / "source"
FLAGS = (
    "-O2", "-ftree-vectorize", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-fPIC",
)  # fmt: skip
"""No flag here changes the order of a sum, or assumes that numbers are finite."""
COMPILERS = ("g++", "clang++", "c++")
BUILD_SECONDS = 300.0


class Unavailable(RuntimeError):
    """The kernels cannot be built or loaded on this machine; the message is the reason."""


def compiler() -> str | None:
    """Path of the C++ compiler: the one that the variable CXX names, else the first found; None if there is none."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)


@lru_cache
def library() -> ctypes.CDLL:
    """The kernels, built if they are not in the cache. Safe when several processes start at once.

    Raises:
        Unavailable: no compiler, a failed build, or a cache folder that cannot be written.
    """
    found = compiler()
    if found is None:
        raise Unavailable(f"no C++ compiler was found (CXX, {', '.join(COMPILERS)})")
    openmp = _openmp_in_use()
    target = _cache() / f"kernels-{_key(found, openmp)}.so"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _loaded(target) or _built(found, openmp, target)
    except (OSError, Timeout) as error:
        raise Unavailable(f"the compiled kernels cannot be kept or loaded as {target} ({error})") from error


def _loaded(target: Path) -> ctypes.CDLL | None:
    """The library in `target`; None if there is none, or a damaged one."""
    try:
        return ctypes.CDLL(str(target)) if target.exists() else None
    except OSError as error:
        _log.warning("the CPU kernels in %s cannot be loaded and are built again (%s)", target, error)
        return None


def _built(compiler_path: str, openmp: str | None, target: Path) -> ctypes.CDLL:
    """The library, built by the process that holds the lock first."""
    with FileLock(target.with_suffix(".lock"), timeout=2 * BUILD_SECONDS):
        found = _loaded(target)
        if found is None:
            _build(compiler_path, openmp, target)
            found = ctypes.CDLL(str(target))
    return found


def _cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named or os.path.expanduser("~/.cache")) / "trenchcoat"


def _openmp_in_use() -> str | None:
    """The OpenMP library that PyTorch has loaded, if it is GCC's: two of them would start twice as many threads."""
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line} if maps.exists() else set()
    return next((path for path in sorted(paths) if Path(path).name.startswith("libgomp")), None)


def _key(compiler_path: str, openmp: str | None) -> str:
    parts = [path.name + path.read_text() for path in sorted(SOURCE.iterdir())]
    parts += [*FLAGS, compiler_path, _run(compiler_path, "--version"), str(openmp), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What the processor supports, as far as the system tells: `-march=native` depends on it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build(compiler_path: str, openmp: str | None, target: Path) -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="kernels-") as folder:
        made, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        _run(compiler_path, *FLAGS, "-c", str(SOURCE / "kernels.cpp"), "-o", str(made))
        _run(compiler_path, "-shared", str(made), "-o", str(linked), openmp or "-fopenmp")
        os.replace(linked, target)
    _log.info("built the CPU kernels in %.1f s: %s", time.perf_counter() - began, target)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()[:500]}")
    return done.stdout

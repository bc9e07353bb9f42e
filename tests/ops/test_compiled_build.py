"""Building the compiled kernels: once per machine, safely, and a clear reason where it is not possible."""

from __future__ import annotations

import logging
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from trenchcoat.config import StudentConfig
from trenchcoat.ops.compiled import build
from trenchcoat.students import build_student, fused

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
SOURCE = 'extern "C" { int answer() { return 42; } }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a small source in place of the kernels."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "kernels.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trenchcoat"


def _libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


@needs_compiler
def test_one_build_however_many_ask(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = build._build
    monkeypatch.setattr(build, "_build", lambda *given: (made.append(given), original(*given)))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: build.library.__wrapped__(), range(4)))
    assert [library.answer() for library in found] == [42] * 4
    assert len(made) == 1
    assert build.library.__wrapped__().answer() == 42
    assert len(made) == 1
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


@needs_compiler
def test_another_source_is_another_library(cache: Path) -> None:
    build.library.__wrapped__()
    (build.SOURCE / "kernels.cpp").write_text(SOURCE.replace("42", "43"))
    assert build.library.__wrapped__().answer() == 43
    assert len(_libraries(cache)) == 2


@needs_compiler
def test_a_damaged_library_is_built_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    openmp, found = build._openmp_in_use(), build.compiler()
    assert found is not None
    cache.mkdir(parents=True)
    (cache / f"kernels-{build._key(found, openmp)}.so").write_text("not a library")
    with caplog.at_level(logging.WARNING, logger="trenchcoat"):
        assert build.library.__wrapped__().answer() == 42
    assert "built again" in caplog.text


@needs_compiler
def test_a_failed_build_says_what_the_compiler_said(cache: Path) -> None:
    (build.SOURCE / "kernels.cpp").write_text("#error this line is to blame\n")
    with pytest.raises(build.Unavailable, match="this line is to blame"):
        build.library.__wrapped__()
    assert not _libraries(cache)


@needs_compiler
def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(build.Unavailable, match="cannot be kept or loaded"):
        build.library.__wrapped__()


def test_without_a_compiler_auto_is_chunkwise_and_compiled_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(fused, "_reported", set())
    caches = (build.library, fused._compiled_obstacle)
    from trenchcoat.ops.compiled.check import check

    for cached in (*caches, check):
        cached.cache_clear()
    sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    here = (torch.float32, torch.device("cpu"))
    try:
        with caplog.at_level(logging.INFO, logger="trenchcoat"):
            assert build_student(StudentConfig(impl="auto"), **sizes).implementation(*here) == "chunkwise"
        assert "attention on cpu: chunkwise (no C++ compiler was found (CXX, g++, clang++, c++))" in caplog.text
        with pytest.raises(
            ValueError, match=r"student\.impl is compiled, but no C\+\+ compiler.*student\.impl=chunkwise"
        ):
            build_student(StudentConfig(impl="compiled"), **sizes).implementation(*here)
    finally:
        for cached in (*caches, check):
            cached.cache_clear()


def test_the_compiler_is_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "my-compiler"
    mine.write_text("#!/bin/sh\nexit 3\n")
    mine.chmod(mine.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(mine))
    assert build.compiler() == str(mine)
    with pytest.raises(build.Unavailable, match="my-compiler failed"):
        build.library.__wrapped__()

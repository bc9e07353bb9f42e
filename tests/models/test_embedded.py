"""The embedded text: the same split on every machine, and clear errors when there is nothing to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from trenchcoat.models import embedded
from trenchcoat.models.embedded import split_of, stdlib_documents, teacher_dir


def test_the_split_of_a_file_depends_on_its_path_alone() -> None:
    assert [split_of(path) for path in ("abc.py", "json/decoder.py", "turtle.py")] == ["train"] * 3
    assert [split_of(path) for path in ("ast.py", "asyncio/trsock.py", "curses/ascii.py")] == ["validation"] * 3
    shares = [split_of(f"module_{i}.py") == "validation" for i in range(4000)]
    assert 0.03 < sum(shares) / len(shares) < 0.07


def test_splits_share_no_document_and_come_in_order() -> None:
    train = [name for name, _ in stdlib_documents("train")]
    held = [name for name, _ in stdlib_documents("validation")]
    assert train == sorted(train, key=lambda name: name.split("/"))
    assert set(train).isdisjoint(held)
    assert len(train) > 10 * len(held) > 0


def test_what_is_skipped(tmp_path: Path) -> None:
    body = "x = 1\n" * 50
    for name in ("kept.py", "test/test_kept.py", "site-packages/other.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(body)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" + body.encode())

    def found(**options: bool) -> set[str]:
        names: set[str] = set()
        for split in ("train", "validation"):
            try:
                names |= {name for name, _ in stdlib_documents(split, root=tmp_path, **options)}
            except FileNotFoundError:
                continue
        return names

    assert found() == {"kept.py"}
    assert found(tests=True) == {"kept.py", "test/test_kept.py"}


def test_an_interpreter_without_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Python source found under .*point data.path at a text file"):
        list(stdlib_documents("train", root=tmp_path))


def test_a_missing_teacher_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "TEACHER_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match="the embedded teacher is missing"):
        teacher_dir()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert teacher_dir() == tmp_path

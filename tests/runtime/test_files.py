"""One command at a time in a folder: the lock names its holder, and is free again when the holder dies; what is
written can be read.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trenchcoat.runtime import files
from trenchcoat.runtime.files import InUse, SaveError, atomic_directory, holder, locked, save_tensors

HOLD = """
import sys, time
from trenchcoat.runtime.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_command_is_refused_at_once_and_names_the_holder(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert holder(folder) is None
    assert not folder.exists()
    with locked(folder):
        who = holder(folder)
        assert who is not None
        assert who.startswith(f"process {os.getpid()} on {platform.node()} since 20")
        with pytest.raises(InUse, match=r"is in use by process \d+ on .* since 20.*: .*Wait for it, stop it, or give"):
            locked(folder).__enter__()
        assert holder(folder) == who
    assert holder(folder) is None
    with locked(folder):
        pass


def test_a_killed_holders_lock_is_free(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert (holder(tmp_path) or "").startswith(f"process {process.pid} on ")
    process.kill()
    process.wait()
    process.stdout.close()
    assert holder(tmp_path) is None
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot save .*file.*\.lock"), locked(tmp_path / "file" / "run"):
        pass


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from trenchcoat.runtime.files import atomic_directory, atomic_file\n"
        "folder = Path(sys.argv[1])\n"
        "with atomic_file(folder / 'a.json') as one, atomic_directory(folder / 'deep' / 'b') as two:\n"
        "    one.write_text('half'); (two / 'c').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.rglob(f"{files.PARTIAL_PREFIX}*"))
    assert len(left) == 2
    with files.atomic_file(tmp_path / "a.json") as own:  # of the same name: only that one
        own.write_text("whole")
        with files.atomic_file(tmp_path / "a.json") as other:  # a writer that lives is left alone
            other.write_text("whole")
    assert [path.parent.name for path in tmp_path.rglob(f"{files.PARTIAL_PREFIX}*")] == ["deep"]
    with files.locked(tmp_path):
        assert not [*tmp_path.rglob(f"{files.PARTIAL_PREFIX}*")]
    assert (tmp_path / "a.json").read_text() == "whole"


def test_weights_can_be_read_by_whoever_may_read_other_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_UMASK", 0o027)
    save_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(3)})
    with atomic_directory(tmp_path / "model") as partial:
        save_file({"a": torch.zeros(3)}, partial / "model.safetensors")
        (partial / "config.json").write_text("{}")
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 3
    assert {path.stat().st_mode & 0o777 for path in made} == {0o640}

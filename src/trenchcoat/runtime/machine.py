"""Checks that this machine can run: interpreter, library versions, cores, memory, disk."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from trenchcoat.config import UserError
from trenchcoat.config.package import DISTRIBUTION
from trenchcoat.config.units import GIB, tera


def check_machine(directory: Path, *, memory_gib: float = 1.5, disk_gib: float = 0.5) -> list[str]:
    """Sentences about this machine; raises ``UserError`` naming what is missing and the fix.

    ``directory`` is the run's folder (it need not exist); ``memory_gib`` and ``disk_gib`` must be free.
    """
    wrong = _unmet_requirements()
    memory, disk = free_memory(), free_disk(directory)
    if memory is not None and memory < memory_gib * GIB:
        wrong.append(f"{memory / GIB:.1f} GiB of memory are free, {memory_gib:g} are needed; close other programs")
    if disk < disk_gib * GIB:
        wrong.append(
            f"{disk / GIB:.2f} GiB of disk are free at {directory}, {disk_gib:g} are needed; choose another run.dir"
        )
    if wrong:
        raise UserError("this machine is not ready: " + "; ".join(wrong))
    held = "unknown" if memory is None else f"{memory / GIB:.1f} GiB"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {metadata.version('transformers')}, peft {metadata.version('peft')}",
        f"{os.cpu_count()} cores ({torch.get_num_threads()} threads in use), {held} of memory and "
        f"{disk / GIB:.1f} GiB of disk free, GPUs: {', '.join(gpus) or 'none'}",
    ]


def _unmet_requirements() -> list[str]:
    """Requirements of the installed package that the environment does not meet."""
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    wrong = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement} is required, {found} is installed; run `pip install '{requirement}'`")
    return wrong


def free_memory() -> int | None:
    """Bytes of available memory; None where the system does not report it."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def require_disk(needs: Sequence[tuple[Path, float, str]]) -> None:
    """Raise ``UserError`` when what will be written, as (folder, bytes, what it is), does not fit on its disk.

    What is in a folder already counts as written.
    """
    disks: dict[int, list[tuple[Path, float, str]]] = {}
    for need in needs:
        disks.setdefault(_existing(need[0]).stat().st_dev, []).append(need)
    for found in disks.values():
        folder = found[0][0]
        written = sum(used_disk(each) for each in {each for each, _, _ in found})
        needed, free = sum(size for _, size, _ in found) - written, free_disk(folder)
        if needed > free:
            parts = ", ".join(f"{what} {tera(size)}" for _, size, what in found)
            raise UserError(
                f"{tera(needed)} of disk are needed at {folder} ({parts}; {tera(written)} is written), {tera(free)} "
                "is free: free some space, choose another run.dir, or keep fewer checkpoints (keep_checkpoints=1)"
            )


def used_disk(folder: Path) -> int:
    """Bytes of the files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def free_disk(directory: Path) -> int:
    """Bytes free on the disk that holds, or will hold, ``directory``."""
    return shutil.disk_usage(_existing(directory)).free


def _existing(directory: Path) -> Path:
    """The nearest folder that exists at or above ``directory``."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    return place

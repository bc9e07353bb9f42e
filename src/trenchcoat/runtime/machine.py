"""Checks that this machine can run: interpreter, library versions, cores, memory, disk."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from trenchcoat.config import UserError
from trenchcoat.config.units import GIB


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
        required = metadata.requires("trenchcoat") or []
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


def free_disk(directory: Path) -> int:
    """Bytes free on the disk that holds, or will hold, ``directory``."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free

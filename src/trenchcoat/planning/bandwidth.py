"""Measure this machine's disk bandwidth and FLOP/s, to choose the length of passes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from trenchcoat.runtime.devices import device_peak
from trenchcoat.runtime.files import partial_path, saving
from trenchcoat.runtime.machine import free_disk

PROBE_BYTES = 64 << 20
SHARE_OF_PEAK = 0.4
"""Fraction of a device's peak, or of a large matrix product's speed, that training reaches."""


def _forget(descriptor: int) -> None:
    """Ask the system to drop a file's pages from its cache, if supported."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_rate(folder: Path, size: int = PROBE_BYTES) -> float:
    """Write bandwidth of ``folder``'s disk in bytes/s; raises ``SaveError`` if it is not writable."""
    path = partial_path(folder / "probe")
    size = max(1, min(size, free_disk(folder) // 4))  # use at most a quarter of the free space
    piece = os.urandom(min(1 << 20, size))
    with saving(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            with open(path, "wb") as file:
                for _ in range(size // len(piece)):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            return size / max(time.perf_counter() - began, 1e-9)
        finally:
            path.unlink(missing_ok=True)


def read_rate(files: Sequence[Path], size: int = PROBE_BYTES) -> float:
    """Read bandwidth in bytes/s from the start of ``files``, bypassing the page cache where possible."""
    left, seconds, done = size, 0.0, 0
    for file in files:
        if left <= 0:
            break
        with open(file, "rb", buffering=0) as opened:
            _forget(opened.fileno())
            began = time.perf_counter()
            while left > 0 and (piece := opened.read(min(left, 4 << 20))):
                left, done = left - len(piece), done + len(piece)
            seconds += time.perf_counter() - began
    return done / max(seconds, 1e-9)


def flop_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that training reaches on ``device``: a fraction of its known peak, or of a large matrix product."""
    if device.type == "cuda":
        peak = device_peak(torch.cuda.get_device_name(device), dtype)
        if peak is not None:
            return SHARE_OF_PEAK * peak
    size = 4096 if device.type == "cuda" else 768
    a = torch.ones(size, size, dtype=dtype, device=device)
    a @ a
    began = time.perf_counter()
    for _ in range(3):
        product = a @ a
    float(product[0, 0])
    return SHARE_OF_PEAK * 3 * 2.0 * size**3 / max(time.perf_counter() - began, 1e-9)

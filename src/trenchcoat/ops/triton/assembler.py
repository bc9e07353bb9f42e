"""Which assembler (ptxas) turns the kernels into machine code.

On Hopper triton 3.6 and 3.7.1 use the ptxas of CUDA 12.8, which miscompiles a kernel: the upper half of a shared-memory
descriptor is computed from the register of another number, and the first launch ends in an illegal memory access. The
one that Triton has for newer GPUs, of CUDA 12.9 or 13.1, does not (`scripts/compile_kernels.py` looks for it).
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import lru_cache
from threading import Lock

import torch
import triton
from triton import knobs
from triton.backends.nvidia import compiler

_log = logging.getLogger(__name__)
Release = tuple[int, int]
SETTING = "TRITON_PTXAS_PATH"
HOPPER = 9
"""Major compute capability of the GPUs whose matrix instructions are concerned."""
LEAST: Release = (12, 9)
"""The oldest release without this fault; 12.9 and 13.1 have been looked at."""
VERSION = triton.__version__
_choosing = Lock()


@lru_cache
def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot be compiled for `device`; None if they can, with an assembler that has been chosen.

    The choice is Triton's own setting (``TRITON_PTXAS_PATH``), so it applies to every kernel that this process, and
    those it starts, compile from then on. Where that is set already it stays.
    """
    if not is_hopper(device):
        return None
    with _choosing:
        return choose()


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is a GPU of NVIDIA's with compute capability 9."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] == HOPPER


def choose() -> str | None:
    """Use an assembler without the fault for Hopper, or say why there is none."""
    usual, asked = compiler.get_ptxas(10 * HOPPER), os.environ.get(SETTING)
    if _release(usual.version) >= LEAST:
        return None
    wrong = f"ptxas {usual.version} miscompiles the kernels"
    if asked is not None:
        run = "" if asked == usual.path else ", which cannot be run, so that Triton takes its own"
        return f"{SETTING} is {asked}{run}, and {wrong}; it takes one of CUDA {_text(LEAST)} or newer"
    try:
        other, newest = knobs.nvidia.ptxas_blackwell, driver_release()
    except (OSError, RuntimeError) as error:
        return f"Triton's {wrong}, and there is no other ({error}); set {SETTING} to one from CUDA {_text(LEAST)} on"
    if _release(other.version) < LEAST or _release(other.version)[0] > newest[0]:
        return (
            f"Triton's {wrong}, and its {other.version} for newer GPUs does not go with this driver (CUDA "
            f"{_text(newest)}); set {SETTING} to the ptxas of a CUDA from {_text(LEAST)} to {newest[0]}.x"
        )
    knobs.nvidia.ptxas = other.path
    for cached in (compiler.get_ptxas_version, compiler.CUDABackend.hash):  # stored programs are named after it
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    _log.info("Triton kernels are assembled by ptxas %s, as %s", other.version, wrong)
    return None


def driver_release() -> Release:
    """The newest release of CUDA whose programs the driver runs; OSError if there is no driver."""
    version = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
        raise OSError("the CUDA driver does not say its version")
    return version.value // 1000, version.value % 1000 // 10  # 13020: CUDA 13.2


def _release(version: str) -> Release:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _text(release: Release) -> str:
    return ".".join(map(str, release))

"""Which assembler turns the kernels into machine code.

On Hopper Triton (3.6 and 3.7.1) uses the ptxas of CUDA 12.8, which miscompiles the kernels: the upper half of a
tensor core's shared-memory address is read from the register of another number, and the first launch ends with an
illegal memory access. CUDA 12.9's and 13.1's are correct; Triton has one of them for newer devices.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import lru_cache

import torch
from triton import knobs
from triton.backends.nvidia import compiler

_log = logging.getLogger(__name__)
Release = tuple[int, int]
SETTING = "TRITON_PTXAS_PATH"
HOPPER = 9
"""Major compute capability of the devices whose matrix instructions are concerned."""
CORRECT: Release = (12, 9)
"""The oldest release that is known to be correct."""


@lru_cache
def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot be compiled for `device`; None if they can, with an assembler that has been chosen.

    The choice is Triton's own setting (``TRITON_PTXAS_PATH``), so it applies to every kernel that this process and its
    children compile from then on. Where that is set already it stays.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return None
    return choose(driver_release())


def driver_release() -> Release:
    """The newest release of CUDA whose programs the driver runs."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10  # 13020: CUDA 13.2


def choose(driver: Release) -> str | None:
    """Use a correct assembler for Hopper, or say why there is none. `driver`: the release of CUDA that it supports."""
    usual, other = knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell
    if _release(usual.version) >= CORRECT:
        return None
    wrong = f"ptxas {usual.version} miscompiles the kernels"
    if SETTING in os.environ:
        return f"{SETTING} is {usual.path}, and {wrong}; it takes one of CUDA {_text(CORRECT)} or newer"
    if _release(other.version) < CORRECT or _release(other.version)[0] > driver[0]:
        return (
            f"Triton's {wrong}, and its {other.version} for newer GPUs does not go with this driver (CUDA "
            f"{_text(driver)}); set {SETTING} to the ptxas of a CUDA from {_text(CORRECT)} to {driver[0]}.x"
        )
    knobs.nvidia.ptxas = other.path
    for cached in (compiler.get_ptxas_version, compiler.CUDABackend.hash):  # stored programs are named after it
        cached.cache_clear()
    _log.info("Triton kernels are assembled by ptxas %s, as %s", other.version, wrong)
    return None


def _release(version: str) -> Release:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _text(release: Release) -> str:
    return ".".join(map(str, release))

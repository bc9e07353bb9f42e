"""Peak FLOP/s of devices."""

from __future__ import annotations

import re

import torch

_PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"GB200", 2500.0, 80.0),
    (r"B200", 2250.0, 75.0),
    (r"B100", 1750.0, 60.0),
    (r"H200 NVL", 835.5, 60.0),
    (r"H100 NVL", 835.5, 60.0),
    (r"H100 PCIe", 756.0, 51.0),
    (r"GH200|H200|H100|H800", 989.4, 66.9),
    (r"H20\b", 148.0, 44.0),
    (r"A100|A800", 312.0, 19.5),
    (r"L40S", 362.1, 91.6),
    (r"L40\b", 181.0, 90.5),
    (r"L4\b", 121.0, 30.3),
    (r"A40\b", 149.7, 37.4),
    (r"A10G", 70.0, 35.0),
    (r"A10\b", 125.0, 31.2),
    (r"RTX 6000 Ada", 364.2, 91.1),
    (r"RTX A6000|A6000", 154.8, 38.7),
    (r"RTX 5090\b", 209.5, 104.8),
    (r"RTX 4090\b", 165.2, 82.6),
    (r"RTX 3090\b", 71.0, 35.6),
    (r"MI300X", 1307.4, 163.4),
    (r"MI250X", 383.0, 47.9),
)
"""(pattern in the device's name, dense bfloat16 TFLOP/s with float32 accumulation, float32 TFLOP/s without tensor
cores)."""


def device_peak(name: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Peak FLOP/s of a device by its name (``torch.cuda.get_device_name()``, ``H100``), dense; None if unknown.

    bfloat16 and float16 from the vendors' data sheets, without sparsity; float32 without tensor cores, which is what
    PyTorch uses unless TF32 is allowed.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    for pattern, half, single in _PEAKS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})", name, flags=re.IGNORECASE):
            return (single if dtype == torch.float32 else half) * 1e12
    return None

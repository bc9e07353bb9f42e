"""How many layers fit in a block of attention transfer: its memory on the device and on the host.

Peak on the device: the weights of the block's k layers, the activations of one of them (layers learn separately, so
nothing is kept between layers), and the students of all k in float32 with gradients, AdamW's moments and the best
weights so far. On the host, per process: the weights of a block while they are copied to the GPU, and those of the next
block while this one trains; without a GPU, both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trenchcoat.config import UserError
from trenchcoat.config.units import gib
from trenchcoat.models.flops import student_parameters
from trenchcoat.models.shapes import Shapes
from trenchcoat.planning.footprint import Layout, StepSizes, footprint
from trenchcoat.planning.plan import RESERVE_BYTES, RESERVE_SHARE, with_reserve

WEIGHTS_SHARE = 0.5
"""Fraction of a process's host memory available to block weights; the rest is for hidden states."""


@dataclass(frozen=True, kw_only=True)
class BlockSize:
    """Blocks of ``layers`` layers; the last one may have fewer."""

    layers: int
    """k"""
    blocks: int
    device_bytes: float
    """Peak bytes on a GPU (without a GPU, on the host), without reserve."""
    host_bytes: float
    """Bytes of a process's host memory: weights copied or prefetched and, without a GPU, the block being trained."""


def layer_bytes(shapes: Shapes, dtype_bytes: int = 2) -> float:
    """Bytes of one layer's weights."""
    return float(dtype_bytes * shapes.layer_parameters)


def block_bytes(step: StepSizes, layers: int) -> float:
    """Bytes on the device while ``layers`` layers of the step's model are trained.

    Kept layers and groups count like the others. Raises ``ValueError`` for a student that does not fit the
    model.
    """
    alone = replace(step.shapes, layers=layers, embedding_parameters=0, head_parameters=0, other_parameters=0)
    linear = replace(step.student, keep=(), keep_softmax=())
    best = 4.0 * student_parameters(alone, linear)
    return best + footprint(replace(step, shapes=alone, student=linear), Layout()).total


def measure_block(step: StepSizes, layers: int, *, gpu: bool) -> BlockSize:
    """Blocks of ``layers`` layers, whether they fit or not; ``gpu``: the device is a GPU, not the host."""
    layers = min(layers, step.shapes.layers)
    blocks = math.ceil(step.shapes.layers / layers)
    device = block_bytes(step, layers)
    weights = layers * layer_bytes(step.shapes, step.dtype_bytes)
    host = weights if gpu else device + (weights if blocks > 1 else 0.0)
    return BlockSize(layers=layers, blocks=blocks, device_bytes=device, host_bytes=host)


def choose_block_size(
    step: StepSizes, *, gpu_memory: float | None, host_memory: float, size: int | None = None
) -> BlockSize:
    """The largest blocks that fit, all about equally large; or of ``size`` layers if given (`blocks.size`).

    ``gpu_memory`` and ``host_memory`` are the bytes available to a process; without a GPU the former is None. Weights
    use at most ``WEIGHTS_SHARE`` of the host's, unless a single layer needs more. Raises ``UserError`` with the
    figures if the given size, or a single layer, does not fit.
    """

    def fits(block: BlockSize, share: float) -> bool:
        """Whether it fits the GPU and this fraction of the host's memory."""
        on_gpu = gpu_memory is None or with_reserve(block.device_bytes) <= gpu_memory
        return on_gpu and block.host_bytes <= share * host_memory

    if size is None:
        for blocks in range(1, step.shapes.layers + 1):
            found = measure_block(step, math.ceil(step.shapes.layers / blocks), gpu=gpu_memory is not None)
            if fits(found, WEIGHTS_SHARE):
                return found
    last = measure_block(step, size or 1, gpu=gpu_memory is not None)
    if not fits(last, 1.0):
        what = f"blocks.size={size}" if size is not None else "a block of one layer"
        raise UserError(_too_large(last, gpu_memory, host_memory, what))
    return last


def _too_large(block: BlockSize, gpu_memory: float | None, host_memory: float, what: str) -> str:
    short_on_gpu = gpu_memory is not None and with_reserve(block.device_bytes) > gpu_memory
    if block.layers > 1:
        fix = "take blocks of fewer layers (blocks.size)"
    else:
        fix = "lower transfer.batch_size or data.seq_len" if short_on_gpu or gpu_memory is None else "free memory"
    if short_on_gpu:
        return (
            f"{what} needs {gib(block.device_bytes)} on the GPU, plus a reserve of {gib(RESERVE_BYTES)} and "
            f"{RESERVE_SHARE:.0%}; {gib(gpu_memory or 0.0)} is available: {fix}"
        )
    return (
        f"{what} needs {gib(block.host_bytes)} of host memory per process, including prefetched weights; "
        f"{gib(host_memory)} is available: {fix}"
    )

"""How many layers a block of attention transfer holds: what a block needs on the device and on the host.

On the device, at the worst moment: the weights of the block's k layers, the activations of one of them (layers learn by
themselves, nothing is kept from layer to layer), and the students of all k in float32 with gradient, AdamW's moments
and the best weights so far. On the host, for each process: the weights of a block on their way to the GPU, the next
block's while this one is at work; where the host is the device, both.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from trenchcoat.config import StudentConfig, TransferConfig, UserError
from trenchcoat.config.units import gib
from trenchcoat.models.flops import student_parameters
from trenchcoat.models.shapes import Shapes
from trenchcoat.planning.footprint import Layout, footprint
from trenchcoat.planning.plan import RESERVE_BYTES, RESERVE_SHARE, with_reserve

HOST_SHARE = 0.5
"""Of the host's memory that weights of blocks may take; the rest is for hidden states."""


@dataclass(frozen=True, kw_only=True)
class BlockSize:
    """Blocks of ``layers`` layers; the last one may have fewer."""

    layers: int
    """k"""
    blocks: int
    device_bytes: float
    """On a GPU at its worst moment, without reserve; without a GPU, of the host."""
    host_bytes: float
    """Of the host's memory, a process: weights on their way or read ahead, and, without a GPU, the block at work."""


def layer_bytes(shapes: Shapes, dtype_bytes: int = 2) -> float:
    """Weights of one layer."""
    return float(dtype_bytes * shapes.layer_parameters)


def block_bytes(
    shapes: Shapes,
    student: StudentConfig,
    transfer: TransferConfig,
    layers: int,
    *,
    seq_len: int,
    dtype_bytes: int = 2,
) -> float:
    """Bytes on the device while ``layers`` layers learn. ``ValueError`` for a student that does not fit the model.

    Layers that `student.keep_softmax` leaves as they are count like the others.
    """
    alone = dataclasses.replace(shapes, layers=layers, embedding_parameters=0, head_parameters=0, other_parameters=0)
    linear = dataclasses.replace(student, keep_softmax=())
    best = 4.0 * student_parameters(alone, linear)
    return best + footprint(alone, linear, transfer, Layout(), seq_len=seq_len, dtype_bytes=dtype_bytes).total


def measure_block(
    shapes: Shapes,
    student: StudentConfig,
    transfer: TransferConfig,
    layers: int,
    *,
    seq_len: int,
    gpu: bool,
    dtype_bytes: int = 2,
) -> BlockSize:
    """Blocks of ``layers`` layers, whether they fit or not; ``gpu``: there is one beside the host."""
    layers = min(layers, shapes.layers)
    blocks = math.ceil(shapes.layers / layers)
    device = block_bytes(shapes, student, transfer, layers, seq_len=seq_len, dtype_bytes=dtype_bytes)
    weights = layers * layer_bytes(shapes, dtype_bytes)
    host = weights if gpu else device + (weights if blocks > 1 else 0.0)
    return BlockSize(layers=layers, blocks=blocks, device_bytes=device, host_bytes=host)


def choose_block_size(
    shapes: Shapes,
    student: StudentConfig,
    transfer: TransferConfig,
    *,
    seq_len: int,
    gpu_memory: float | None,
    host_memory: float,
    dtype_bytes: int = 2,
    size: int | None = None,
) -> BlockSize:
    """The largest blocks that fit, all of about the same size; ``size`` layers where that is given (`blocks.size`).

    ``gpu_memory`` and ``host_memory`` are bytes that a process can have; without a GPU the former is None. Weights take
    at most ``HOST_SHARE`` of the host's, unless a single layer needs more. Raises ``UserError`` with the figures when
    the given size, or a single layer, does not fit.
    """

    def measured(layers: int) -> BlockSize:
        gpu, size = gpu_memory is not None, {"seq_len": seq_len, "dtype_bytes": dtype_bytes}
        return measure_block(shapes, student, transfer, layers, gpu=gpu, **size)

    def fits(block: BlockSize, share: float) -> bool:
        on_gpu = gpu_memory is None or with_reserve(block.device_bytes) <= gpu_memory
        return on_gpu and block.host_bytes <= share * host_memory

    if size is not None:
        given = measured(size)
        if not fits(given, 1.0):
            raise UserError(_too_large(given, gpu_memory, host_memory, f"blocks.size={size}"))
        return given
    for blocks in range(1, shapes.layers + 1):
        found = measured(math.ceil(shapes.layers / blocks))
        if fits(found, HOST_SHARE):
            return found
    single = measured(1)
    if not fits(single, 1.0):
        raise UserError(_too_large(single, gpu_memory, host_memory, "a block of one layer"))
    return single


def _too_large(block: BlockSize, gpu_memory: float | None, host_memory: float, what: str) -> str:
    mend = (
        "take blocks of fewer layers (blocks.size)" if block.layers > 1 else "lower transfer.batch_size or data.seq_len"
    )
    if gpu_memory is not None and with_reserve(block.device_bytes) > gpu_memory:
        return (
            f"{what} needs {gib(block.device_bytes)} on the GPU, beside a reserve of {gib(RESERVE_BYTES)} and "
            f"{RESERVE_SHARE:.0%}, and {gib(gpu_memory)} are there: {mend}"
        )
    if block.layers == 1 and gpu_memory is not None:
        mend = "free memory"
    return (
        f"{what} needs {gib(block.host_bytes)} of host memory a process, with what is read ahead, and "
        f"{gib(host_memory)} can be had: {mend}"
    )

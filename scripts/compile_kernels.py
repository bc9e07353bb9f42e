"""Compile every Triton kernel for sm_90 without a GPU, and print what the assembler says of each.

    python scripts/compile_kernels.py [--dtype bfloat16] [--out benchmarks/kernels_sm90.json]

Columns: registers of a thread, bytes of them spilled to local memory (stores), shared memory of a program, warps, and
matrix instructions in the program. Shapes: 32 heads, 8 key/value heads, head dim 128, feature dim 64, window 64.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from trenchcoat.ops import triton_backward, triton_decode, triton_forward, triton_transfer
from trenchcoat.ops import triton_launch as launch
from trenchcoat.ops.state import Rule

HEADS, KV_HEADS, DIM, COLUMNS, WINDOW, TOKENS = 32, 8, 128, 64, 64, 8192


class Pretended:
    """A driver for a GPU that is not there: enough for compiling."""

    def get_current_target(self) -> GPUTarget:
        """Hopper."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors' addresses come from."""
        return torch.device("cpu")


def call_of(kind: str, dtype: torch.dtype) -> launch.Call:
    """A call of the shapes above, on tensors without storage to speak of."""
    q = torch.empty(1, HEADS, TOKENS, DIM, dtype=dtype)
    k, v = (torch.empty(1, KV_HEADS, TOKENS, DIM, dtype=dtype) for _ in range(2))
    maps = [launch.FusedMap("hedgehog", torch.empty(HEADS, DIM, COLUMNS)) for _ in range(2)]
    rule = Rule(kind=kind, window=WINDOW, scale=DIM**-0.5)  # type: ignore[arg-type]
    return launch.Call(rule, q, k, v, maps[0], maps[1], torch.empty(HEADS), None, None, None, None, launch.Spans())


def kernels(call: launch.Call) -> dict[str, Any]:
    """Name -> compiled kernel."""
    c, x = call.constants(), call.tensor
    opts: dict[str, Any] = {**launch.options(c), "grid": (1,)}
    programs = HEADS * call.groups
    sums = torch.empty(programs, 2 * COLUMNS, DIM), torch.empty(programs, 2 * COLUMNS)
    row, y = torch.empty(1, HEADS, TOKENS), torch.empty_like(call.q)
    wide = torch.empty(1, HEADS, TOKENS, DIM)
    column = torch.empty(1, HEADS, TOKENS, dtype=torch.int32)
    shares, share = (torch.empty(programs, DIM, COLUMNS), None), torch.empty(programs)
    q, k, v, query, key = x(call.q), x(call.k), x(call.v), call.operands(call.query), call.operands(call.key)
    tail, numbers, none = call.tail(), call.numbers(), (None, 0, 0, 0)
    result, both = (x(row), x(row), x(column)), (share, share)
    made = {
        "far_sums": triton_forward.far_sums.warmup(
            k, v, key, sums, call.place(), HEADS, KV_HEADS, call.span, 1, c, **opts
        ),
        "outputs": triton_forward.outputs.warmup(
            q, k, v, x(y), query, key, sums, (None, None), *tail, *numbers, c, SAVE=False, **opts
        ),
        "query_gradients": triton_backward.query_gradients.warmup(
            q, k, v, x(y), x(y), query, key, sums, x(row), result, x(wide), shares, both, (None, None),
            *tail, *numbers, c, **opts,
        ),
        "gradient_sums": triton_backward.gradient_sums.warmup(
            q, x(y), query, x(row), x(row), sums, call.place(), HEADS, call.span, 1, c, GIVEN=False, **opts
        ),
        "key_gradients": triton_backward.key_gradients.warmup(
            q, k, v, x(y), query, key, sums, x(row), x(row), result, x(wide), x(wide), shares,
            *tail, *numbers, c, INPUTS=True, GIVEN=False, **opts,
        ),
        "key_gradients (transfer)": triton_backward.key_gradients.warmup(
            q, k, v, x(y), query, key, sums, none, none, (x(row), none, none), none, none, shares,
            *tail, *numbers, c, INPUTS=False, GIVEN=True, **opts,
        ),
        "transfer_outputs": triton_transfer.transfer_outputs.warmup(
            q, k, v, x(y), query, key, sums, x(y), x(row), both, shares, *tail, *numbers, 1.0, c, LEARN=True, **opts
        ),
    }  # fmt: skip
    return {**made, **decoding(call)}


def decoding(call: launch.Call) -> dict[str, Any]:
    """The two kernels of a decode step of one row and one token."""
    c, x = call.constants(), call.tensor
    opts: dict[str, Any] = {"num_stages": 1, "grid": (1,)}
    q, k = (torch.empty(1, heads, 1, DIM, dtype=call.q.dtype) for heads in (HEADS, KV_HEADS))
    ring = torch.empty(1, KV_HEADS, 2 * WINDOW, DIM, dtype=call.q.dtype)
    seen, following, none = torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.int32), (None, 0, 0, 0)
    far = torch.empty(HEADS, 2 * COLUMNS, DIM), torch.empty(HEADS, 2 * COLUMNS)
    near = torch.empty(HEADS, DIM), torch.empty(HEADS)
    sizes = triton_decode.sizes_of(call, 1, 1)
    kept = torch.empty(HEADS, sizes.room, 2 * COLUMNS, dtype=triton_decode.leaving_dtype(call))
    gone = kept, torch.empty_like(ring), torch.empty(HEADS, 2 * COLUMNS)
    maps = [(m.matrix, m.matrix, None) for m in (call.query, call.key) if m is not None]
    held = [x(ring), x(ring), none, none]
    tiles = {"BLOCK_T": sizes.tokens, "SLOTS": sizes.slots}
    counts = (HEADS, KV_HEADS, HEADS, sizes.room)
    columns = triton_decode.slice_columns(DIM, HEADS, launch.wanted_programs(q.device))
    return {
        "prepare": triton_decode.prepare.warmup(
            x(q), x(k), x(k), *held, *maps, far, near, near[0], gone, seen, following, None, call.ratio, None, 1, 1,
            *counts, 8, 32, *call.numbers(), c, ROWS=sizes.near, QUERIES=sizes.queries, TILE=sizes.ring,
            BLOCK_L=sizes.leaving, num_warps=8, **tiles, **opts,
        ),
        **{
            f"read ({n} columns)": triton_decode.read.warmup(
                x(k), x(k), x(q), *held, far, near, near[0], gone, seen, following, None, 1, *counts, c,
                ROWS=sizes.read_rows, BLOCK_L=sizes.read_leaving, COLUMNS=n, num_warps=4, **tiles, **opts,
            )
            for n in sorted({columns, triton_decode.WIDEST_SLICE})
        },
    }  # fmt: skip


def report(kernel: Any) -> dict[str, int]:
    """What the assembler says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(source) + ".cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    assert spilled is not None
    return {
        "registers": int(registers[1]), "spilled_bytes": int(spilled[1]), "shared_bytes": int(kernel.metadata.shared),
        "warps": int(kernel.metadata.num_warps), "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
    }  # fmt: skip


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--kinds", nargs="*", default=["terrace", "sliding", "linear"])
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    driver.set_active(Pretended())
    launch.wanted_programs = lambda device: 264  # type: ignore[assignment]
    found: dict[str, dict[str, dict[str, int]]] = {}
    print(f"{'kernel':<34}{'registers':>10}{'spilled':>9}{'shared':>8}{'warps':>6}{'wgmma':>7}{'mma':>5}")
    for kind in args.kinds:
        found[kind] = {
            name: report(kernel) for name, kernel in kernels(call_of(kind, getattr(torch, args.dtype))).items()
        }
        for name, row in found[kind].items():
            numbers = [row[n] for n in ("registers", "spilled_bytes", "shared_bytes", "warps", "wgmma", "mma")]
            widths = (10, 9, 8, 6, 7, 5)
            cells = "".join(f"{n:>{w}}" for n, w in zip(numbers, widths, strict=True))
            print(f"{kind + ' ' + name:<34}{cells}", flush=True)
    if args.out is not None:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

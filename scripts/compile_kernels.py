"""Compile the Triton kernels for a GPU, which need not be present, and print statistics of the compiled programs.

    python scripts/compile_kernels.py [--capability 90] [--dtype bfloat16] [--out benchmarks/kernels_sm90.json]

The kernels are those launched by the passes of a layer (outputs, gradients, attention transfer, a decode step),
recorded while these run on empty tensors: 32 heads, 8 key/value heads, head dim 128, feature dim 64, window 64, 2048
tokens.

Columns: registers per thread; bytes of its stack, for registers that are too many; shared memory; warps; addresses of
tensor cores' operands that are wrong and registers that are written too early (:func:`wrong_addresses` and
:func:`early_writes`; there should be none of either); and per iteration of the longest loop, the cycles a
multiprocessor needs for its matrix instructions, for issuing all instructions (four per cycle), and for its traffic
with shared memory, local memory and L1 cache (128 bytes per cycle). These are lower bounds, counted from the machine
code, at Hopper's rates: 4096 bfloat16 operations per cycle.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from trenchcoat.ops import HeadWeights, Rule, StateSizes, StudentState, Tokens
from trenchcoat.ops.state import FusedMap
from trenchcoat.ops.triton import assembler, attention, crossent_launch, decode, launch

HEADS, KV_HEADS, DIM, COLUMNS, WINDOW, TOKENS = 32, 8, 128, 64, 64, 2048
OPERATIONS, BYTES, ISSUED = 4096, 128, 4
"""Per multiprocessor and cycle."""
SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Maximum bytes of shared memory per program, by compute capability."""


class FakeDriver:
    """A fake driver for a GPU that is not present: enough for compiling."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The target GPU."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """The first device."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The device of the tensors."""
        return torch.device("cpu")


def recorded(work: Callable[[], object]) -> dict[str, Any]:
    """Name -> compiled kernel, for all launches of `work`; none is run."""
    found: dict[str, Any] = {}
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        """Compile as for a launch, and store the kernel."""
        kernel = run(self, *args, grid=(1,), warmup=True, **keywords)
        name = self.fn.__name__
        kept = [k for k in found if k.split(" ")[0] == name]
        if all(found[k].asm["cubin"] != kernel.asm["cubin"] for k in kept):
            found[name if not kept else f"{name} ({len(kept) + 1})"] = kernel
        return kernel

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        work()
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return found


class Layer:
    """One layer's attention on empty tensors."""

    def __init__(self, kind: str, dtype: torch.dtype, *, dim: int, columns: int, window: int) -> None:
        def empty(heads: int) -> torch.Tensor:
            """Vectors of `heads` heads."""
            return torch.empty(1, heads, TOKENS, dim, dtype=dtype).requires_grad_()

        self.tokens = Tokens(empty(HEADS), empty(KV_HEADS), empty(KV_HEADS))
        maps = [FusedMap("softmax", True, torch.empty(HEADS, dim, columns).requires_grad_()) for _ in range(2)]
        self.maps, self.heads = (maps[0], maps[1]), HeadWeights(torch.empty(HEADS).requires_grad_())
        self.rule = Rule(kind=kind, window=window, scale=dim**-0.5)  # type: ignore[arg-type]

    def training(self) -> None:
        """Outputs and every gradient."""
        y, _ = attention.attend(self.tokens, self.maps, self.heads, self.rule)
        y.backward(torch.empty_like(y))

    def reading(self) -> None:
        """Outputs without gradients."""
        with torch.no_grad():
            attention.attend(self.tokens, self.maps, self.heads, self.rule)

    def transfer(self) -> None:
        """Attention transfer."""
        y = torch.empty_like(self.tokens.q_BHTD)
        attention.transfer_error(self.tokens, y, self.maps, self.heads, self.rule)

    def crossing(self) -> None:
        """Attention transfer's cross-entropy of attention rows."""
        with torch.no_grad():
            crossent_launch.cross_entropy(self.tokens, self.maps, self.heads, self.rule)

    def decoding(self) -> None:
        """A decode step."""
        q, features = self.tokens.q_BHTD, self.maps[0].features
        dim = q.shape[3]
        sizes = StateSizes(kv_heads=KV_HEADS, key_maps=HEADS, key_dim=dim, value_dim=dim, features=features)
        state = StudentState.empty(1, self.rule, sizes, dtype=q.dtype)
        decode.decode(self.tokens[:1], self.maps, self.heads, state, self.rule)


INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);")


def examined(cubin: bytes, tool: str, *options: str) -> str:
    """What one of Triton's tools, nvdisasm or cuobjdump, says of a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[str]:
    """Without predicates and hints."""
    found = filter(None, map(INSTRUCTION.match, text.splitlines()))
    return [each[1].replace(".reuse", "").strip() for each in found]


def early_writes(text: str) -> list[str]:
    """Instructions that write a register of an asynchronous matrix product before the wait for it.

    Other projects' kernels were miscompiled in this way (https://github.com/triton-lang/triton/pull/11781).
    """
    busy: set[int] = set()
    wrong = []
    for line in instructions(text):
        product = re.match(r"HGMMA\.64x(\d+)x\S+ R(\d+), (?:R(\d+), )?", line)
        if product is not None:
            width, into, operand = product.groups()
            busy.update(range(int(into), int(into) + int(width) // 2))
            if operand is not None:
                busy.update(range(int(operand), int(operand) + 4))
        elif line.startswith("WARPGROUP.DEPBAR"):
            busy.clear()
        else:
            written = re.match(r"(\S+) R(\d+)\b", line)
            if written is not None and not re.match(r"ST|RED|BAR", written[1]):
                size = 4 if ".128" in written[1] or ".M88.4" in written[1] else 2 if ".64" in written[1] else 1
                first = int(written[2])
                if busy.intersection(range(first, first + size)):
                    wrong.append(line)
    return wrong


def wrong_addresses(text: str) -> list[str]:
    """Instructions that compute the upper half of a shared-memory descriptor from a register that is not zero.

    The lower half is an address, the upper half a constant (its bits 30 and 31 say how tiles are laid out) plus the
    carry from the lower half: ``IADD3.X R9, R4, 0x40000040, RZ, P0`` with R4 = 0. CUDA 12.8's assembler sometimes takes
    a register for R4 that holds another number by then; on the GPU that is an illegal memory access.
    """
    lines = instructions(text)
    zeros = r"(IMAD\.MOV(\.U32)?|MOV|CS2R(\.32)?|HFMA2\.MMA|U?MOV|R2UR) (U?R\d+), (-?U?RZ|SRZ|0x0)\b"
    wrong = []
    for i, line in enumerate(lines):
        upper = re.match(r"U?IADD3\.X U?R\d+, (U?R\d+), (0x[48c]0000\w{3}|-0x[37]f{5}\w{2}), ", line)
        if upper is None:
            continue
        register, number = upper[1], int(upper[1].lstrip("UR"))
        pair = rf"(CS2R|\S+\.64) {register.rstrip('0123456789')}{number - 1},"
        defined = (each for each in reversed(lines[:i]) if re.match(rf"\S+ {register}\b|{pair}", each))
        last = next(defined, "")
        if not re.match(zeros, last):
            wrong.append(f"{line} after {last}")
    return wrong


def longest_loop(text: str) -> list[str]:
    """Instructions of the longest loop, without predicates."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loop = (0, 0)
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(lines)
        instruction = INSTRUCTION.match(line)
        if instruction is None:
            continue
        lines.append(instruction[1])
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
        begin = labels.get(target[1]) if target else None
        if begin is not None and len(lines) - begin > loop[1] - loop[0]:
            loop = (begin, len(lines))
    return lines[loop[0] : loop[1]]


def cycles(text: str, warps: int) -> dict[str, int]:
    """Lower bounds per iteration of the longest loop; see the module docstring."""
    lines = longest_loop(text)
    operations = moved = 0
    for line in lines:
        matrix = re.match(r"HGMMA\.64x(\d+)x16", line)
        if matrix:
            # B is read from shared memory once per group of four warps
            operations += 2 * 64 * int(matrix[1]) * 16 * warps // 4
            moved += 2 * int(matrix[1]) * 16 * warps // 4
        elif line.startswith("HMMA"):
            operations += 2 * 16 * 8 * 16 * warps
        elif re.match(r"(LDS|STS|LDL|STL|LDG|STG|LDSM|STSM|LDGSTS)\b", line):
            wide = 4 if re.search(r"\.128|\.M88\.4|MT88\.4|\.16\.", line) else 2 if ".64" in line else 1
            moved += 32 * 4 * wide * warps
    return {
        "instructions": len(lines), "matrix": round(operations / OPERATIONS),
        "issue": round(len(lines) * warps / ISSUED), "traffic": round(moved / BYTES),
    }  # fmt: skip


def report(kernel: Any) -> dict[str, int]:
    """The assembler's statistics, and `cycles`."""
    said = examined(kernel.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    used = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert used is not None
    text, warps = examined(kernel.asm["cubin"], "nvdisasm", "-c"), int(kernel.metadata.num_warps)
    return {
        "registers": int(used[1]), "stack_bytes": int(used[2]), "shared_bytes": int(kernel.metadata.shared),
        "warps": warps, "wrong_addresses": len(wrong_addresses(text)), "early_writes": len(early_writes(text)),
        **cycles(text, warps),
    }  # fmt: skip


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, choices=sorted(SHARED), help="90 Hopper, 80 A100, 89 Ada")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kinds", nargs="*", default=["terrace", "sliding", "linear"])
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--columns", type=int, default=COLUMNS)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--only", nargs="*", default=["training", "reading", "transfer", "crossing", "decoding"])
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    driver.set_active(FakeDriver(args.capability))
    if args.capability == 90:
        assembler.driver_release = lambda: (99, 0)  # nothing is launched
        obstacle = assembler.choose()
        if obstacle is not None:
            print(obstacle, file=sys.stderr)
    launch.wanted_programs = lambda device, each: 132 * each  # type: ignore[assignment]
    for module in (launch, crossent_launch):
        module.shared_limit = lambda device: SHARED[args.capability]  # type: ignore[assignment]
    launch.on_gpu = lambda device: True
    launch.has_copy_engine = lambda device: args.capability >= 90  # type: ignore[assignment]
    found: dict[str, dict[str, dict[str, int]]] = {}
    names = (
        "registers", "stack_bytes", "shared_bytes", "warps", "wrong_addresses", "early_writes", "instructions",
        "matrix", "issue", "traffic",
    )  # fmt: skip
    print(f"{'kernel':<34}" + "".join(f"{n:>16}" for n in names))
    for kind in args.kinds:
        layer = Layer(kind, getattr(torch, args.dtype), dim=args.dim, columns=args.columns, window=args.window)
        found[kind] = {}
        for work in args.only:
            for name, kernel in recorded(getattr(layer, work)).items():
                label = name if name not in found[kind] else f"{name} [{work}]"
                row = report(kernel)
                if row in found[kind].values():
                    continue
                found[kind][label] = row
                print(f"{kind + ' ' + label:<34}" + "".join(f"{row[n]:>16,}" for n in names), flush=True)
    if args.out is not None:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Launch every Triton kernel once on small shapes, for memory and race checkers.

    compute-sanitizer --tool racecheck python scripts/launch_kernels.py [--device cuda]
    python scripts/launch_kernels.py --selfcheck

Runs forward, backward, transfer, cross-entropy and decoding of every kind, in one group of chunks and in two, and
checks that results are finite. `--selfcheck` prints instead how far the results of the package's own check are from the
reference, kind by kind, and fails where one is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

import torch

from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.ops.triton import check, launch
from trenchcoat.students import StudentAttention, TransferRequest, build_student

HEADS, KV_HEADS = 2, 1


def student_of(kind: str, size: dict[str, int], dtype: torch.dtype, device: str) -> StudentAttention:
    """A student on the kernels."""
    phi = FeatureMapConfig(feature_dim=size["columns"], bias=dtype != torch.float16)
    cfg = StudentConfig(
        name=kind,
        window=size["window"],
        feature_map=phi,
        impl="triton",
        sinks=0 if kind == "linear" else 2,
        key_maps="per_kv_head" if dtype == torch.float16 else "per_query_head",
    )
    return build_student(cfg, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=size["dim"]).to(device)


def run(kind: str, size: dict[str, int], dtype: torch.dtype, device: str) -> None:
    """Every pass of one student."""
    torch.manual_seed(0)
    student, scale = student_of(kind, size, dtype, device), size["dim"] ** -0.5
    shapes = [(1, heads, size["tokens"], size["dim"]) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
    y, _ = student(q, k, v, scale=scale)
    y.float().square().mean().backward()
    found = [y, *(x.grad for x in (q, k, v)), *(p.grad for p in student.parameters())]
    with torch.no_grad():
        student.request = TransferRequest(xent_weight=1.0)
        student.transfer(q, k, v, y.roll(1, 2), scale=scale)
        found.append(student.metrics["loss"])
        before, after = size["tokens"] - 3, slice(size["tokens"] - 3, None)
        prefix = [x[:, :, :before] for x in (q, k, v)]
        empty = student.empty_state(1, dtype=dtype, device=device)
        _, state = student(*prefix, scale=scale, state=empty)
        found.append(student.decode(*(x[:, :, after] for x in (q, k, v)), state=state, scale=scale))
    for x in found:
        if x is not None and not bool(torch.isfinite(x).all()):
            raise SystemExit(f"{kind}, {dtype}: a result is not finite")


SMALL = {"tokens": 9, "dim": 5, "columns": 3, "window": 2}
"""For Triton's interpreter."""
LARGER = [
    {"tokens": 300, "dim": 64, "columns": 32, "window": 16},
    {"tokens": 300, "dim": 64, "columns": 32, "window": 64},
    {"tokens": 600, "dim": 128, "columns": 64, "window": 64},
    {"tokens": 300, "dim": 128, "columns": 256, "window": 64},
]
"""Tensor cores use different instructions for tiles of 16 and of 64 tokens; the last size is wide."""


def run_all(size: dict[str, int], kinds: Sequence[str], dtypes: Sequence[torch.dtype], device: str) -> None:
    """Every pass of every kind, in one group of chunks and in two."""
    launch.SHORTEST_GROUP = 2
    for groups, kind, dtype in itertools.product((1, 2), kinds, dtypes):
        launch.wanted_programs = lambda device, each, groups=groups: HEADS * groups  # type: ignore[assignment]
        run(kind, size, dtype, device)
        print(f"{kind:<8} {groups} group(s) {dtype}: done", flush=True)


def selfcheck(device: str) -> None:
    """The check of `ops.triton.check`, with its figures."""
    beyond = []
    for kind in check.KINDS:
        began = time.perf_counter()
        shares = {
            name: deviation / allowed if allowed else (torch.inf if deviation else 0.0)
            for name, deviation, allowed in zip(
                check.NAMES, check.deviations(kind, torch.device(device)), check.ALLOWED[kind], strict=True
            )
        }
        worst = max(shares, key=lambda name: shares[name])
        taken = time.perf_counter() - began
        print(f"{kind:<8} {shares[worst]:.2f} of the tolerance ({worst}), {taken:.0f} s", flush=True)
        beyond += [f"{name} of {kind}: {share:.2f}" for name, share in shares.items() if not share <= 1.0]
    if beyond:
        raise SystemExit("beyond the tolerance: " + "; ".join(beyond))


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--selfcheck", action="store_true")
    args = parser.parse_args()
    device = args.device
    if args.selfcheck:
        return selfcheck(device)
    dtypes = [torch.bfloat16] if launch.INTERPRETED else [torch.bfloat16, torch.float16]
    for size in [SMALL] if launch.INTERPRETED else LARGER:
        run_all(size, ["terrace", "sliding", "linear"], dtypes, device)
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

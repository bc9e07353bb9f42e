"""The registry of benchmarks, and running one by name. Importing this file imports none of them."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trenchcoat.config import UsageError

if TYPE_CHECKING:
    from trenchcoat.bench.benchmark import Benchmark

BENCHMARKS: dict[str, tuple[str, str]] = {
    "ops": ("trenchcoat.bench.ops:OpsBenchmark", "the operator against the quadratic reference and softmax attention"),
    "transfer": ("trenchcoat.bench.transfer:TransferBenchmark", "time and memory of an attention-transfer step"),
    "stage2": ("trenchcoat.bench.stage2:Stage2Benchmark", "stage 2 and selection against plain training steps"),
    "students": ("trenchcoat.bench.students:StudentsBenchmark", "what each student costs against its softmax teacher"),
    "blocks": ("trenchcoat.bench.blocks:BlocksBenchmark", "block-wise transfer against the joint run"),
    "clip": ("trenchcoat.bench.clip:ClipBenchmark", "one gradient clip for all layers against one for each"),
    "decode": ("trenchcoat.bench.decode:DecodeBenchmark", "time per token and state size against the softmax teacher"),
    "serve": ("trenchcoat.bench.serve:ServeBenchmark", "a model and its softmax teacher in the same server, over HTTP"),
    "kernels": ("trenchcoat.bench.kernels:KernelsBenchmark", "the Triton kernels on a GPU (--device cuda)"),
    "tiles": ("trenchcoat.bench.tiles:TilesBenchmark", "tune the kernels' launch settings on this GPU and store them"),
}
"""Name -> (class, what it measures)."""


def load_benchmark(name: str) -> Benchmark[Any]:
    """The benchmark of that name."""
    made: Benchmark[Any] = pkgutil.resolve_name(BENCHMARKS[name][0])(name)
    return made


def run_benchmark(name: str, *, out: str | None = None, say: Callable[[str], None] = print, **settings: Any) -> str:
    """``trenchcoat bench NAME``: measure, write the record to ``out`` if given (some draw a picture
    beside it), return it as text.

    ``settings`` are the fields of :class:`trenchcoat.bench.benchmark.Settings`. ``say`` receives progress lines from
    long benchmarks.

    Raises:
        UsageError: an option is set that the benchmark does not have.
    """
    from trenchcoat.bench.benchmark import OPTIONS, Settings
    from trenchcoat.runtime.files import write_json

    benchmark = load_benchmark(name)
    refused = [
        f"--{option.replace('_', '-')}"
        for option in OPTIONS
        if settings.get(option) and option not in benchmark.options
    ]
    if refused:
        raise UsageError(f"bench {name} does not have {' and '.join(refused)}")

    def keep(record: dict[str, Any]) -> None:
        """Write the record so far."""
        if out is not None:
            write_json(Path(out), record)

    record = benchmark.measure(Settings(keep=keep, say=say, **settings))
    keep(record)
    if out is not None:
        benchmark.draw(record, Path(out).with_suffix(".png"))
    return benchmark.text(record)

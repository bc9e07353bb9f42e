"""Speed of the Triton kernels on this GPU, in four parts.

    operator   one layer's attention: share of the device's roofline, ratios to other attentions
    layer      attention transfer of one 8B-shaped layer, against the layer's own attention
    model      stage 1 and stage 2 steps and prefill of an 8B-shaped Llama, against the softmax model
    decode     tokens/s of that model with a captured CUDA graph, against the memory roofline and the softmax model

The device's ceilings are measured in the same run: a copy of 1 GiB and a matrix product of 8192 x 8192 x 8192. Every
target is a row of the table, with its measurement or the reason why there is none. A measurement that runs out of
memory is recorded as such and the others continue; results are written as they arrive.

In Triton's interpreter (`TRITON_INTERPRET=1`, `--device cpu`) everything runs at toy sizes, to see that it does.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from trenchcoat.bench.benchmark import Benchmark, Settings, listed
from trenchcoat.bench.kernel_part import KernelPart
from trenchcoat.bench.kernels_decode import DecodePart
from trenchcoat.bench.kernels_model import LayerPart, ModelPart
from trenchcoat.bench.kernels_operator import OperatorPart
from trenchcoat.bench.timing import Ceilings, Timer, attempt
from trenchcoat.config import UsageError
from trenchcoat.config.units import gib

KERNEL_PARTS: dict[str, KernelPart[Any]] = {
    "operator": OperatorPart(),
    "layer": LayerPart(),
    "model": ModelPart(),
    "decode": DecodePart(),
}


INTERPRETER = "no GPU: toy sizes in Triton's interpreter"


def _interpreted(device: str) -> bool:
    return device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class KernelsSizes:
    """What is measured."""

    parts: dict[str, Any] = field(default_factory=lambda: {name: part.full for name, part in KERNEL_PARTS.items()})
    """Name of each part to measure -> sizes."""
    repeats: int = 20
    copied: int = 1 << 29
    """bfloat16 elements of the copy that measures peak bandwidth."""
    side: int = 8192
    """Rows of the matrices whose product measures peak FLOP/s."""


class KernelsBenchmark(Benchmark[KernelsSizes]):
    """``bench kernels``."""

    implementation = "triton"
    full = KernelsSizes()
    quick = KernelsSizes({name: part.quick for name, part in KERNEL_PARTS.items()}, repeats=3)
    toy = KernelsSizes({name: part.toy for name, part in KERNEL_PARTS.items()}, repeats=1, copied=1 << 10, side=16)
    options = ("only", "layers")
    only_on = "cuda"

    def sizes(self, settings: Settings) -> KernelsSizes:
        """Sizes of the parts named in `only` (default: all), with models of `layers` layers.

        Raises:
            UsageError: an unknown part, or fewer than 1 layer.
        """
        unknown = [name for name in settings.only if name not in KERNEL_PARTS]
        if unknown:
            raise UsageError(f"bench kernels --only names {unknown[0]!r}; its parts are {', '.join(KERNEL_PARTS)}")
        if settings.layers is not None and settings.layers < 1:
            raise UsageError(f"bench kernels --layers is {settings.layers}; it must be 1 or more")
        sizes = self.toy if _interpreted(settings.device) else super().sizes(settings)
        parts = {name: part for name, part in sizes.parts.items() if not settings.only or name in settings.only}
        if settings.layers is not None:
            depths = {name: dict.fromkeys(KERNEL_PARTS[name].depths, settings.layers) for name in parts}
            parts = {name: replace(part, **depths[name]) for name, part in parts.items()}
        return replace(sizes, parts=parts)

    def needs(self, sizes: KernelsSizes) -> str:
        """Estimated device memory of each part."""
        each = [f"{name} {gib(KERNEL_PARTS[name].memory(part))}" for name, part in sizes.parts.items()]
        return "; estimated device memory: " + ", ".join(each)

    def judged(self, figures: dict[str, Any], quick: bool = False) -> list[dict[str, Any]]:
        """A row for each target of the parts."""
        found, quick = figures["parts"], quick or figures["gpu"] == INTERPRETER
        return [target.judged(found[name], quick) for name in found for target in KERNEL_PARTS[name].targets]

    def _refuse(self, device: str, sizes: KernelsSizes) -> None:
        if not _interpreted(device):
            super()._refuse(device, sizes)

    def run(self, sizes: KernelsSizes, settings: Settings) -> dict[str, Any]:
        """Ceilings, then every measurement of the parts; after each, a progress line and the record so far."""
        device = settings.device
        gpu = INTERPRETER if device == "cpu" else torch.cuda.get_device_name(device)
        settings.say(gpu + self.needs(sizes))
        timer = Timer(sizes.repeats, device)
        limits = Ceilings.measured(timer, sizes.copied, sizes.side)
        figures: dict[str, Any] = {
            "gpu": gpu,
            "ceilings": asdict(limits),
            "shapes": {name: asdict(part) for name, part in sizes.parts.items()},
            "parts": {name: {} for name in sizes.parts},
        }
        for part, found in figures["parts"].items():
            for name, work in KERNEL_PARTS[part].measurements(sizes.parts[part], timer, limits):
                found[name] = attempt(work)
                settings.keep(figures)
                settings.say(f"{name}: {listed(found[name])}")
        return figures

    def table(self, record: dict[str, Any]) -> list[str]:
        """The ceilings and every part."""
        limits = record["ceilings"]
        lines = [
            f"{record['gpu']}: {limits['bytes_per_second'] / 1e12:.2f} TB/s (copy), "
            f"{limits['operations_per_second'] / 1e12:.0f} TFLOP/s (matrix product); bfloat16; times in seconds, share "
            "of the roofline"
        ]
        for part, found in record["parts"].items():
            lines += ["", part, *(f"  {name}: {listed(row)}" for name, row in found.items())]
        return lines

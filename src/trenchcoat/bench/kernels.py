"""What the Triton kernels cost on this GPU, in three parts: the operator, whole-model steps and prefill, decoding.

    operator   one layer's attention: share of the device's roofline, ratios to other attentions
    model      stage 1 and stage 2 steps and prefill of an 8B-shaped Llama, against the softmax model
    decode     tokens/s of that model with a captured CUDA graph, against the memory roofline and the softmax model

The device's ceilings are measured in the same run: a copy of 1 GiB and a matrix product of 8192 x 8192 x 8192. Every
target of these kernels is a row of the table, measured or with the reason why not. What runs out of memory is recorded
as such, and the rest goes on; results are handed over as they come in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch

import trenchcoat.bench.kernels_decode as kernels_decode
import trenchcoat.bench.kernels_model as kernels_model
import trenchcoat.bench.kernels_operator as kernels_operator
from trenchcoat.bench.gpu import Ceilings, Timer, attempt, targets_table
from trenchcoat.config import UsageError, UserError
from trenchcoat.config.units import gib
from trenchcoat.runtime.runlog import environment

PARTS: dict[str, ModuleType] = {"operator": kernels_operator, "model": kernels_model, "decode": kernels_decode}


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    operator: kernels_operator.Sizes = kernels_operator.FULL
    model: kernels_model.Sizes = kernels_model.FULL
    decode: kernels_decode.Sizes = kernels_decode.FULL
    repeats: int = 20
    copied: int = 1 << 29
    """bfloat16 numbers of the copy whose speed is the ceiling of bytes."""
    side: int = 8192
    """Rows of the matrices whose product is the ceiling of operations."""

    def of_layers(self, layers: int | None) -> Sizes:
        """Models of another depth."""
        return replace(self, model=self.model.of_layers(layers), decode=self.decode.of_layers(layers))


QUICK = Sizes(kernels_operator.QUICK, kernels_model.QUICK, kernels_decode.QUICK, repeats=3)


def measure(
    *,
    threads: int | None = None,
    quick: bool = False,
    repeats: int | None = None,
    device: str = "cuda",
    only: Sequence[str] = (),
    layers: int | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run the parts `only` names (all, without it); JSON-ready.

    `layers` sets the depth of the models; `keep` is given the result after each measurement, `say` a line about it.
    Raises ``UsageError`` for a part that is none, ``UserError`` when there is no CUDA device, or `device` is not one.
    """
    strange = [name for name in only if name not in PARTS]
    if strange:
        raise UsageError(f"bench kernels --only names {strange[0]!r}; its parts are {', '.join(PARTS)}")
    if layers is not None and layers < 1:
        raise UsageError(f"bench kernels --layers is {layers}; it must be 1 or more")
    parts = [name for name in PARTS if not only or name in only]
    sizes = (QUICK if quick else Sizes()).of_layers(layers)
    sizes = sizes if repeats is None else replace(sizes, repeats=repeats)
    needed = needs(sizes, parts)
    if not device.startswith("cuda") or not torch.cuda.is_available():
        found = "no CUDA device was found" if device.startswith("cuda") else f"--device is {device}"
        raise UserError(
            f"bench kernels measures Triton kernels on a GPU, but {found}; give it a machine with one and --device "
            f"cuda ({needed}; `bench ops` measures on CPUs)"
        )
    if say is not None:
        say(f"{torch.cuda.get_device_name(device)}: {needed}")
    return collect(sizes, parts, device, keep=keep, say=say)


def needs(sizes: Sizes, parts: Sequence[str]) -> str:
    """Estimated device memory of each part."""
    each = [f"{name} {gib(PARTS[name].memory(getattr(sizes, name)))}" for name in parts]
    return "estimated device memory: " + ", ".join(each)


def collect(
    sizes: Sizes,
    parts: Sequence[str],
    device: str,
    *,
    keep: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The measurements of `parts`; see :func:`measure`."""
    timer = Timer(sizes.repeats, device)
    limits = Ceilings.measured(timer, sizes.copied, sizes.side)
    result: dict[str, Any] = {
        "benchmark": "kernels",
        "gpu": "none" if device == "cpu" else torch.cuda.get_device_name(device),
        "ceilings": asdict(limits),
        "shapes": {name: asdict(getattr(sizes, name)) for name in parts},
        "parts": {name: {} for name in parts},
        "targets": [],
        "environment": environment(implementation="triton", device=device),
    }
    for part in parts:
        module, found = PARTS[part], result["parts"][part]
        for name, work in module.measurements(getattr(sizes, part), timer, limits):
            found[name] = attempt(work)
            result["targets"] = [row for one in parts for row in PARTS[one].targets(result["parts"][one])]
            if keep is not None:
                keep(result)
            if say is not None:
                say(module.table({name: found[name]})[-1])
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    limits = result["ceilings"]
    lines = [
        f"{result['gpu']}: {limits['bytes_per_second'] / 1e12:.2f} TB/s (copy), "
        f"{limits['operations_per_second'] / 1e12:.0f} TFLOP/s (matrix product); bfloat16"
    ]
    for part, found in result["parts"].items():
        lines += ["", part, *PARTS[part].table(found)]
    return "\n".join([*lines, "", *targets_table(result["targets"])])

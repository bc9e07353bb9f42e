"""Find the fastest launch settings of the Triton kernels on this GPU and store them under its name.

For every kernel that a layer's passes launch, warps and pipeline depths are tried on the recorded launch, then the
number of programs per multiprocessor that rows are split for. Every later process that runs this shape on such a device
uses the stored settings (:mod:`trenchcoat.ops.triton.tiles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trenchcoat.bench.benchmark import Benchmark, Settings
from trenchcoat.bench.layer import Layer, LayerSizes
from trenchcoat.bench.timing import Timer
from trenchcoat.ops.triton.tiles import Choices, Tile, choices, encoded, tiles_file
from trenchcoat.runtime.files import read_json, write_json

if TYPE_CHECKING:
    from trenchcoat.ops.triton.launch import Launch

CANDIDATES = tuple(Tile(warps, stages) for warps in (4, 8, 16) for stages in (1, 2, 3))
PROGRAMS = (1, 2, 4)
"""Programs per multiprocessor."""
FASTER = 0.98
"""A choice replaces the default if its time is at most this share of the default's."""

Clock = Callable[[Callable[[], object]], float]


def best_tiles(launches: list[Launch], clock: Clock) -> dict[str, tuple[Tile, float]]:
    """Kernel -> (tile, its time over that of the recorded launch's tile)."""
    from trenchcoat.ops.triton.launch import OutOfResources

    variants: dict[str, dict[str, Launch]] = {}
    for launch in launches:
        variants.setdefault(launch.name, {}).setdefault(repr(sorted(launch.flags.items())), launch)
    found = {}
    for name, kinds in variants.items():
        usual = next(iter(kinds.values())).tile

        def taken(tile: Tile, kinds: dict[str, Launch] = kinds) -> float:
            """Seconds of all launches of this kernel with `tile`."""
            return sum(clock(lambda one=one: one.again(tile)) for one in kinds.values())  # type: ignore[misc]

        times = {usual: taken(usual)}
        for tile in CANDIDATES:
            if tile != usual:
                with suppress(OutOfResources):
                    times[tile] = taken(tile)
        chosen = min(times, key=lambda tile: times[tile])
        if times[chosen] >= FASTER * times[usual]:
            chosen = usual
        found[name] = (chosen, times[chosen] / times[usual])
    return found


def keep(device: str, shape: str, found: Choices, version: str) -> None:
    """Add or replace an entry of the file."""
    path = tiles_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = read_json(path) if path.exists() else {}
    content.setdefault(device, {})[shape] = encoded(found, version)
    write_json(path, content)
    choices.cache_clear()


def tune(passes: Sequence[Callable[[], object]], clock: Clock, *, device: torch.device) -> dict[str, Any]:
    """Tune one shape's passes, store the result and return it JSON-ready."""
    from trenchcoat.ops.triton.assembler import VERSION
    from trenchcoat.ops.triton.launch import device_name, recorded, signature

    with recorded() as launches:
        for work in passes:
            work()
    constants, dtype = launches[0].arguments[-1], str(launches[0].arguments[0][0].dtype)
    shape, name = signature(constants, dtype), device_name(device)
    best = best_tiles(launches, clock)
    tiles = {kernel: tile for kernel, (tile, _) in best.items()}
    times = {}
    for programs in PROGRAMS:
        keep(name, shape, Choices(programs=programs, tiles=tiles), VERSION)
        times[programs] = sum(clock(work) for work in passes)
    programs = min(times, key=lambda p: times[p])
    if times[programs] > FASTER * times[2]:
        programs = 2
    keep(name, shape, Choices(programs=programs, tiles=tiles), VERSION)
    return {
        "shape": shape, "device": name, "programs": programs, "seconds_by_programs": times,
        "tiles": {kernel: [tile.warps, tile.stages, round(share, 4)] for kernel, (tile, share) in best.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class TilesSizes:
    """What is tuned."""

    layer: LayerSizes = field(default_factory=LayerSizes)
    tokens: int = 8192
    repeats: int = 20


class TilesBenchmark(Benchmark[TilesSizes]):
    """``bench tiles``."""

    implementation = "triton"
    full = TilesSizes()
    quick = TilesSizes(LayerSizes(heads=4, kv_heads=2, dim=64), tokens=512, repeats=3)
    only_on = "cuda"

    def run(self, sizes: TilesSizes, settings: Settings) -> dict[str, Any]:
        """Tune the layer's shape for every kind."""
        device = settings.device
        timer, found = Timer(sizes.repeats, device), []
        for kind in ("terrace", "sliding", "linear"):
            layer = Layer(sizes.layer, "triton", sizes.tokens, device, kind=kind)
            passes = [layer.forward, layer.training, layer.transfer, layer.cross_entropy, layer.decoding()]
            found.append(tune(passes, timer, device=torch.device(device)))
        return {"file": str(tiles_file()), "found": found}

    def table(self, record: dict[str, Any]) -> list[str]:
        """Every kernel's choice."""
        lines = [f"stored in {record['file']}"]
        for entry in record["found"]:
            lines.append(f"{entry['device']}, {entry['shape']}: {entry['programs']} programs per multiprocessor")
            for kernel, (warps, stages, share) in entry["tiles"].items():
                lines.append(f"  {kernel:<24} {warps:>2} warps, {stages} stages: {share:.2f} of the default's time")
        return lines

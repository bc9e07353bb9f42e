"""The logs of blocks as the one log that the joint run would have written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trenchcoat.runtime.runfolder import TRANSFER
from trenchcoat.runtime.runlog import RunLog, read_metrics


def merge_logs(folders: Sequence[Path], log: RunLog, *, at_once: bool = False) -> int:
    """Write one line a step of the blocks' training and evaluation lines to ``log``; returns how many.

    Per-layer numbers stand side by side; ``loss`` and the like are means over the layers that the step still trained,
    the gradient's norm that of all, seconds the blocks' together, or the most of one where they were trained
    ``at_once``. What an earlier call wrote is dropped first.
    """
    lines: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for folder in folders:
        for line in read_metrics(folder):
            if line["kind"] in ("train", "eval") and line.get("stage") == TRANSFER:
                # an evaluation comes after the step it is of
                lines.setdefault((line["step"], int(line["kind"] == "eval")), []).append(line)
    log.rewind(TRANSFER, -1)
    for (step, evaluation), parts in sorted(lines.items()):
        log.log("eval" if evaluation else "train", stage=TRANSFER, step=step, **dict(_together(parts, at_once)))
    log.sync()
    return len(lines)


def _together(parts: Sequence[Mapping[str, Any]], at_once: bool) -> Iterator[tuple[str, Any]]:
    layers = [max(1, sum(name.startswith("loss/layer_") for name in part)) for part in parts]
    names = dict.fromkeys(name for part in parts for name in part)
    for name in names:
        found = [(part[name], weight) for part, weight in zip(parts, layers, strict=True) if name in part]
        values = [value for value, _ in found]
        if name in ("kind", "stage", "step", "time") or name.startswith("speed/"):
            continue
        if "/layer_" in name or name == "lr":
            yield name, values[0] if "/layer_" in name else max(values)
        elif name == "grad_norm":
            yield name, sum(value * value for value in values) ** 0.5
        elif name == "tokens":
            yield name, max(values)
        elif name == "seconds":
            yield name, round(max(values) if at_once else sum(values), 3)
        else:
            yield name, sum(value * weight for value, weight in found) / sum(weight for _, weight in found)

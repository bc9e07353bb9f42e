"""The setting ``blocks.slurm``: options of sbatch, checked before anything is submitted.

The names are sbatch's long options (https://slurm.schedmd.com/sbatch.html), with ``-`` or ``_``. Options for how a job
is started and where its output goes are reserved for the launcher; ``setup`` is a shell command that runs first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trenchcoat.config import UsageError

DEFAULT_MINUTES = 720
"""Time limit of a job; a job that reaches it is requeued."""

_COUNTS = {"cpus_per_task", "cpus_per_gpu", "gpus_per_node"}
_FLAGS = {"exclusive", "oversubscribe", "contiguous"}
_TEXTS = {
    "partition", "account", "qos", "time", "mem", "mem_per_gpu", "mem_per_cpu", "constraint", "exclude", "nodelist",
    "gres", "gpus", "gpus_per_task", "comment", "reservation", "licenses", "nice", "begin", "deadline", "mail_user",
    "mail_type", "clusters", "tmp", "job_name", "export", "wckey", "hint", "distribution", "switches", "setup",
}  # fmt: skip
_OURS = {
    "array": "blocks.jobs says how many blocks are trained at once",
    **dict.fromkeys(("nodes", "ntasks", "ntasks_per_node"), "a block is trained by one process on one GPU"),
    **dict.fromkeys(("output", "error", "open_mode"), "logs go to blocks/jobs in the run's folder"),
    "signal": "the launcher sets its own signal before the time limit",
    "chdir": "jobs run where the launcher was started, so that the recipe's paths are the same",
    "dependency": "the launcher submits each step when the previous one is done",
}
_GPU_ASKED = {"gres", "gpus", "gpus_per_task", "gpus_per_node"}
"""Options that request GPUs; without any of them, one GPU is requested."""


@dataclass(frozen=True)
class SlurmOptions:
    """The parsed ``blocks.slurm`` options."""

    minutes: int
    """Time limit of a job."""
    gpus: int | None
    """`--gpus-per-node`; None if other options request the GPU, or if none is requested."""
    cpus: int | None
    """`--cpus-per-task`."""
    setup: tuple[str, ...]
    """Shell commands to run before the job."""
    further: dict[str, Any]
    """Other options, under sbatch's names; a flag is True."""


def parse_slurm(given: Sequence[str]) -> SlurmOptions:
    """Parse ``name=value`` options; raises ``UsageError`` for an unknown, repeated or reserved one."""
    found: dict[str, Any] = {}
    setup: list[str] = []
    for item in given:
        name, equals, value = item.partition("=")
        name, value = name.strip().lstrip("-").replace("-", "_"), value.strip()
        if not equals or not name or not value or "\n" in value:
            raise UsageError(f"blocks.slurm has {item!r}: expected name=value, such as partition=gpu or time=240")
        _check_name(name)
        if name == "setup":
            setup.append(value)
            continue
        if name in found:
            raise UsageError(f"blocks.slurm has {name} twice: leave one out")
        found[name] = _value(name, value)
    gpus = found.pop("gpus_per_node", None if _GPU_ASKED & found.keys() else 1)
    if gpus is not None and gpus > 1:
        raise UsageError(f"blocks.slurm: gpus_per_node={gpus}, but a block is trained on one GPU: leave it out")
    minutes = found.pop("time", DEFAULT_MINUTES)
    cpus = found.pop("cpus_per_task", None)
    further = {name.replace("_", "-"): value for name, value in found.items()}
    return SlurmOptions(minutes, gpus or None, cpus, tuple(setup), further)


def _check_name(name: str) -> None:
    if name in _OURS:
        raise UsageError(f"blocks.slurm: {name} is set by the launcher: {_OURS[name]}")
    known = _COUNTS | _FLAGS | _TEXTS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known))}"
        raise UsageError(f"blocks.slurm: unknown option {name!r}: {hint}")


def _value(name: str, value: str) -> Any:
    if name == "time":
        return _minutes(value)
    if name in _FLAGS:
        if value.lower() not in ("true", "yes", "1"):
            raise UsageError(f"blocks.slurm: {name} takes no value: write {name}=true, or leave it out (got {value!r})")
        return True
    if name not in _COUNTS:
        return value
    least = 0 if name == "gpus_per_node" else 1
    if not value.isdecimal() or int(value) < least:
        raise UsageError(f"blocks.slurm: {name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def _minutes(value: str) -> int:
    """A Slurm time in minutes (rounded up): m, m:s, h:m:s, d-h, d-h:m or d-h:m:s."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", value)
    if match is None:
        raise UsageError(f"blocks.slurm: time must be minutes, or like 12:00:00 or 2-00 (days-hours), got {value!r}")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        hours += 24 * int(days)
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    total = 60 * hours + minutes + -(-seconds // 60)
    if total < 1:
        raise UsageError(f"blocks.slurm: time must be at least a minute, got {value!r}")
    return total

"""`trenchcoat blocks ACTION`: the grammar of its actions, and the options that describe a machine to plan for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trenchcoat.config import Recipe, UsageError, UserError

SHORT = "attention transfer block by block, for models larger than the machine"
MORE = """\
Attention transfer of a model that does not fit: a few layers (a block) at a time.
"""


@dataclass(frozen=True)
class Action:
    """One action; every one takes a recipe and overrides."""

    short: str
    more: str
    options: Callable[[argparse.ArgumentParser], None]
    """Adds what else it takes."""
    run: Callable[[Recipe, argparse.Namespace], Any]
    """Does it; the answer's ``shown`` goes to the terminal."""
    sections: Sequence[str] | None = ()
    """Of the recipe, whose settings the help lists; None for all."""


def add_machine(sub: argparse.ArgumentParser) -> None:
    """Options that describe a machine, and where to keep the plan."""
    sub.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in all (1)")
    sub.add_argument("--gpu-memory", default="80GB", metavar="SIZE", help="memory of one GPU (80GB; GB is 2^30 here)")
    sub.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs that share a node (8)")
    sub.add_argument("--gpu", default="H100", metavar="NAME", help="which GPU, for its peak FLOP/s (H100)")
    sub.add_argument("--mfu", type=float, default=0.4, metavar="X", help="share of the peak that is reached (0.4)")
    sub.add_argument(
        "--link", default=None, metavar="RATE", help="what a GPU receives from others (300GB/s in a node, else 50GB/s)"
    )
    sub.add_argument(
        "--host-memory", default=None, metavar="SIZE", help="host memory of a node (128GB a GPU; GB is 2^30 here)"
    )
    sub.add_argument("--disk", default=None, metavar="SIZE", help="free disk, to compare with (2TB)")
    sub.add_argument("--bandwidth", default=None, metavar="RATE", help="what a node reads from that disk (3GB/s)")
    sub.add_argument(
        "--write-bandwidth", default=None, metavar="RATE", help="what a node writes to it (as much as it reads)"
    )
    sub.add_argument("--tokens", default=None, metavar="N", help="tokens of one pass over the training data (10M)")
    sub.add_argument("--json", default=None, metavar="FILE", help="also write everything as JSON")


def machine_of(args: argparse.Namespace) -> tuple[Any, float | None]:
    """(`plan.Machine`, tokens of one pass) that the options of :func:`add_machine` say; raises ``UsageError``."""
    from trenchcoat.plan import Machine
    from trenchcoat.units import parse_size

    def size(name: str, *, binary: bool = False) -> float | None:
        text = getattr(args, name)
        return None if text is None else parse_size(text, f"--{name.replace('_', '-')}", binary=binary)

    try:
        described: dict[str, Any] = {name: getattr(args, name) for name in ("gpus", "gpus_per_node", "gpu", "mfu")}
        described |= {name: size(name, binary=True) for name in ("gpu_memory", "host_memory")}
        described |= {name: size(name) for name in ("link", "disk", "bandwidth", "write_bandwidth")}
        return Machine(**described), size("tokens")
    except UserError as error:
        raise UsageError(str(error)) from error


def kept(args: argparse.Namespace, report: Any) -> Any:
    """``report`` (a `plan.PlanReport`), written to the file that `--json` names, which it then says."""
    from trenchcoat.files import write_json

    if args.json is None:
        return report
    write_json(Path(args.json), report.document)
    return dataclasses.replace(report, shown=(*report.shown, f"all of it: {args.json}"))


def _plan(recipe: Recipe, args: argparse.Namespace) -> Any:
    from trenchcoat.blockplan_report import report_blocks_plan

    machine, tokens = machine_of(args)
    return kept(args, report_blocks_plan(recipe, machine, tokens=tokens))


ACTIONS = {
    "plan": Action(
        "layers a block, memory, disk and hours of each way, before anything runs",
        """\
Say how many layers a block may have on a machine, what streaming (hidden states in memory or on disk), a pipeline over
the GPUs and blocks in parallel need there, how many bytes they read and write, and how long they take at least, for 1,
2, 4, ... GPUs; which resource is short or takes longest; and what `blocks run` would choose. It is arithmetic on the
model's sizes: no weights, no GPU.
""",
        add_machine,
        _plan,
        ("blocks",),
    ),
}
"""The actions by name."""

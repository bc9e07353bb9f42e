"""The options that describe a machine to plan for, which `plan` and `blocks plan` take."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from trenchcoat.cli.command import output_file, values
from trenchcoat.config import UsageError, UserError
from trenchcoat.config.units import parse_size


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Options that describe a machine, and where to write the plan."""
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="GPUs in all (1)")
    add("--gpu-memory", default="80GB", metavar="SIZE", help="memory of one GPU (80GB; GB is 2^30 here)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs that share a node (8)")
    add("--gpu", default="H100", metavar="NAME", help="GPU model, for its peak FLOP/s (H100)")
    add("--mfu", type=float, default=0.4, metavar="X", help="fraction of the peak that is reached (0.4)")
    add("--link", metavar="RATE", help="bandwidth from other GPUs to one (300GB/s in a node, else 50GB/s)")
    add("--host-memory", metavar="SIZE", help="host memory of a node (128GB per GPU; GB is 2^30 here)")
    add("--disk", metavar="SIZE", help="free disk space, such as 2TB (not checked)")
    add("--bandwidth", metavar="RATE", help="read bandwidth from that disk to a node (3GB/s)")
    add("--write-bandwidth", metavar="RATE", help="write bandwidth (the same as --bandwidth)")
    add("--tokens", metavar="N", help="tokens of one pass over the data, such as 10M (as far as known)")
    add("--json", type=output_file, metavar="FILE", help="also write everything as JSON")


def machine_of(args: argparse.Namespace) -> tuple[Any, float | None]:
    """(`plan.Machine`, tokens of one pass) that the options of :func:`add_machine` describe; raises ``UsageError``."""
    from trenchcoat.planning.plan import Machine

    def size(name: str, **how: Any) -> float | None:
        text = getattr(args, name)
        return None if text is None else parse_size(text, f"--{name.replace('_', '-')}", **how)

    try:
        described = values(args, "gpus", "gpus_per_node", "gpu", "mfu")
        described |= {name: size(name, binary=True) for name in ("gpu_memory", "host_memory")}
        described |= {name: size(name) for name in ("link", "disk", "bandwidth", "write_bandwidth")}
        machine = Machine(**described)
        if machine.nodes > 1 and machine.gpus % machine.gpus_per_node:
            raise UsageError(
                f"--gpus {machine.gpus} is not a whole number of nodes with {machine.gpus_per_node} GPUs each: give "
                f"--gpus {machine.nodes * machine.gpus_per_node}, or --gpus-per-node"
            )
        return machine, size("tokens", expected="a number such as 10M")
    except UserError as error:
        raise UsageError(str(error)) from error


def with_json(args: argparse.Namespace, report: Any) -> Any:
    """``report`` (a `planning.report.PlanReport`), also written to the `--json` file if one is given."""
    from trenchcoat.runtime.files import write_json

    if args.json is None:
        return report
    write_json(args.json, report.document)
    return dataclasses.replace(report, shown=(*report.shown, f"all of it: {args.json}"))

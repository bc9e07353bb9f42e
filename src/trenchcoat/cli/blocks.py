"""`trenchcoat blocks ACTION`: the grammar of its actions, and the options that describe a machine to plan for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
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
    from trenchcoat.config.units import parse_size
    from trenchcoat.planning.plan import Machine

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
    from trenchcoat.runtime.files import write_json

    if args.json is None:
        return report
    write_json(Path(args.json), report.document)
    return dataclasses.replace(report, shown=(*report.shown, f"all of it: {args.json}"))


def _plan(recipe: Recipe, args: argparse.Namespace) -> Any:
    from trenchcoat.planning.blockplan_report import report_blocks_plan

    machine, tokens = machine_of(args)
    return kept(args, report_blocks_plan(recipe, machine, tokens=tokens))


def _run(recipe: Recipe, args: argparse.Namespace) -> Any:
    from trenchcoat.linearize.blocks import stages as blockstages

    if not args.parallel:
        if args.launcher is not None:
            raise UsageError(f"--launcher {args.launcher} is for `blocks run --parallel`: add it, or leave this out")
        return blockstages.run(recipe)
    if find_spec("submitit") is None:
        raise UserError("blocks run --parallel needs submitit: pip install 'trenchcoat[cluster]'")
    from trenchcoat.linearize.blocks import launch

    launcher = args.launcher or recipe.blocks.launcher
    return launch.run(dataclasses.replace(recipe, blocks=dataclasses.replace(recipe.blocks, launcher=launcher)))


def _collect(recipe: Recipe, args: argparse.Namespace) -> Any:
    from trenchcoat.linearize.blocks import stages as blockstages

    return blockstages.collect(recipe)


def _train(recipe: Recipe, args: argparse.Namespace) -> Any:
    from trenchcoat.linearize.blocks import stages as blockstages

    return blockstages.train(recipe, args.block, None if args.weights is None else Path(args.weights))


def _shard(recipe: Recipe, args: argparse.Namespace) -> Any:
    from trenchcoat.linearize.blocks import stages as blockstages

    return blockstages.shard(recipe, Path(args.out))


def _stitch(recipe: Recipe, args: argparse.Namespace) -> Any:
    from trenchcoat.linearize.blocks import stages as blockstages

    return blockstages.stitch(recipe)


def _status(recipe: Recipe, args: argparse.Namespace) -> Any:
    from trenchcoat.linearize.blocks import stages as blockstages

    return blockstages.status(recipe)


def _nothing(sub: argparse.ArgumentParser) -> None:
    """No options beside the recipe."""


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--parallel", action="store_true", help="every block a job of its own, several at a time (docs/CLUSTER.md)"
    )
    sub.add_argument(
        "--launcher", choices=["local", "slurm"], default=None,
        help="who runs the jobs of --parallel: this machine's devices, or Slurm (blocks.launcher)",
    )  # fmt: skip


def _add_train(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--block", type=int, required=True, metavar="I", help="number of the block, from 0")
    sub.add_argument(
        "--weights", default=None, metavar="DIR", help="read its weights from a folder that `blocks shard` made of it"
    )


def _add_shard(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, metavar="DIR", help="where the blocks' folders are made")


_SECTIONS = ("model", "student", "data", "transfer", "parallel", "blocks", "run")

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
    "run": Action(
        "the whole transfer on this machine, one block in memory at a time",
        """\
Stream the training rows through the blocks: load a block, train its students on a pass of rows, hand the teacher's
outputs to the next block. Hidden states wait in memory or on disk, whichever is quicker here. At the end the blocks are
stitched into one adapter and scored. Killed or stopped, the same command continues. Under torchrun the processes share
the micro-batches or, with blocks.ranks=pipeline, the layers. With --parallel the inputs of all blocks are collected on
disk first, then every block is trained by a job of its own. `trenchcoat finetune` with the same recipe goes on from
there.
""",
        _add_run,
        _run,
        _SECTIONS,
    ),
    "collect": Action(
        "keep the inputs of every block on disk, to train blocks apart",
        """\
One pass of the teacher alone through all rows, one block in memory at a time. What stands before each block is kept in
checked files; `blocks train` reads it, on any machine that sees the folder.
""",
        _nothing,
        _collect,
        _SECTIONS,
    ),
    "train": Action(
        "train one block from collected inputs, alone",
        """\
Train the students of one block on the inputs that `blocks collect` kept. Blocks depend on nothing but their inputs, so
any number of these commands may run at once.
""",
        _add_train,
        _train,
        _SECTIONS,
    ),
    "stitch": Action(
        "make one adapter of all blocks, and score it",
        """\
Check that every layer is in exactly one finished block and that all blocks come from the same weights, recipe and text;
leave in the run's folder what the joint run leaves there; score teacher and students block by block.
""",
        _nothing,
        _stitch,
        _SECTIONS,
    ),
    "shard": Action(
        "copy each block's tensors into a folder of its own",
        """\
For machines without a shared file system: a block's folder is all that `blocks train --weights` reads of the model.
""",
        _add_shard,
        _shard,
        ("model", "blocks"),
    ),
    "status": Action(
        "a table of the blocks: state, steps, loss, time, disk",
        "Show how far each block of a run is.\n",
        _nothing,
        _status,
        ("blocks",),
    ),
}
"""The actions by name."""

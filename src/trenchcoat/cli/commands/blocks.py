"""`trenchcoat blocks ACTION`."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.util import find_spec
from typing import Any

from trenchcoat.cli.command import Command, output_folder, path, recipe_command
from trenchcoat.cli.machine import add_machine, machine_of, with_json
from trenchcoat.config import UsageError, UserError

_SECTIONS = ("model", "student", "data", "transfer", "parallel", "blocks", "run")


def _blocks(args: argparse.Namespace) -> None:
    """Attention transfer block by block, for models larger than the machine.

    Attention transfer of a model that does not fit: a few layers (a block) at a time.
    """


def _plan(args: argparse.Namespace) -> Any:
    """Layers per block, memory, disk and hours of each option, before anything runs.

    Show how many layers a block may have on a machine; for 1, 2, 4, ... GPUs, what streaming (hidden states in memory
    or on disk), a pipeline over the GPUs and blocks in parallel need, how many bytes they read and write, and their
    minimum time; which resource is short or takes longest; and what `blocks run` would choose. It is computed from the
    model's sizes: no weights, no GPU.
    """
    from trenchcoat.planning.report import report_blocks_plan

    machine, tokens = machine_of(args)
    return with_json(args, report_blocks_plan(args.recipe, machine, tokens=tokens))


def _run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--parallel",
        action="store_true",
        help="each block as a separate job, several at a time (docs/CLUSTER.md)",
    )
    runs = "where --parallel runs its jobs: on this machine's devices, or Slurm (blocks.launcher)"
    add("--launcher", choices=["local", "slurm"], help=runs)


def _run(args: argparse.Namespace) -> Any:
    """The whole transfer on this machine, one block in memory at a time.

    Stream the training rows through the blocks: load a block, train its students on a pass of rows, hand the teacher's
    outputs to the next block. Hidden states are kept in memory or on disk, whichever is faster here. At the end the
    blocks are stitched into one adapter and scored. After a kill or Ctrl-C, the same command resumes. Under torchrun
    the processes share the micro-batches or, with blocks.ranks=pipeline, the layers. With --parallel the inputs of all
    blocks are collected on disk first, then every block is trained by a separate job. `trenchcoat finetune` with the
    same recipe continues from the result.
    """
    from trenchcoat.conversion.blocks import stages

    recipe = args.recipe
    if not args.parallel:
        if args.launcher is not None:
            raise UsageError(f"--launcher {args.launcher} is for `blocks run --parallel`: add it, or drop --launcher")
        return stages.run_blocks(recipe)
    if find_spec("submitit") is None:
        raise UserError("blocks run --parallel needs submitit: pip install submitit")
    from trenchcoat.conversion.blocks import launch

    launcher = args.launcher or recipe.blocks.launcher
    return launch.launch_blocks(
        dataclasses.replace(recipe, blocks=dataclasses.replace(recipe.blocks, launcher=launcher))
    )


def _collect(args: argparse.Namespace) -> Any:
    """Save the inputs of every block to disk, to train blocks separately.

    One pass of the teacher alone through all rows, one block in memory at a time. The hidden states before each block
    are kept in files with checksums; `blocks train` reads them, on any machine with access to the folder.
    """
    from trenchcoat.conversion.blocks import stages

    return stages.collect_inputs(args.recipe)


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--block", type=int, required=True, metavar="I", help="number of the block, from 0")
    source = "read its weights from a folder written by `blocks shard`"
    parser.add_argument("--weights", type=path, metavar="DIR", help=source)


def _train(args: argparse.Namespace) -> Any:
    """Train one block from collected inputs, independently of the others.

    Train the students of one block on the inputs that `blocks collect` saved. Blocks depend on nothing but their
    inputs, so any number of these commands may run at once.
    """
    from trenchcoat.conversion.blocks import stages

    return stages.train_block(args.recipe, args.block, args.weights)


def _stitch(args: argparse.Namespace) -> Any:
    """Make one adapter of all blocks, and score it.

    Check that every layer is in exactly one finished block and that all blocks come from the same weights, recipe and
    text; write the same files to the run's folder as the joint run; score teacher and students block by block.
    """
    from trenchcoat.conversion.blocks import stages

    return stages.stitch_blocks(args.recipe)


def _shard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=output_folder, required=True, metavar="DIR", help="parent of the blocks' folders")


def _shard(args: argparse.Namespace) -> Any:
    """Copy each block's tensors into a separate folder.

    For machines without a shared file system: a block's folder is all that `blocks train --weights` reads of the model.
    """
    from trenchcoat.conversion.blocks import stages

    return stages.shard_blocks(args.recipe, args.out)


def _status(args: argparse.Namespace) -> Any:
    """A table of the blocks: state, steps, loss, time, disk.

    Show the progress of each block of a run.
    """
    from trenchcoat.conversion.blocks import stages

    return stages.show_status(args.recipe)


COMMAND = Command(
    _blocks,
    actions={
        "plan": recipe_command(
            _plan,
            add_machine,
            sections=("blocks",),
            here=False,
            examples=("blocks plan llama3_1_405b_blocks --gpus 8 --disk 2TB",),
        ),
        "run": recipe_command(
            _run, _run_options, sections=_SECTIONS, here=False, examples=("blocks run llama3_1_70b_blocks",)
        ),
        "collect": recipe_command(_collect, sections=_SECTIONS, here=False),
        "train": recipe_command(_train, _train_options, sections=_SECTIONS, here=False),
        "stitch": recipe_command(_stitch, sections=_SECTIONS, here=False),
        "shard": recipe_command(_shard, _shard_options, sections=("model", "blocks"), here=False, shortcuts=()),
        "status": recipe_command(_status, sections=("blocks",), here=False),
    },
)

"""What the `trenchcoat blocks` commands refuse before they begin."""

from __future__ import annotations

import os
from collections.abc import Sequence

from trenchcoat.config import Recipe, TransferConfig, UserError
from trenchcoat.linearize.blocks.folder import Block, BlockFolder, blocks_folder, divide, found_blocks
from trenchcoat.linearize.blocks.model import BlockSource
from trenchcoat.runtime import distributed
from trenchcoat.runtime.lock import InUse, holder
from trenchcoat.students import student_class


def check_recipe(recipe: Recipe) -> TransferConfig:
    """The recipe's transfer; raises ``UserError`` for settings with which nothing can be done by blocks."""
    if recipe.transfer is None:
        raise UserError("transfer=null: without attention transfer there are no blocks to train")
    if recipe.data.select != "none":
        raise UserError(
            f"data.select={recipe.data.select} looks at the text with the whole model, which blocks never load: leave "
            "it out, or give the selected rows as a file"
        )
    if recipe.model.quantize != "none":
        raise UserError(
            f"model.quantize={recipe.model.quantize}: blocks are read as they are stored. Leave it out here, and set "
            "it for `trenchcoat finetune`, which goes on over a 4-bit base"
        )
    try:
        student_class(recipe.student.name)
    except ValueError as error:
        raise UserError(str(error)) from error
    return recipe.transfer


def check_blocks(recipe: Recipe, source: BlockSource, blocks: list[Block]) -> None:
    """Raise ``UserError`` when the recipe names blocks or layers that there are not."""
    epochs, kept = recipe.blocks.epochs, recipe.student.keep_softmax
    if epochs and len(epochs) != len(blocks):
        raise UserError(
            f"blocks.epochs has {len(epochs)} entries, and there are {len(blocks)} blocks: give one for each"
        )
    if kept and max(kept) >= source.layers:
        raise UserError(f"student.keep_softmax names layer {max(kept)}, but the layers are 0..{source.layers - 1}")
    if len(set(kept)) == source.layers:
        raise UserError(f"student.keep_softmax names all {source.layers} layers; leave out the ones to linearize")


def check_found(recipe: Recipe, blocks: list[Block], cut_for: str) -> None:
    """Raise ``UserError`` when the run's folder holds blocks that do not go with these."""
    if cut_for == "any":
        return
    asked = f"blocks.size={recipe.blocks.size}"
    if cut_for == "ranges":
        asked = f"{distributed.size()} processes"
        blocks = divide(blocks, distributed.size())
    known = {(block.first, block.stop) for block in blocks}
    for found in found_blocks(recipe):
        if (found.first, found.stop) not in known:
            mend = "start as many processes as before" if cut_for == "ranges" else "use its size"
            raise UserError(
                f"{blocks_folder(recipe)} holds a block of layers {found.first} to {found.stop - 1}, which is none of "
                f"those that {asked} gives: {mend}, another run.dir, or delete it"
            )


def require_ranks(recipe: Recipe, cut_for: str) -> None:
    """Raise ``UserError`` when `blocks.ranks` is not for this command, or there are no processes for it."""
    if recipe.blocks.ranks != "pipeline" or cut_for == "any":
        return
    if cut_for == "blocks":
        raise UserError("blocks.ranks=pipeline is a way of `blocks run`: set blocks.ranks=data for the other commands")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise UserError(
            "blocks.ranks=pipeline is for several processes: start them with torchrun --nproc_per_node N, or set "
            "blocks.ranks=data"
        )


def require_free(folders: Sequence[BlockFolder]) -> None:
    """Raise ``InUse`` when another process is training one of these blocks: a job of a launcher that is gone, say."""
    for folder in folders:
        who = holder(folder.directory)
        if who is not None:
            raise InUse(f"{folder.block} is in use by {who}. Stop it, or wait for it, as `blocks run --parallel` does")

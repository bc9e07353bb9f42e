"""The selection of groups for a model that is only ever in memory one block of layers at a time.

A ``selection.json`` made by `trenchcoat select` is used as it is. Otherwise the method of the recipe runs here if it
only observes the forward pass (`retrieval`): the rows go through all blocks once, and weights are read once.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from trenchcoat.config import Recipe, UserError
from trenchcoat.config.keep import needs_selection, requested_groups
from trenchcoat.evaluation.selection import SELECTION_FILE, Selection
from trenchcoat.linearize.blocks.model import BlockSource, ReadAhead
from trenchcoat.linearize.run import open_run
from trenchcoat.linearize.selection.probe import AttentionFunction, Observe, training_rows
from trenchcoat.linearize.selection.run import (
    probe_of,
    read_selection,
    scored,
    selection_length,
    with_groups,
    write_selection,
)
from trenchcoat.models.attach import attention_through
from trenchcoat.models.loading import load_tokenizer, model_source
from trenchcoat.models.text import embeddings_of
from trenchcoat.runtime import distributed
from trenchcoat.runtime.runfolder import RunFolder
from trenchcoat.runtime.runlog import SilentLog
from trenchcoat.training.objectives import forward_decoder


def with_selection(recipe: Recipe, source: BlockSource | None = None) -> Recipe:
    """The recipe with the groups that ``student.keep`` asks for named, if it only says how many; a collective.

    Raises ``UserError`` for a selection on other weights, and for a method that needs the whole model.
    """
    if not needs_selection(recipe.student):
        return recipe
    source = BlockSource(recipe.model) if source is None else source
    folder = RunFolder(recipe.run.dir)
    found = read_selection(recipe, folder, SilentLog(folder.directory))
    if found is None:
        found = _select(recipe, source)
    if found.base != source.fingerprint:
        raise UserError(
            f"the groups to keep were selected on other base weights ({found.base}) than these ({source.fingerprint}): "
            f"delete {folder.directory / SELECTION_FILE} to select again, or give the model it was made with"
        )
    number = requested_groups(recipe.student, found.groups)
    if found.kept != found.keep(number):
        found = dataclasses.replace(found, kept=found.keep(number))
        write_selection(found, folder)
    return with_groups(recipe, found.kept)


def _select(recipe: Recipe, source: BlockSource) -> Selection:
    if source.part is not None:
        raise UserError(
            f"{source.folder} holds only some layers, and the groups to keep are not selected yet: run `trenchcoat "
            "select` or `blocks collect` first, where the whole model is, and copy the run's folder"
        )
    length = selection_length(recipe)
    with open_run(recipe, []) as run:
        tokenizer = load_tokenizer(recipe.model, model_source(recipe.model), embeddings_of(source.plain))
        data = dataclasses.replace(recipe.data, seq_len=length)
        rows = training_rows(run.load_batches(tokenizer, batch_size=1, data=data), recipe.select.rows, length)
        probe = probe_of(recipe, source.plain, block_observer(source), rows, run.log)
        return scored(recipe, probe, source.fingerprint)


def block_observer(source: BlockSource) -> Observe:
    """``Probe.observe``, one layer in memory at a time while the next one is read."""

    def observe(function: AttentionFunction, ids_NT: Tensor) -> None:
        """All rows of this process go through a layer before the next one."""
        mine = [i for i in distributed.share(range(len(ids_NT))) if i is not None]
        if not mine:
            return
        hidden_NTd = forward_decoder(source.embedding(), {"input_ids": ids_NT[mine]})
        ahead = ReadAhead(source)
        try:
            for layer in range(source.layers):
                model = ahead.block(layer, layer + 1)
                if layer + 1 < source.layers:
                    ahead.start(layer + 1, layer + 2)
                with attention_through(model, function):
                    for i in range(len(mine)):
                        states = hidden_NTd[i : i + 1].to(source.device)
                        hidden_NTd[i : i + 1] = forward_decoder(model, {"inputs_embeds": states}).to("cpu")
                del model
        finally:
            ahead.close()

    return observe

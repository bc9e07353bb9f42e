"""The `trenchcoat blocks` commands; :mod:`trenchcoat.conversion.blocks.run` does the work."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from trenchcoat.config import Recipe, TransferConfig, UserError, dump_recipe
from trenchcoat.config.keep import named_layers, whole_layers
from trenchcoat.config.units import in_words, tera
from trenchcoat.conversion.blocks.data import spans
from trenchcoat.conversion.blocks.folder import (
    BlockFolder,
    LayerBlock,
    blocks_folder,
    cut,
    divide,
    found_blocks,
    hidden_folder,
    merge_logs,
    require_cover,
)
from trenchcoat.conversion.blocks.model import BlockSource
from trenchcoat.conversion.blocks.pipeline import Pipeline
from trenchcoat.conversion.blocks.run import BlockRun, Collection, Stream
from trenchcoat.conversion.blocks.score import score_blocks
from trenchcoat.conversion.blocks.select import with_selection
from trenchcoat.conversion.held_out import evaluation_length, evaluation_rows
from trenchcoat.conversion.ready import check_settings
from trenchcoat.conversion.run import LANDMARK_ROWS, OpenRun, check_names, idle_warning, open_run
from trenchcoat.conversion.stages import next_stage
from trenchcoat.conversion.variants import BASE_WEIGHTS
from trenchcoat.data.batches import Batches
from trenchcoat.evaluation.report import run as report
from trenchcoat.evaluation.results import Outcome, Results, StageFacts
from trenchcoat.evaluation.rows import TEACHER, TransferOnlyRow
from trenchcoat.models import hub
from trenchcoat.models.flops import student_parameters, transfer_flops_per_token
from trenchcoat.models.loading import load_tokenizer, model_source
from trenchcoat.models.shapes import shapes_of
from trenchcoat.models.text import embeddings_of
from trenchcoat.planning.bandwidth import flop_rate, read_rate, write_rate
from trenchcoat.planning.blocks.passes import PassChoice, Streamed, choose_pass
from trenchcoat.planning.blocks.size import choose_block_size
from trenchcoat.planning.footprint import StepSizes, checkpoint_bytes
from trenchcoat.planning.plan import HOST_LINK
from trenchcoat.runtime import distributed
from trenchcoat.runtime.files import InUse, holder
from trenchcoat.runtime.machine import free_disk, free_memory, require_disk, used_disk
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder
from trenchcoat.students import student_class
from trenchcoat.training.schedules import evaluation_batches, training_length

FREE_SHARE = 0.8
"""Fraction of the free memory available to hidden states and prefetched weights."""


# The commands


def run_blocks(recipe: Recipe) -> Outcome:
    """The whole transfer, then stitch: streamed, one block in memory at a time, or (`blocks.ranks=pipeline`) with a
    range of layers per process. Running the same command again continues."""
    if recipe.blocks.ranks == "pipeline":
        with open_blocks(recipe, cut_for="ranges") as work:
            work.evaluation_text()  # before training: it may be too short
            Pipeline(work, divide(work.blocks, distributed.size()), host_memory=_host_memory()).go()
            return _stitched(work)
    with open_blocks(recipe) as work:
        work.evaluation_text()
        stream_blocks(work)
        return _stitched(work)


def stream_blocks(work: BlockRun) -> None:
    """Stream the rest of the transfer."""
    if all(work.folders[number].finished for number in range(len(work.blocks)) if work.learns(number)):
        return
    distributed.from_main(lambda: require_free(work.folders))
    choice = _choose_pass(work)
    work.log.info(choice.why)
    stream = Stream(work, hidden_folder(work.recipe) if choice.hidden == "disk" else None)
    passes = spans(max(work.totals), max(1, choice.pass_tokens // _step_tokens(work)))
    stream.remove_stale(passes)
    for span in passes:
        stream.go(span)


def collect_inputs(recipe: Recipe) -> Outcome:
    """Store the inputs of every block on disk, for `train`: one pass of the teacher alone."""
    with open_blocks(recipe) as work:
        collection = Collection(work, hidden_folder(recipe))
        _require_disk(recipe, collection)
        collection.fill(len(work.blocks) - 1).close()
        return Outcome((f"the inputs of {len(work.blocks)} blocks are in {collection.folder}",))


def train_block(recipe: Recipe, number: int, weights: Path | None = None) -> Outcome:
    """Train a single block on collected inputs; ``weights`` is its folder made by `shard`."""
    with open_blocks(recipe, block=number, weights=weights) as work:
        block = work.blocks[number]
        if not work.learns(number):
            return Outcome((f"nothing to train in {block}: all its layers keep softmax attention",))
        distributed.from_main(work.folders[number].begin)
        Collection(work, hidden_folder(recipe)).train(number)
        facts = work.folders[number].result()
        assert facts is not None
        return Outcome((f"{block}: {facts['steps']} steps, best evaluation loss {facts['best_loss']:.4g}",))


def shard_blocks(recipe: Recipe, out: Path) -> Outcome:
    """Copy each block's tensors, with the tokenizer and the config, into a separate folder."""
    source = BlockSource(recipe.model)
    tokenizer = load_tokenizer(recipe.model, model_source(recipe.model), embeddings_of(source.plain))
    blocks = cut(source.layers, _size(recipe, source))
    lines = []
    for block in blocks:
        folder = out / block.folder
        if not (folder / "config.json").is_file():
            source.copy_block(block.first, block.stop, folder, tokenizer)
        lines.append(f"{folder}: {block}, {tera(used_disk(folder))}")
    return Outcome(tuple(lines))


def stitch_blocks(recipe: Recipe) -> Outcome:
    """Combine all blocks into one adapter, as the joint run would write it, and score it."""
    if not found_blocks(recipe):
        raise UserError(
            f"{recipe.run.dir} holds no trained blocks: train them first, with `trenchcoat blocks run` or with "
            "`blocks collect` and `blocks train`"
        )
    with open_blocks(recipe, cut_for="any") as work:
        return _stitched(work)


def checked_blocks(recipe: Recipe, share: int = 1) -> tuple[list[LayerBlock], list[LayerBlock]]:
    """The blocks of a recipe, checked against its settings and the run's folder, and those of them that have a layer to
    linearize; nothing is locked or written.

    ``share``: number of processes that will share this machine's memory, used when the size is chosen automatically.
    """
    require_ranks(recipe, "blocks")
    check_recipe(recipe)
    RunFolder(recipe.run.dir).refuse_other_recipe(recipe, [TRANSFER])
    source = BlockSource(recipe.model)
    blocks = cut(source.layers, _size(recipe, source, share))
    check_blocks(recipe, source, blocks)
    check_found(recipe, blocks, "blocks")
    whole = whole_layers(recipe.student, source.groups)
    return blocks, [block for block in blocks if not whole.issuperset(range(block.first, block.stop))]


def show_status(recipe: Recipe) -> Outcome:
    """A table of the blocks in the run's folder."""
    source = BlockSource(recipe.model)
    blocks = found_blocks(recipe) or cut(source.layers, _size(recipe, source))
    table = Table(title=f"blocks of {recipe.run.dir}")
    for name in ("block", "layers", "state", "steps", "loss", "time", "disk"):
        table.add_column(name, justify="left" if name in ("layers", "state") else "right")
    for block in blocks:
        table.add_row(*_status_row(BlockFolder(recipe, block), block))
    hidden = used_disk(hidden_folder(recipe))
    return Outcome((table, f"hidden states on disk: {tera(hidden)}"))


# Opening a run


@contextmanager
def open_blocks(
    recipe: Recipe,
    *,
    block: int | None = None,
    weights: Path | None = None,
    cut_for: Literal["blocks", "ranges", "any"] = "blocks",
) -> Iterator[BlockRun]:
    """Open the blocks of a recipe with their text and log, locking the run's folder or that of one ``block``.

    ``cut_for``: what the run's folder may hold: these ``blocks``, the processes' ``ranges`` of them, or ``any``.
    """
    transfer = check_recipe(recipe)
    require_ranks(recipe, cut_for)
    with distributed.joined(recipe.parallel, recipe.model.device):
        source = BlockSource(recipe.model, weights)
        blocks = cut(source.layers, distributed.from_main(lambda: _size(recipe, source)))
        if block is not None and not 0 <= block < len(blocks):
            raise UserError(f"--block {block}: the blocks of {recipe.run.dir} are 0 to {len(blocks) - 1}")
        alone = None if block is None else BlockFolder(recipe, blocks[block]).directory
        recipe = with_selection(recipe, source)
        with open_run(recipe, [TRANSFER], alone) as run:
            check_blocks(recipe, source, blocks)
            distributed.from_main(lambda: check_found(recipe, blocks, cut_for))
            folder = model_source(recipe.model) if weights is None else str(weights)
            tokenizer = load_tokenizer(recipe.model, folder, embeddings_of(source.plain))
            text = run.load_batches(tokenizer, batch_size=transfer.batch_size)
            start = None
            if student_class(recipe.student.name).starts_from_text(recipe.student):
                start = run.load_batches(tokenizer, batch_size=LANDMARK_ROWS).train_batch(0)
            scored = partial(_evaluation_text, run, tokenizer, text)
            if block is None:
                _record(run, source, blocks)
            with BlockRun(recipe, source, text, blocks, run.log, scored, start=start) as work:
                yield work


def _evaluation_text(run: OpenRun, tokenizer: Any, text: Batches) -> Batches:
    """``text``, in rows of the length that is evaluated."""
    length, data = evaluation_length(run.recipe), run.recipe.data
    if length == data.seq_len:
        return text
    data = dataclasses.replace(data, seq_len=length)
    return run.load_batches(tokenizer, batch_size=run.recipe.eval.batch_size, data=data)


def _record(run: OpenRun, source: BlockSource, blocks: Sequence[LayerBlock]) -> None:
    """Record the recipe in the run's folder and log the run's settings."""
    recipe = run.recipe
    assert recipe.transfer is not None
    idle = idle_warning(recipe.transfer)
    if idle is not None and recipe.blocks.ranks != "pipeline":
        run.log.warning(idle)
    distributed.from_main(lambda: run.folder.begin(TRANSFER, recipe, {}))
    run.log.write_recipe(dump_recipe(recipe))
    operator = run.write_environment(source.plain, source.attention, dtype=source.dtype, device=source.device)
    run.log.info(
        f"run folder {recipe.run.dir}; model {recipe.model.path}, {source.layers} layers in {len(blocks)} "
        f"blocks; student {recipe.student.name} ({operator} operator); weights in {source.dtype}"
    )


def _size(recipe: Recipe, source: BlockSource, share: int = 1) -> int:
    """Layers per block: as set, 1 for a pipeline, as in the run's folder, or as many as fit the device.

    ``share`` processes share the host's memory.
    """
    found = found_blocks(recipe)
    if recipe.blocks.ranks == "pipeline" and recipe.blocks.size is None:
        return 1
    if found and recipe.blocks.size is None:
        return max(block.stop - block.first for block in found)
    assert recipe.transfer is not None
    gpu = torch.cuda.mem_get_info(source.device)[0] if source.device.type == "cuda" else None
    shapes, seq_len = shapes_of(source.config), recipe.data.seq_len
    step = StepSizes(shapes, recipe.student, recipe.transfer, seq_len, source.dtype.itemsize)
    memory = _host_memory() / share
    return choose_block_size(step, gpu_memory=gpu, host_memory=memory, size=recipe.blocks.size).layers


def _host_memory() -> float:
    """Bytes that one process may use."""
    free = free_memory()
    return math.inf if free is None else FREE_SHARE * free / distributed.world().local_size


# Checks before anything starts


def check_recipe(recipe: Recipe) -> TransferConfig:
    """The recipe's transfer settings; raises ``UserError`` for settings that blocks do not support."""
    if recipe.transfer is None:
        raise UserError("transfer=null: without attention transfer there are no blocks to train")
    if recipe.data.select != "none":
        raise UserError(
            f"data.select={recipe.data.select} scores the text with the whole model, which blocks never load: leave "
            "it out, or give the selected rows as a file"
        )
    if recipe.model.quantize != "none":
        raise UserError(
            f"model.quantize={recipe.model.quantize}: blocks are read as stored. Leave it out here, and set it for "
            "`trenchcoat finetune`, which continues on a 4-bit base"
        )
    check_names(recipe)
    return recipe.transfer


def check_blocks(recipe: Recipe, source: BlockSource, blocks: list[LayerBlock]) -> None:
    """Raise ``UserError`` when the recipe names blocks or layers that do not exist, when its settings do not fit the
    model, and when its checkpoints do not fit on the disk."""
    check_settings(recipe, source.plain)
    maps = student_parameters(shapes_of(source.config), recipe.student)
    written = checkpoint_bytes(maps, recipe.transfer or TransferConfig())
    distributed.from_main(lambda: require_disk([(blocks_folder(recipe), written, "checkpoints of the blocks")]))
    epochs, student = recipe.blocks.epochs, recipe.student
    if epochs and len(epochs) != len(blocks):
        raise UserError(
            f"blocks.epochs has {len(epochs)} entries, but there are {len(blocks)} blocks: give one for each"
        )
    named, whole = named_layers(student), whole_layers(student, source.groups)
    setting = "keep" if student.keep else "keep_softmax"
    if named and max(named) >= source.layers:
        raise UserError(f"student.{setting} names layer {max(named)}, but the layers are 0..{source.layers - 1}")
    if len(whole) == source.layers:
        raise UserError(f"student.{setting} names all {source.layers} layers; leave out the ones to linearize")
    alone = [block for block in blocks if whole.issuperset(range(block.first, block.stop))]
    if alone and student.kept_log_scale is not None:
        raise UserError(
            f"student.kept_log_scale={student.kept_log_scale:g}: all layers of a block ({alone[0].first} to "
            f"{alone[0].stop - 1}) are kept, and such a block is scored as the model's own: choose another blocks.size"
        )


def check_found(recipe: Recipe, blocks: list[LayerBlock], cut_for: str) -> None:
    """Raise ``UserError`` when the run's folder holds blocks with other boundaries."""
    if cut_for == "any":
        return
    asked = f"blocks.size={recipe.blocks.size}"
    if cut_for == "ranges":
        asked = f"{distributed.size()} processes"
        blocks = divide(blocks, distributed.size())
    known = {(block.first, block.stop) for block in blocks}
    for found in found_blocks(recipe):
        if (found.first, found.stop) not in known:
            fix = "start as many processes as before" if cut_for == "ranges" else "use its size"
            raise UserError(
                f"{blocks_folder(recipe)} holds a block of layers {found.first} to {found.stop - 1}, which does not "
                f"match {asked}: {fix}, use another run.dir, or delete it"
            )


def require_ranks(recipe: Recipe, cut_for: str) -> None:
    """Raise ``UserError`` when this command does not support `blocks.ranks`, or needs more processes for it."""
    if recipe.blocks.ranks != "pipeline" or cut_for == "any":
        return
    if cut_for == "blocks":
        raise UserError("blocks.ranks=pipeline only works with `blocks run`: set blocks.ranks=data for other commands")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise UserError(
            "blocks.ranks=pipeline needs several processes: start them with torchrun --nproc_per_node N, or set "
            "blocks.ranks=data"
        )


def require_free(folders: Sequence[BlockFolder]) -> None:
    """Raise ``InUse`` when another process, such as a job of an earlier launcher, is training one of these blocks."""
    for folder in folders:
        who = holder(folder.directory)
        if who is not None:
            raise InUse(f"{folder.block} is in use by {who}. Stop it, or wait for it with `blocks run --parallel`")


# Choosing the passes


def _step_tokens(work: BlockRun) -> int:
    return work.cfg.accumulation * work.cfg.batch_size * work.recipe.data.seq_len


def _choose_pass(work: BlockRun) -> PassChoice:
    """The pass that `blocks.pass_tokens` and `blocks.hidden` give on this machine; the same on every process."""
    recipe = work.recipe

    def choose() -> PassChoice:
        """On the main process: choose from the sizes of the run and the speed of this machine."""
        place = hidden_folder(recipe)
        bytes_a_token = float(work.source.hidden * work.source.dtype.itemsize)
        seq_len, batch = recipe.data.seq_len, work.cfg.batch_size
        held_out = evaluation_batches(work.cfg, work.text.validation_batches())
        blocks = 2 * max(work.source.layer_bytes(b.first, b.stop) for b in work.blocks)
        on_host = blocks if work.source.device.type == "cpu" else blocks / 2
        rate = flop_rate(work.source.device, work.source.dtype) * distributed.size()
        shapes = shapes_of(work.source.config)
        xent = work.cfg.xent_weight > 0
        flops = transfer_flops_per_token(shapes, recipe.student, seq_len, xent=xent).total
        world = distributed.world()
        return choose_pass(
            Streamed(
                tokens=max(training_length(work.stage(b), len(work.text))[0] for b in work.blocks) * batch * seq_len,
                distinct=min(len(work.text) * batch, work.text.rows("train")) * seq_len,
                validation=held_out * batch * seq_len,
                step_tokens=_step_tokens(work),
                bytes_a_token=bytes_a_token,
                weights=float(sum(work.source.layer_bytes(b.first, b.stop) for b in work.blocks)),
                blocks=len(work.blocks),
                memory=max(0.0, (_host_memory() - on_host) * world.local_size),
                disk=float(free_disk(place)) - recipe.blocks.shard_mib * 2.0**20,
                read=read_rate(work.source.files()),
                write=math.inf if recipe.blocks.hidden == "memory" else write_rate(place),
                compute=flops / rate,
                copy=HOST_LINK if work.source.device.type == "cuda" else None,
                nodes=max(1, world.size // world.local_size),
            ),
            pass_tokens=recipe.blocks.pass_tokens,
            hidden=recipe.blocks.hidden,
        )

    return distributed.from_main(choose)


def _require_disk(recipe: Recipe, collection: Collection) -> None:
    """Raise ``UserError`` when what `collect` still has to write does not fit on the disk."""

    def check() -> None:
        """On the main process: compare with the free space."""
        have = used_disk(collection.folder)
        needed = collection.bytes - have
        free = free_disk(collection.folder)
        if needed > free:
            raise UserError(
                f"the inputs of all blocks need {tera(collection.bytes)} in {collection.folder}; {tera(needed)} of it "
                f"is still to be written and {tera(free)} is free: set blocks.hidden_dir to a larger disk, use larger "
                "blocks (blocks.size), or use `blocks run`, which keeps the states of two boundaries at most"
            )

    distributed.from_main(check)


# Stitching


def _stitched(work: BlockRun) -> Outcome:
    recipe, folder = work.recipe, RunFolder(work.recipe.run.dir)
    weights = distributed.from_main(lambda: _merged(work, folder))
    merged = folder.result(TRANSFER)
    assert merged is not None
    facts = StageFacts(**merged)
    work.log.info("scoring the teacher and the transferred students, block by block")
    text = evaluation_rows(work.evaluation_text(), recipe.eval.rows)
    teacher, student = score_blocks(work, weights, text, batch_size=recipe.eval.batch_size)
    found = Results(
        recipe.student.window,
        text.ids.shape[1],
        rows={TEACHER: teacher, TransferOnlyRow.name: student},
        recipe=dataclasses.asdict(recipe),
    )
    distributed.from_main(lambda: found.save(blocks_folder(recipe) / "evaluation.json"))
    summary = f"{facts.steps} steps, {facts.tokens} tokens, best evaluation loss {facts.best_loss:.4g}"
    return Outcome(
        (
            report.terminal_table(found),
            f"{len(work.blocks)} blocks stitched: {summary}",
            f"the adapter is in {recipe.run.dir}/adapter{next_stage(recipe)}",
        ),
        found,
    )


def _merged(work: BlockRun, folder: RunFolder) -> dict[str, Tensor]:
    """The checked weights of all blocks; writes them to the run's folder as the joint run would."""
    recipe = work.recipe
    blocks = found_blocks(recipe)
    wanted = set(range(work.source.layers)) - whole_layers(recipe.student, work.source.groups)
    require_cover(blocks, wanted)
    weights: dict[str, Tensor] = {}
    records = [BlockFolder(recipe, block, work.identity) for block in blocks]
    figures = [record.require_finished() for record in records]
    for record in records:
        weights |= record.weights()
    folder.begin(TRANSFER, recipe, {BASE_WEIGHTS: work.source.fingerprint, "text": work.text.fingerprint})
    linear = [len(wanted & set(range(block.first, block.stop))) for block in blocks]
    at_once = all(one.get("at_once") for one in figures)
    facts = StageFacts(
        TRANSFER,
        max(one["steps"] for one in figures),
        max(one["tokens"] for one in figures),
        (max if at_once else sum)(one["seconds"] for one in figures),
        sum(one["best_loss"] * count for one, count in zip(figures, linear, strict=True)) / sum(linear),
    )
    merge_logs([record.directory for record in records], work.log, at_once=at_once)
    hub.write_students(
        Path(recipe.run.dir) / "adapter",
        weights,
        work.source.config,
        base=recipe.model,
        student=recipe.student,
        base_fingerprint=work.source.fingerprint,
    )
    folder.finish(TRANSFER, weights, dataclasses.asdict(facts))
    return weights


# The table


def _status_row(record: BlockFolder, block: LayerBlock) -> list[str]:
    layers = f"{block.first}-{block.stop - 1}" if block.stop - block.first > 1 else str(block.first)
    result, at = record.result(), record.last_evaluation()
    if result is not None:
        state = "stopped early" if result.get("early") else "finished"
        steps, loss, seconds = str(result["steps"]), f"{result['best_loss']:.4g}", in_words(result["seconds"])
    elif at is not None:
        state, steps, loss, seconds = "started", str(at["step"]), f"{at['loss']:.4g}", in_words(at["seconds"])
    else:
        state, steps, loss, seconds = "waiting", "", "", ""
    return [str(block.number), layers, state, steps, loss, seconds, tera(used_disk(record.directory))]

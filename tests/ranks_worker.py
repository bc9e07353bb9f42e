"""One process of several under torchrun: runs the jobs of a JSON file in order and writes their results.

    torchrun --nproc_per_node 2 ranks_worker.py JOBS OUT [DELAY]

A job is ``{"do": name, "overrides": [...]}`` with the name of a command in ``stages`` or of a function below. ``OUT``
gets ``rank-<r>.json`` with the result of each job, or the error that every process must have raised. DELAY slows down
every training micro-batch, so that a test can kill a process midway.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from trenchcoat.config import ParallelConfig, Recipe, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.conversion.blocks import pipeline
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.blocks.chain import TRAIN, BatchKey
from trenchcoat.conversion.blocks.folder import LayerBlock, found_blocks
from trenchcoat.conversion.blocks.run import BlockRun
from trenchcoat.conversion.variants import ModelVariants, open_variants
from trenchcoat.data import load as data
from trenchcoat.models.attach import freeze_for_transfer, set_mode, students_of
from trenchcoat.models.loading import load_base
from trenchcoat.models.lora import freeze_for_lora
from trenchcoat.runtime import distributed
from trenchcoat.runtime.interrupts import StopSignal
from trenchcoat.runtime.sharding import is_sharded
from trenchcoat.training import loop as train
from trenchcoat.training.checkpoints import checkpoint_folders
from trenchcoat.training.objectives import next_token_objective, transfer_objective


def collectives(recipe: Recipe) -> dict[str, Any]:
    """Names of the collectives of one micro-batch of each stage, before any optimizer step."""
    from torch.distributed.tensor.debug import CommDebugMode  # seconds, which the other jobs need not spend

    assert recipe.transfer is not None
    assert recipe.lora is not None
    found: dict[str, Any] = {}
    with open_variants(recipe, []) as variants:
        model = variants.assemble()
        batch = variants.batches(1).train_batch(0)
        set_mode(model, "transfer")
        freeze_for_transfer(model)
        with CommDebugMode() as seen:
            transfer_objective(recipe.transfer)(model, batch)
        found["transfer"] = {str(op): count for op, count in seen.get_comm_counts().items()}
        model = variants.assemble(lora=True)
        freeze_for_lora(model, recipe.lora)
        with CommDebugMode() as seen:
            next_token_objective()(model, batch)
        found["lora"] = {str(op): count for op, count in seen.get_comm_counts().items()}
        found["sharded"] = is_sharded(model)
        found["student parameters whole"] = all(
            type(p.data) is torch.Tensor for s in students_of(model).values() for p in s.parameters()
        )
    return found


def poisoned(recipe: Recipe) -> None:
    """Stage 1 with a NaN in the second layer's student, only on the last process."""
    whole = ModelVariants._prepare

    def prepare(variants: ModelVariants, stage: str, *, fresh: bool = False) -> Any:
        prepared = whole(variants, stage, fresh=fresh)
        if distributed.rank() == distributed.size() - 1:
            with torch.no_grad():
                next(students_of(variants.model)[1].parameters()).fill_(float("nan"))
        return prepared

    ModelVariants._prepare = prepare  # type: ignore[method-assign]
    try:
        stages.transfer(recipe)
    finally:
        ModelVariants._prepare = whole  # type: ignore[method-assign]


def stopped(recipe: Recipe) -> str:
    """Both stages; the last process gets a stop request (as by Ctrl-C) during the second step of stage 2."""
    whole = train._Loop.train_step

    def step(loop: train._Loop, stop: StopSignal, display: Any) -> None:
        if loop.stage == "lora" and loop.at.step == 1 and distributed.rank() == distributed.size() - 1:
            stop.requested = distributed.size() > 1
        whole(loop, stop, display)
        if loop.stage == "lora" and loop.at.step == 2:
            stop.requested = True

    train._Loop.train_step = step  # type: ignore[method-assign]
    try:
        stages.linearize(recipe)
    except KeyboardInterrupt:
        return "stopped"
    finally:
        train._Loop.train_step = whole  # type: ignore[method-assign]
    return "done"


def blocks(recipe: Recipe) -> str:
    """Transfer block by block."""
    blockstages.run_blocks(recipe)
    return "done"


def blocks_poisoned(recipe: Recipe) -> None:
    """The same with a NaN in the last layer's student of the second process."""
    whole = BlockRun.make_ready

    def make_ready(work: BlockRun, model: Any, block: LayerBlock) -> None:
        whole(work, model, block)
        if block.number == 1:
            with torch.no_grad():
                next(students_of(model)[block.stop - 1].parameters()).fill_(float("nan"))

    BlockRun.make_ready = make_ready  # type: ignore[method-assign]
    try:
        blockstages.run_blocks(recipe)
    finally:
        BlockRun.make_ready = whole  # type: ignore[method-assign]


def blocks_stopped(recipe: Recipe) -> list[list[str]] | str:
    """The same with a SIGTERM to the last process before micro-batch 13; returns the checkpoints of every block."""
    whole = pipeline.Feed._take

    def take(feed: pipeline.Feed, item: BatchKey) -> dict[str, torch.Tensor]:
        if feed.chain.last and item == BatchKey(TRAIN, 13):
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(feed, item)

    pipeline.Feed._take = take  # type: ignore[method-assign]
    try:
        blockstages.run_blocks(recipe)
    except KeyboardInterrupt:
        distributed.barrier()
        return [[path.name for path in folders] for folders in _block_checkpoints(recipe)]
    finally:
        pipeline.Feed._take = whole  # type: ignore[method-assign]
    return "done"


def blocks_behind(recipe: Recipe) -> None:
    """The last block loses its newest checkpoint."""
    if distributed.is_main():
        shutil.rmtree(_block_checkpoints(recipe)[-1][-1])
    distributed.barrier()


def _block_checkpoints(recipe: Recipe) -> list[list[Path]]:
    places = (Path(recipe.run.dir) / "blocks" / b.folder for b in found_blocks(recipe))
    return [checkpoint_folders(place / "checkpoints" / "transfer") for place in places]


def loading(recipe: Recipe) -> dict[str, Any]:
    """Bytes: peak resident memory added by loading, this process's shards, and one layer."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    model, _ = load_base(recipe.model, recipe.parallel)
    layers: Any = model
    one = layers.model.layers[0]
    return {
        "added": _status("VmHWM") - before,
        "shards": sum(p.to_local().nbytes for p in model.parameters()),  # type: ignore[attr-defined]
        "layer": sum(p.nbytes for p in one.parameters()),
        "whole": sum(p.nbytes for p in model.parameters()),
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def blocks_apart(recipe: Recipe) -> str:
    """Collect the inputs and train every block, with all processes."""
    blockstages.collect_inputs(recipe)
    for number in (1, 0):
        blockstages.train_block(recipe, number)
    blockstages.stitch_blocks(recipe)
    return "done"


OWN = {
    "collectives": collectives, "poisoned": poisoned, "stopped": stopped, "loading": loading, "blocks": blocks,
    "blocks_apart": blocks_apart, "blocks_poisoned": blocks_poisoned, "blocks_stopped": blocks_stopped,
    "blocks_behind": blocks_behind,
}  # fmt: skip


def do(job: dict[str, Any]) -> Any:
    """Run one job; its result must be JSON-serializable."""
    recipe = load_recipe("demo", job["overrides"])
    if job["do"] in OWN:
        return OWN[job["do"]](recipe)
    getattr(stages, job["do"])(recipe)
    return "done"


def main(jobs: Path, out: Path, delay: float) -> None:
    """Run all jobs in one process group."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"pid-{os.environ['RANK']}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}").write_text(str(os.getpid()))
    if delay:
        quick = data.Batches.train_batch

        def slow(self: data.Batches, index: int) -> dict[str, torch.Tensor]:
            time.sleep(delay)
            return quick(self, index)

        data.Batches.train_batch = slow  # type: ignore[method-assign]
    results: list[Any] = []
    with distributed.joined(ParallelConfig(timeout_seconds=60)):
        for job in json.loads(jobs.read_text()):
            try:
                results.append(do(job))
            except UserError as error:
                results.append(f"{type(error).__name__}: {error}")
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)

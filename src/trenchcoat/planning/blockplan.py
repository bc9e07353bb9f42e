"""Planning of block-wise attention transfer beside the joint run, for 1, 2, 4, ... GPUs: arithmetic on sizes, no I/O.

Blocks come from :mod:`trenchcoat.planning.blocksize`, passes from :mod:`trenchcoat.planning.blockpass`, what a way of
running them needs and takes from :mod:`trenchcoat.planning.blockways`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trenchcoat.config import Recipe, TransferConfig, UserError
from trenchcoat.models.flops import transfer_flops_per_token
from trenchcoat.models.shapes import Shapes
from trenchcoat.planning.blockways import PARALLEL, PIPELINE, STREAMING, BlockWay, Ways, Work
from trenchcoat.planning.plan import KNOWN_ROWS, Machine, Plan, Planner, make_plan

TEXT_HELD_OUT = 0.05
"""Of a `.txt` file, where `data.validation_fraction` says nothing."""


@dataclass(frozen=True, kw_only=True)
class BlocksPlan:
    """The answer; bytes and tokens."""

    model: str
    shapes: Shapes
    machine: Machine
    tokens: float
    """That the stage trains on, all epochs."""
    distinct: float
    """In distinct rows."""
    validation: float
    boundary_bytes: float
    """Hidden states of the distinct training rows at one boundary."""
    other_disk: float
    """Bytes of disk for everything else: weights, checkpoints, adapter, token cache."""
    ways: list[BlockWay]

    @property
    def chosen(self) -> BlockWay:
        """What `trenchcoat blocks run` does with all GPUs of the machine."""
        return next(way for way in self.of(self.machine.gpus) if way.asked)

    def of(self, gpus: int) -> list[BlockWay]:
        """The ways on so many GPUs."""
        return [way for way in self.ways if way.gpus == gpus]

    def best(self, gpus: int, kind: str | None = None) -> BlockWay | None:
        """The quickest way that fits, of one kind or of all but the joint run."""
        kinds = (STREAMING, PIPELINE, PARALLEL) if kind is None else (kind,)
        fitting = [way for way in self.of(gpus) if way.fits and way.kind in kinds]
        return min(fitting, key=lambda way: way.hours, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def plan_blocks(recipe: Recipe, machine: Machine, tokens: float | None = None) -> BlocksPlan:
    """Every way of running the attention transfer of ``recipe``, on 1, 2, 4, ... GPUs up to those of ``machine``.

    ``tokens`` is the size of one pass over the training data. Raises ``UserError`` for a recipe without transfer, data
    of unknown size, a model or GPU that is not known, and where not even a single layer fits the GPU.
    """
    if recipe.transfer is None:
        raise UserError("transfer=null: without attention transfer there are no blocks to plan")
    return blocks_of(*make_plan(recipe, machine, tokens=tokens), gpus=_counts(machine.gpus))


def blocks_of(planner: Planner, plan: Plan, *, gpus: Sequence[int]) -> BlocksPlan:
    """The same for a recipe with transfer that is planned already, on so many GPUs, the machine's last."""
    recipe, machine, other_disk = planner.recipe, planner.machine, sum(plan.disk.values())
    assert recipe.transfer is not None
    work = _work(planner, recipe.transfer)
    ways = [way for count in gpus for way in Ways(planner, recipe.transfer, work, count, other_disk).all()]
    return BlocksPlan(
        model=recipe.model.path,
        shapes=planner.shapes,
        machine=machine,
        tokens=work.tokens,
        distinct=work.distinct,
        validation=work.validation,
        boundary_bytes=work.distinct * work.bytes_a_token,
        other_disk=other_disk,
        ways=ways,
    )


def _work(planner: Planner, transfer: TransferConfig) -> Work:
    recipe, shapes, seq_len = planner.recipe, planner.shapes, planner.recipe.data.seq_len
    once, trained = planner.tokens_a_pass(), planner.stage_tokens(transfer)
    if once is None and trained is None:
        raise UserError(f"the size of {recipe.data.path} is not known here: give it as --tokens, of one pass (10M)")
    epochs = recipe.blocks.epochs
    if epochs and once is not None:
        trained = once * sum(epochs) / len(epochs)
    assert trained is not None
    distinct = trained if once is None else min(once, trained)
    alone = dataclasses.replace(recipe.student, keep_softmax=tuple(range(shapes.layers)))
    xent = transfer.xent_weight > 0
    return Work(
        tokens=math.ceil(trained),
        distinct=math.ceil(distinct),
        validation=validation_tokens(recipe, distinct),
        bytes_a_token=float(planner.dtype_bytes * shapes.hidden),
        flops=transfer_flops_per_token(shapes, recipe.student, seq_len, xent=xent).total,
        teacher_flops=transfer_flops_per_token(shapes, alone, seq_len).total,
    )


def validation_tokens(recipe: Recipe, tokens: float) -> int:
    """Tokens of the validation rows that an evaluation looks at, in whole rows; ``tokens`` are in the training rows.

    Known for data whose samples are counted, and where a share is held out; else a row for each held-out sample.
    """
    data, transfer = recipe.data, recipe.transfer
    share = data.validation_fraction
    if share is None and data.path.endswith(".txt"):
        share = TEXT_HELD_OUT
    if share is not None:
        found = share / (1 - share) * tokens
    elif data.path in KNOWN_ROWS and data.validation_path is None:
        found = data.validation_rows * tokens / KNOWN_ROWS[data.path]
    else:
        found = float(data.validation_rows * data.seq_len)
    rows = math.ceil(found / data.seq_len)
    if transfer is not None and transfer.eval_batches is not None:
        rows = min(rows, transfer.eval_batches * transfer.batch_size)
    return rows * data.seq_len


def _counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})

"""Ways of running attention transfer on a number of GPUs, block by block or jointly: memory, disk, hours, bottleneck.

* *streaming*: one block after another, every process on its share of the micro-batches; hidden states of two boundaries
  are kept in memory or on disk, the weights are read once per pass;
* *pipeline*: each GPU holds a range of layers and passes its outputs on; weights are read once, no hidden states are
  stored;
* *parallel*: one pass of the teacher alone (on the GPUs of one node) stores the inputs of all blocks on disk, then
  every block is trained independently on one GPU; its weights and inputs are read from the disk, which the jobs of a
  node share.

Hours are lower bounds: compute at the given fraction of the peak, and the disk at the given bandwidth. The two overlap,
except for copying a block's weights from the host to its GPU, reading a pass's first block and, in all ways but
streaming, the first reading of the weights. Evaluations are not counted, except for one evaluation of the validation
rows per pass.

Block sizes come from :mod:`trenchcoat.planning.blocks.size`, passes from :mod:`trenchcoat.planning.blocks.passes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from trenchcoat.config import Recipe, TransferConfig, UserError
from trenchcoat.config.settings import TEXT_HELD_OUT
from trenchcoat.config.units import tera
from trenchcoat.models.flops import transfer_flops_per_token
from trenchcoat.models.shapes import Shapes
from trenchcoat.planning.blocks.passes import Place, Streamed, TokenCounts, choose_pass
from trenchcoat.planning.blocks.size import BlockSize, choose_block_size, layer_bytes, measure_block
from trenchcoat.planning.plan import HOST_LINK, KNOWN_ROWS, Machine, Plan, Planner, layouts, make_plan, with_reserve

JOINT, STREAMING, PIPELINE, PARALLEL = "joint", "streaming", "pipeline", "parallel"
_PLACES: dict[Place, str] = {"memory": "host memory", "disk": "disk space"}
"""Where hidden states are stored, and the limiting resource if they do not fit there."""


@dataclass(frozen=True, kw_only=True)
class BlockWay:
    """One way of running attention transfer on ``gpus`` GPUs; in bytes, hours, tokens."""

    kind: str
    """`joint`, `streaming`, `pipeline` or `parallel`."""
    name: str
    gpus: int
    settings: str = ""
    """Overrides that select it."""
    layers: int
    """Layers per block; per GPU in the pipeline; all layers in the joint run."""
    blocks: int
    fits: bool
    limit: str
    """What does not fit (`GPU memory`, `host memory`, `disk space`) or, if it fits, what takes longest: `compute`,
    `disk`, in the joint run also `links` or `host`."""
    device_bytes: float
    """Bytes on one GPU, without reserve."""
    host_bytes: float = 0.0
    """Host memory of one node."""
    disk_bytes: float = 0.0
    """Hidden states on disk, over all nodes."""
    read_bytes: float = 0.0
    """Weights and hidden states read from disk, over all nodes."""
    written_bytes: float = 0.0
    """Hidden states written to disk."""
    compute_hours: float = 0.0
    disk_hours: float = 0.0
    hours: float = 0.0
    gpu_hours: float = 0.0
    place: Place | None = None
    """streaming: where hidden states are stored."""
    pass_tokens: int | None = None
    """streaming: tokens per pass."""
    passes: int = 1
    """0 if hidden states do not fit (then there are no hours)."""
    collect_hours: float = 0.0
    """parallel: the part of `hours` for the teacher's pass."""
    why: str = ""
    """How the pass was chosen, or what does not fit."""
    asked: bool = False
    """Whether the recipe's settings select this way (`trenchcoat blocks run`)."""


@dataclass(frozen=True, kw_only=True)
class BlocksPlan(TokenCounts):
    """The ways for each number of GPUs; in bytes and tokens."""

    model: str
    shapes: Shapes
    machine: Machine
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
        """The ways on ``gpus`` GPUs."""
        return [way for way in self.ways if way.gpus == gpus]

    def best(self, gpus: int, kind: str | None = None) -> BlockWay | None:
        """The fastest way that fits, of one kind or of all except the joint run."""
        kinds = (STREAMING, PIPELINE, PARALLEL) if kind is None else (kind,)
        fitting = [way for way in self.of(gpus) if way.fits and way.kind in kinds]
        return min(fitting, key=lambda way: way.hours, default=None)


def plan_blocks(recipe: Recipe, machine: Machine, tokens: float | None = None) -> BlocksPlan:
    """Every way of running the attention transfer of ``recipe``, on 1, 2, 4, ... GPUs up to those of ``machine``.

    ``tokens`` is the number of training tokens per epoch. Raises ``UserError`` for a recipe without transfer, data of
    unknown size, an unknown model or GPU, and if not even a single layer fits the GPU.
    """
    if recipe.transfer is None:
        raise UserError("transfer=null: without attention transfer there are no blocks to plan")
    powers = (2**i for i in range(machine.gpus.bit_length()))
    return plan_transfer(*make_plan(recipe, machine, tokens=tokens), gpus=sorted({*powers, machine.gpus}))


def plan_transfer(planner: Planner, plan: Plan, *, gpus: Sequence[int]) -> BlocksPlan:
    """Like ``plan_blocks``, for an existing plan with transfer, on each number of ``gpus`` (the machine's last)."""
    recipe, machine, other_disk = planner.recipe, planner.machine, sum(plan.disk.values())
    assert recipe.transfer is not None
    counts = _token_counts(planner, recipe.transfer)
    ways: list[BlockWay] = []
    for count in gpus:
        of_count = dataclasses.replace(planner, machine=dataclasses.replace(machine, gpus=count))
        ways += _Ways(of_count, recipe.transfer, counts, other_disk).all()
    return BlocksPlan(
        **dataclasses.asdict(counts),
        model=recipe.model.path,
        shapes=planner.shapes,
        machine=machine,
        boundary_bytes=counts.distinct * float(planner.dtype_bytes * planner.shapes.hidden),
        other_disk=other_disk,
        ways=ways,
    )


def _token_counts(planner: Planner, transfer: TransferConfig) -> TokenCounts:
    recipe = planner.recipe
    once, trained = planner.tokens_a_pass(), planner.stage_tokens(transfer)
    if once is None and trained is None:
        raise UserError(f"the size of {recipe.data.path} is unknown: give the tokens of one pass as --tokens, e.g. 10M")
    epochs = recipe.blocks.epochs
    if epochs and once is not None:
        trained = once * sum(epochs) / len(epochs)
    assert trained is not None
    distinct = trained if once is None else min(once, trained)
    return TokenCounts(
        tokens=math.ceil(trained), distinct=math.ceil(distinct), validation=validation_tokens(recipe, distinct)
    )


def validation_tokens(recipe: Recipe, tokens: float) -> int:
    """Tokens of the validation rows of an evaluation, in whole rows; ``tokens`` are those of the training rows.

    Computed for data with a known number of samples or a validation fraction; else one row per held-out sample.
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


@dataclass(frozen=True)
class _Ways:
    """The ways on all GPUs of the planner's machine."""

    planner: Planner
    transfer: TransferConfig
    counts: TokenCounts
    other_disk: float

    def all(self) -> list[BlockWay]:
        """Joint, streaming (in memory, on disk, as set), pipeline, parallel."""
        pipeline = [self.pipeline()] if self.machine.gpus > 1 else []
        return [self.joint(), *self.streaming(), *pipeline, self.parallel()]

    @property
    def machine(self) -> Machine:
        """The planner's machine, with the planned number of GPUs."""
        return self.planner.machine

    @property
    def bytes_a_token(self) -> float:
        """Bytes of a token's hidden state."""
        return float(self.planner.dtype_bytes * self.planner.shapes.hidden)

    @property
    def disk(self) -> float:
        """Bytes of disk available to hidden states, over all nodes."""
        return math.inf if self.machine.disk is None else self.machine.disk - self.other_disk

    @property
    def weights(self) -> float:
        """Bytes of all layers and of the embedding."""
        s = self.planner.shapes
        return s.layers * layer_bytes(s, self.planner.dtype_bytes) + self.planner.dtype_bytes * s.embedding_parameters

    @cached_property
    def flops(self) -> float:
        """FLOPs per token of a training step, over all layers."""
        return self.planner.flops(self.transfer)

    @cached_property
    def teacher_flops(self) -> float:
        """FLOPs per token of a teacher forward pass."""
        shapes, recipe = self.planner.shapes, self.planner.recipe
        alone = dataclasses.replace(recipe.student, keep=(), keep_softmax=tuple(range(shapes.layers)))
        return transfer_flops_per_token(shapes, alone, recipe.data.seq_len).total

    @cached_property
    def size(self) -> tuple[BlockSize, str]:
        """The block size, and why it does not fit if the recipe's `blocks.size` does not."""
        step, asked = self.planner.step(self.transfer), self.planner.recipe.blocks.size
        host_memory = self.machine.usable_host_memory / self.machine.node_gpus
        try:
            return choose_block_size(step, gpu_memory=self.machine.gpu_memory, host_memory=host_memory, size=asked), ""
        except UserError as error:
            if asked is None:
                raise
            return measure_block(step, asked, gpu=True), str(error)

    def _way(self, kind: str, size: BlockSize, **fields: Any) -> BlockWay:
        """A way that trains blocks of ``size``."""
        common: dict[str, Any] = {
            "name": kind,
            "layers": size.layers,
            "blocks": size.blocks,
            "device_bytes": size.device_bytes,
        }
        return BlockWay(kind=kind, gpus=self.machine.gpus, **(common | fields))

    def _hours(self, computing: float, disk: float, total: float) -> dict[str, float]:
        """Fields of a way that keeps all GPUs busy for ``total`` seconds."""
        seconds = {"compute_hours": computing, "disk_hours": disk, "hours": total}
        return {name: s / 3600 for name, s in (seconds | {"gpu_hours": self.machine.gpus * total}).items()}

    def joint(self) -> BlockWay:
        """The fastest joint run that fits, or else the one that needs the least memory."""
        planner, machine = self.planner, self.machine
        found = [(*way, planner.stage(self.transfer, way[2])) for way in layouts(machine)]
        host = machine.usable_host_memory / machine.node_gpus
        fitting = [item for item in found if planner.fits(item[3].memory) and item[3].memory.host <= host]
        if fitting:
            name, settings, layout, stage = max(fitting, key=lambda item: item[3].tokens_per_second)
        else:
            name, settings, layout, stage = min(found, key=lambda item: item[3].memory.total)
        short = "host memory" if planner.fits(stage.memory) else "GPU memory"
        base = float(planner.dtype_bytes * planner.shapes.parameters)
        training, loading = self.counts.tokens / stage.tokens_per_second / 3600, base / machine.read_rate / 3600
        waits = stage.bound_by.replace("arithmetic", "compute")
        return BlockWay(
            kind=JOINT,
            name=f"joint: {name}",
            gpus=machine.gpus,
            settings=settings,
            layers=planner.shapes.layers,
            blocks=1,
            fits=bool(fitting),
            limit=("disk" if loading > training else waits) if fitting else short,
            device_bytes=stage.memory.total,
            host_bytes=stage.memory.host * machine.node_gpus,
            read_bytes=base * machine.nodes,
            compute_hours=self.counts.tokens * self.flops / planner.flop_rate / layout.ranks / 3600,
            disk_hours=loading,
            hours=training + loading,
            gpu_hours=machine.gpus * (training + loading),
        )

    def streaming(self) -> list[BlockWay]:
        """As much as fits in memory, all on disk, and the recipe's settings if they are neither."""
        settings = self.planner.recipe.blocks
        size, _ = self.size
        if settings.epochs and len(settings.epochs) != size.blocks:
            raise UserError(
                f"blocks.epochs has {len(settings.epochs)} numbers for {size.blocks} blocks of {size.layers} layers: "
                "give one for each block, in order, or none"
            )
        rows = [self._streaming("auto", place) for place in _PLACES]
        if settings.ranks == "pipeline" and self.machine.gpus > 1:
            return rows
        asked = dataclasses.replace(self._streaming(settings.pass_tokens, settings.hidden), asked=True)
        for i, row in enumerate(rows):
            if (row.place, row.pass_tokens) == (asked.place, asked.pass_tokens):
                rows[i] = asked
                return rows
        return [*rows, dataclasses.replace(asked, name="streaming, as set")]

    @cached_property
    def _run(self) -> Streamed:
        machine, accumulation = self.machine, self.transfer.accumulation
        together = accumulation / math.ceil(accumulation / machine.gpus)  # micro-batches at a time
        size, _ = self.size
        return Streamed(
            **dataclasses.asdict(self.counts),
            step_tokens=accumulation * self.transfer.batch_size * self.planner.recipe.data.seq_len,
            bytes_a_token=self.bytes_a_token,
            weights=self.weights,
            blocks=size.blocks,
            memory=machine.usable_host_memory - machine.node_gpus * size.host_bytes,
            disk=self.disk / machine.nodes,
            read=machine.read_rate,
            write=machine.write_rate,
            compute=self.flops / self.planner.flop_rate / together,
            copy=HOST_LINK,
            nodes=machine.nodes,
        )

    def _streaming(self, pass_tokens: str, hidden: Literal["auto", "memory", "disk"]) -> BlockWay:
        """One row: the pass that these settings give, or why there is none."""
        size, wrong = self.size
        machine, host = self.machine, self.machine.node_gpus * size.host_bytes
        try:
            choice = choose_pass(self._run, pass_tokens=pass_tokens, hidden=hidden)
        except UserError as error:
            place: Place = "disk" if hidden == "disk" else "memory"
            return self._way(
                STREAMING,
                size,
                name=f"streaming, {place}",
                place=place,
                fits=False,
                limit=self._short(size) if wrong else _PLACES[place],
                host_bytes=host,
                passes=0,
                why=wrong or str(error),
            )
        in_memory = choice.hidden == "memory"
        computing, disk = choice.compute_seconds or 0.0, choice.disk_seconds
        length = choice.pass_tokens if choice.passes > 1 else "all"
        return self._way(
            STREAMING,
            size,
            name=f"streaming, {choice.hidden}",
            settings=f"blocks.hidden={choice.hidden} blocks.pass_tokens={length}",
            place=choice.hidden,
            fits=not wrong,
            limit=self._short(size) if wrong else _slower(computing, disk),
            host_bytes=host + (choice.held if in_memory else 0.0),
            disk_bytes=0.0 if in_memory else choice.held * machine.nodes,
            read_bytes=choice.weights_read * machine.nodes + choice.states_read,
            written_bytes=choice.states_written,
            **self._hours(computing, disk, choice.seconds),
            pass_tokens=choice.pass_tokens,
            passes=choice.passes,
            why=wrong or choice.why,
        )

    def _short(self, size: BlockSize) -> str:
        return "GPU memory" if with_reserve(size.device_bytes) > self.machine.gpu_memory else "host memory"

    def pipeline(self) -> BlockWay:
        """Every GPU holds whole blocks throughout; the one with the most blocks limits the speed."""
        shapes, recipe, machine = self.planner.shapes, self.planner.recipe, self.machine
        k = recipe.blocks.size or math.ceil(shapes.layers / machine.gpus)
        blocks = math.ceil(shapes.layers / k)
        size = measure_block(self.planner.step(self.transfer), math.ceil(blocks / machine.gpus) * k, gpu=True)
        one, micro = layer_bytes(shapes, self.planner.dtype_bytes), self.transfer.batch_size * recipe.data.seq_len
        # the last GPU waits for the pipeline to fill
        tokens = self.counts.tokens + self.counts.validation + (size.blocks - 1) * micro
        computing = tokens * self.flops * size.layers / shapes.layers / self.planner.flop_rate
        reading = self.weights / machine.nodes / machine.read_rate
        total = reading + size.layers * one / HOST_LINK + computing
        on_gpu = with_reserve(size.device_bytes) <= machine.gpu_memory
        on_host = size.host_bytes <= machine.usable_host_memory  # the processes of a node load one after the other
        return self._way(
            PIPELINE,
            size,
            settings="blocks.ranks=pipeline",
            fits=on_gpu and on_host,
            limit="GPU memory" if not on_gpu else "host memory" if not on_host else _slower(computing, reading),
            host_bytes=size.host_bytes,
            read_bytes=self.weights,
            **self._hours(computing, reading, total),
            asked=recipe.blocks.ranks == "pipeline",
        )

    def parallel(self) -> BlockWay:
        """One teacher pass on the GPUs of a node, then one job per block; the jobs of a node share its disk."""
        size, wrong = self.size
        counts, machine, n, one = self.counts, self.machine, size.blocks, size.host_bytes
        jobs = min(machine.gpus, n, self.planner.recipe.blocks.jobs or n)
        together, rounds = min(jobs, machine.node_gpus), math.ceil(n / jobs)
        rate = self.planner.flop_rate
        boundary = (counts.distinct + counts.validation) * self.bytes_a_token
        share = (n - 1) / n  # nothing needs the outputs of the last block
        collect_read = share * self.weights + (n - 1) * boundary
        collect_disk = collect_read / machine.read_rate + n * boundary / machine.write_rate
        collect_compute = share * (counts.distinct + counts.validation) * self.teacher_flops / rate / machine.node_gpus
        collect = max(collect_compute, collect_disk) + share * self.weights / HOST_LINK
        inputs = (counts.tokens + counts.validation) * self.bytes_a_token
        computing = (counts.tokens + counts.validation) * self.flops / n / rate
        loading, states = together * one / machine.read_rate, together * inputs / machine.read_rate
        block = loading + one / HOST_LINK + max(computing, states)
        compute, disk = collect_compute + rounds * computing, collect_disk + rounds * (loading + states)
        kept, host = n * boundary, max(together, machine.node_gpus) * one
        no_disk = f"{tera(kept)} of hidden states, {tera(max(0.0, self.disk))} free" if kept > self.disk else ""
        short = "host memory" if host > machine.usable_host_memory else "disk space" if no_disk else ""
        return self._way(
            PARALLEL,
            size,
            settings="--parallel",
            fits=not wrong and not short,
            limit=self._short(size) if wrong else short or _slower(compute, disk),
            host_bytes=host,
            disk_bytes=kept,
            read_bytes=collect_read + n * (one + inputs),
            written_bytes=kept,
            **self._hours(compute, disk, collect + rounds * block)
            | {"gpu_hours": (machine.node_gpus * collect + n * block) / 3600, "collect_hours": collect / 3600},
            why=wrong or no_disk,
        )


def _slower(computing: float, disk: float) -> str:
    return "compute" if computing >= disk else "disk"

"""Ways of running attention transfer on so many GPUs, block-wise or jointly: memory, disk, hours, and what is short.

* *streaming*: one block after another, every process on its share of the micro-batches; hidden states of two boundaries
  wait in memory or on disk, the weights are read once a pass;
* *pipeline*: each GPU holds a range of layers for good and hands its outputs on; weights are read once, nothing waits;
* *parallel*: one pass of the teacher alone (by the GPUs of one node) keeps the inputs of all blocks on disk, then every
  block is trained by itself on one GPU; its weights and its inputs come from the disk, which the jobs of a node share.

Hours are bounds: computing at the stated share of the peak, and the disk at the stated bandwidth. They overlap, but for
the copy of a block's weights from the host to its GPU, the reading of a pass's first block and, in all ways but
streaming, the first reading of the weights. Evaluations are not in them, but for the one look at the validation rows
that a pass takes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from trenchcoat.config import TransferConfig, UserError
from trenchcoat.config.units import tera
from trenchcoat.planning.blockpass import PassChoice, Place, Streamed, choose_pass
from trenchcoat.planning.blocksize import BlockSize, choose_block_size, layer_bytes, measure_block
from trenchcoat.planning.plan import DISK_RATE, HOST_LINK, HOST_MEMORY, Machine, Planner, layouts, with_reserve

HOST_USABLE = 0.8
"""Share of a node's host memory that a plan counts on."""
JOINT, STREAMING, PIPELINE, PARALLEL = "joint", "streaming", "pipeline", "parallel"
_PLACES: dict[Place, str] = {"memory": "host memory", "disk": "disk space"}
"""Where hidden states wait, and what is short when they do not fit there."""


@dataclass(frozen=True, kw_only=True)
class BlockWay:
    """One way of running the attention transfer on so many GPUs; bytes, hours, tokens."""

    kind: str
    """`joint`, `streaming`, `pipeline` or `parallel`."""
    name: str
    gpus: int
    settings: str = ""
    """Overrides that choose it."""
    layers: int
    """Of a block; of a GPU in the pipeline; all of them in the joint run."""
    blocks: int
    fits: bool
    limit: str
    """What is short (`GPU memory`, `host memory`, `disk space`) or, where it fits, what takes longest: `compute`,
    `disk`, in the joint run also `links` or `host`."""
    device_bytes: float
    """Of one GPU, without reserve."""
    host_bytes: float = 0.0
    """Of one node."""
    disk_bytes: float = 0.0
    """Hidden states on disk, of all nodes."""
    read_bytes: float = 0.0
    """From disk, of all nodes: weights and hidden states."""
    written_bytes: float = 0.0
    """Hidden states."""
    compute_hours: float = 0.0
    disk_hours: float = 0.0
    hours: float = 0.0
    gpu_hours: float = 0.0
    place: Place | None = None
    """streaming: where hidden states wait."""
    pass_tokens: int | None = None
    """streaming: tokens of a pass."""
    passes: int = 1
    """0 where hidden states do not fit (there are no hours then)."""
    collect_hours: float = 0.0
    """parallel: of `hours`, the pass of the teacher alone."""
    why: str = ""
    """How the pass was chosen, or what does not fit."""
    asked: bool = False
    """The one that the recipe's settings take (`trenchcoat blocks run`)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to do."""

    tokens: int
    distinct: int
    validation: int
    bytes_a_token: float
    flops: float
    """Of a token's training step, all layers."""
    teacher_flops: float
    """Of its pass through the teacher alone."""


@dataclass(frozen=True)
class Ways:
    """The ways on ``gpus`` GPUs of the planner's machine."""

    planner: Planner
    transfer: TransferConfig
    work: Work
    gpus: int
    other_disk: float

    def all(self) -> list[BlockWay]:
        """Joint, streaming (with its extremes), pipeline, parallel."""
        return [self.joint(), *self.streaming(), *([self.pipeline()] if self.gpus > 1 else []), self.parallel()]

    @property
    def machine(self) -> Machine:
        """All of it, whether ``gpus`` are all of its GPUs or not."""
        return self.planner.machine

    @property
    def node_gpus(self) -> int:
        """Of ``gpus``, those that share a node."""
        return min(self.gpus, self.machine.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Nodes that ``gpus`` are spread over."""
        return math.ceil(self.gpus / self.machine.gpus_per_node)

    @property
    def read(self) -> float:
        """Bytes a second of one node."""
        return self.machine.bandwidth or DISK_RATE

    @property
    def write(self) -> float:
        """Bytes a second of one node."""
        return self.machine.write_bandwidth or self.read

    @property
    def host(self) -> float:
        """Bytes of a node's host memory that are counted on."""
        return HOST_USABLE * (self.machine.host_memory or HOST_MEMORY * self.node_gpus)

    @property
    def disk(self) -> float:
        """Bytes of disk for hidden states, of all nodes together."""
        return math.inf if self.machine.disk is None else self.machine.disk - self.other_disk

    @property
    def weights(self) -> float:
        """Bytes of all layers and of the embedding."""
        s = self.planner.shapes
        return s.layers * layer_bytes(s, self.planner.dtype_bytes) + self.planner.dtype_bytes * s.embedding_parameters

    @property
    def second(self) -> float:
        """FLOP that one GPU does in a second."""
        return self.planner.peak * self.machine.mfu

    def size(self) -> tuple[BlockSize, str]:
        """Blocks, and why they do not fit, if the recipe's do not."""
        recipe, asked = self.planner.recipe, self.planner.recipe.blocks.size
        try:
            found = choose_block_size(
                self.planner.shapes,
                recipe.student,
                self.transfer,
                seq_len=recipe.data.seq_len,
                gpu_memory=self.machine.gpu_memory,
                host_memory=self.host / self.node_gpus,
                dtype_bytes=self.planner.dtype_bytes,
                size=asked,
            )
        except UserError as error:
            if asked is None:
                raise
            return self._measured(asked), str(error)
        return found, ""

    def _measured(self, layers: int) -> BlockSize:
        recipe, size = self.planner.recipe, self.planner.dtype_bytes
        parts = (self.planner.shapes, recipe.student, self.transfer, layers)
        return measure_block(*parts, seq_len=recipe.data.seq_len, gpu=True, dtype_bytes=size)

    def joint(self) -> BlockWay:
        """The quickest joint run that fits, or the one that needs least."""
        planner = dataclasses.replace(self.planner, machine=dataclasses.replace(self.machine, gpus=self.gpus))
        found = [(way, planner.stage(self.transfer, way[2])) for way in layouts(planner.machine)]
        fitting = [
            item for item in found if planner.fits(item[1].memory) and item[1].memory.host * self.node_gpus <= self.host
        ]
        if fitting:
            (name, settings, layout), stage = max(fitting, key=lambda item: item[1].tokens_per_second)
        else:
            (name, settings, layout), stage = min(found, key=lambda item: item[1].memory.total)
        short = "host memory" if planner.fits(stage.memory) else "GPU memory"
        base = float(planner.dtype_bytes * planner.shapes.parameters)
        training, loading = self.work.tokens / stage.tokens_per_second / 3600, base / self.read / 3600
        waits = stage.bound_by.replace("arithmetic", "compute")
        return BlockWay(
            kind=JOINT,
            name=f"joint: {name}",
            gpus=self.gpus,
            settings=settings,
            layers=planner.shapes.layers,
            blocks=1,
            fits=bool(fitting),
            limit=("disk" if loading > training else waits) if fitting else short,
            device_bytes=stage.memory.total,
            host_bytes=stage.memory.host * self.node_gpus,
            read_bytes=base * self.nodes,
            compute_hours=self.work.tokens * self.work.flops / self.second / layout.ranks / 3600,
            disk_hours=loading,
            hours=training + loading,
            gpu_hours=self.gpus * (training + loading),
        )

    def streaming(self) -> list[BlockWay]:
        """As much as fits in memory, all on disk, and what the recipe asks for where that is neither."""
        settings = self.planner.recipe.blocks
        size, wrong = self.size()
        if settings.epochs and len(settings.epochs) != size.blocks:
            raise UserError(
                f"blocks.epochs has {len(settings.epochs)} numbers for {size.blocks} blocks of {size.layers} layers: "
                "give one for each block, in order, or none"
            )
        run = self._streamed(size)
        rows = [self._streaming_way(place, size, _choice(run, "auto", place), wrong) for place in _PLACES]
        if settings.ranks == "pipeline" and self.gpus > 1:
            return rows
        choice = _choice(run, settings.pass_tokens, settings.hidden)
        place: Place = "disk" if settings.hidden == "disk" else "memory"
        if isinstance(choice, PassChoice):
            place = choice.hidden
        asked = dataclasses.replace(self._streaming_way(place, size, choice, wrong), asked=True)
        for i, row in enumerate(rows):
            if (row.place, row.pass_tokens) == (asked.place, asked.pass_tokens):
                rows[i] = asked
                return rows
        return [*rows, dataclasses.replace(asked, name="streaming, as set")]

    def _streamed(self, size: BlockSize) -> Streamed:
        accumulation = self.transfer.accumulation
        together = accumulation / math.ceil(accumulation / self.gpus)  # micro-batches at a time
        return Streamed(
            tokens=self.work.tokens,
            distinct=self.work.distinct,
            validation=self.work.validation,
            step_tokens=accumulation * self.transfer.batch_size * self.planner.recipe.data.seq_len,
            bytes_a_token=self.work.bytes_a_token,
            weights=self.weights,
            blocks=size.blocks,
            memory=self.host - self.node_gpus * size.host_bytes,
            disk=self.disk / self.nodes,
            read=self.read,
            write=self.write,
            compute=self.work.flops / self.second / together,
            copy=HOST_LINK,
            nodes=self.nodes,
        )

    def _streaming_way(self, place: Place, size: BlockSize, choice: PassChoice | str, wrong: str) -> BlockWay:
        """One row; ``choice`` is a text where hidden states do not fit, ``wrong`` one where the block does not."""
        common: dict[str, Any] = {
            "kind": STREAMING,
            "name": f"streaming, {place}",
            "gpus": self.gpus,
            "layers": size.layers,
            "blocks": size.blocks,
            "device_bytes": size.device_bytes,
            "place": place,
        }
        host = self.node_gpus * size.host_bytes
        if isinstance(choice, str):
            limit = self._short(size) if wrong else _PLACES[place]
            return BlockWay(**common, fits=False, limit=limit, host_bytes=host, passes=0, why=wrong or choice)
        in_memory = choice.held if place == "memory" else 0.0
        computing, disk = choice.compute_seconds or 0.0, choice.disk_seconds
        return BlockWay(
            **common,
            settings=f"blocks.hidden={place} blocks.pass_tokens={choice.pass_tokens if choice.passes > 1 else 'all'}",
            fits=not wrong,
            limit=self._short(size) if wrong else _slower(computing, disk),
            host_bytes=host + in_memory,
            disk_bytes=choice.held * self.nodes if place == "disk" else 0.0,
            read_bytes=choice.weights_read * self.nodes + choice.states_read,
            written_bytes=choice.states_written,
            compute_hours=computing / 3600,
            disk_hours=disk / 3600,
            hours=choice.seconds / 3600,
            gpu_hours=self.gpus * choice.seconds / 3600,
            pass_tokens=choice.pass_tokens,
            passes=choice.passes,
            why=wrong or choice.why,
        )

    def _short(self, size: BlockSize) -> str:
        return "GPU memory" if with_reserve(size.device_bytes) > self.machine.gpu_memory else "host memory"

    def pipeline(self) -> BlockWay:
        """Every GPU holds whole blocks for good; the one with the most of them sets the pace."""
        shapes, recipe = self.planner.shapes, self.planner.recipe
        k = recipe.blocks.size or math.ceil(shapes.layers / self.gpus)
        blocks = math.ceil(shapes.layers / k)
        held = min(shapes.layers, math.ceil(blocks / self.gpus) * k)
        stages = math.ceil(shapes.layers / held)
        size = self._measured(held)
        one, micro = layer_bytes(shapes, self.planner.dtype_bytes), self.transfer.batch_size * recipe.data.seq_len
        tokens = self.work.tokens + self.work.validation + (stages - 1) * micro  # the last GPU waits for the first ones
        computing = tokens * self.work.flops * held / shapes.layers / self.second
        reading = self.weights / self.nodes / self.read
        total = reading + held * one / HOST_LINK + computing
        host = size.host_bytes  # the processes of a node load one after the other
        fits = with_reserve(size.device_bytes) <= self.machine.gpu_memory
        return BlockWay(
            kind=PIPELINE,
            name="pipeline",
            gpus=self.gpus,
            settings="blocks.ranks=pipeline",
            layers=held,
            blocks=stages,
            fits=fits and host <= self.host,
            limit="GPU memory" if not fits else "host memory" if host > self.host else _slower(computing, reading),
            device_bytes=size.device_bytes,
            host_bytes=host,
            read_bytes=self.weights,
            compute_hours=computing / 3600,
            disk_hours=reading / 3600,
            hours=total / 3600,
            gpu_hours=self.gpus * total / 3600,
            asked=recipe.blocks.ranks == "pipeline",
        )

    def parallel(self) -> BlockWay:
        """The teacher once on the GPUs of a node, then every block by itself; jobs of a node share its disk."""
        size, wrong = self.size()
        work, n, one = self.work, size.blocks, size.host_bytes
        jobs = min(self.gpus, n, self.planner.recipe.blocks.jobs or n)
        together, rounds = min(jobs, self.node_gpus), math.ceil(n / jobs)
        boundary = (work.distinct + work.validation) * work.bytes_a_token
        share = (n - 1) / n  # nobody needs the outputs of the last block
        collect_read = share * self.weights + (n - 1) * boundary
        collect_disk = collect_read / self.read + n * boundary / self.write
        collect_compute = share * (work.distinct + work.validation) * work.teacher_flops / self.second / self.node_gpus
        collect = max(collect_compute, collect_disk) + share * self.weights / HOST_LINK
        inputs = (work.tokens + work.validation) * work.bytes_a_token
        computing = (work.tokens + work.validation) * work.flops / n / self.second
        loading, states = together * one / self.read, together * inputs / self.read
        block = loading + one / HOST_LINK + max(computing, states)
        compute, disk = collect_compute + rounds * computing, collect_disk + rounds * (loading + states)
        kept, host = n * boundary, max(together, self.node_gpus) * one
        short = "host memory" if host > self.host else "disk space" if kept > self.disk else ""
        return BlockWay(
            kind=PARALLEL,
            name=PARALLEL,
            gpus=self.gpus,
            settings="--parallel",
            layers=size.layers,
            blocks=n,
            fits=not wrong and not short,
            limit=self._short(size) if wrong else short or _slower(compute, disk),
            device_bytes=size.device_bytes,
            host_bytes=host,
            disk_bytes=kept,
            read_bytes=collect_read + n * (one + inputs),
            written_bytes=kept,
            compute_hours=compute / 3600,
            disk_hours=disk / 3600,
            hours=(collect + rounds * block) / 3600,
            gpu_hours=(self.node_gpus * collect + n * block) / 3600,
            collect_hours=collect / 3600,
            why=wrong
            or (f"{tera(kept)} of hidden states, {tera(max(0.0, self.disk))} free" if kept > self.disk else ""),
        )


def _choice(run: Streamed, pass_tokens: str, hidden: Literal["auto", "memory", "disk"]) -> PassChoice | str:
    """The pass, or why there is none."""
    try:
        return choose_pass(run, pass_tokens=pass_tokens, hidden=hidden)
    except UserError as error:
        return str(error)


def _slower(computing: float, disk: float) -> str:
    return "compute" if computing >= disk else "disk"

"""`trenchcoat plan`: which ways of running a recipe fit a machine, their speed, and the disk space they need.

Nothing is downloaded and no weights are loaded: sizes come from the model's config (:mod:`trenchcoat.models.shapes`),
memory from :mod:`trenchcoat.planning.footprint`, FLOPs from :mod:`trenchcoat.models.flops`. The time of a step is the
maximum of its arithmetic (at the given MFU) and its transfers (the frozen base is gathered once in the forward and once
in the backward pass).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trenchcoat.config import LoraConfig, Recipe, TransferConfig, UserError
from trenchcoat.config.units import GIB
from trenchcoat.models.flops import (
    lora_flops_per_token,
    student_parameters,
    trained_parameters,
    transfer_flops_per_token,
)
from trenchcoat.models.shapes import Shapes, find_config, shapes_of
from trenchcoat.planning.footprint import (
    Footprint,
    Layout,
    StepSizes,
    base_bytes,
    checkpoint_bytes,
    footprint,
    kept_bytes_per_token,
    state_bytes,
)
from trenchcoat.runtime.devices import device_peak

RESERVE_BYTES, RESERVE_SHARE = 1.5 * GIB, 0.05
"""Reserve on a GPU: bytes for the CUDA context and NCCL buffers, and a fraction of the peak for fragmentation."""
NODE_LINK, NETWORK_LINK, HOST_LINK = 300e9, 50e9, 25e9
"""Bytes/s received by one GPU: within its node (NVLink), from other nodes (400 Gbit/s each), from the host."""
KNOWN_TOKENS = {"yahma/alpaca-cleaned": 10e6}
"""Tokens per epoch, with the prompt template (LoLCATs, arXiv 2410.10254: 40 million in two epochs of each stage)."""
KNOWN_ROWS = {"yahma/alpaca-cleaned": 51_760}
"""Samples per epoch."""
BYTES_A_TOKEN = 5
"""Bytes per token of the token cache: an int32 and a flag."""
HOST_MEMORY, DISK_RATE = 128 * GIB, 3e9
"""Defaults: host memory per GPU in use; a node's disk read bandwidth in bytes/s."""
HOST_USABLE = 0.8
"""Fraction of a node's host memory that a plan uses."""

Stage = TransferConfig | LoraConfig


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware to run on."""

    gpus: int = 1
    gpu_memory: float = 80 * GIB
    """Bytes of one GPU."""
    gpus_per_node: int = 8
    gpu: str = "H100"
    """Name of the GPU, for its peak FLOP/s."""
    mfu: float = 0.4
    """Fraction of the peak that the arithmetic reaches."""
    link: float | None = None
    """Bytes/s that a GPU receives from the others; None: depends on whether they are in one node."""
    disk: float | None = None
    """Free disk space in bytes."""
    bandwidth: float | None = None
    """Disk read bandwidth of a node in bytes/s."""
    write_bandwidth: float | None = None
    """Disk write bandwidth of a node in bytes/s; None: same as reading."""
    host_memory: float | None = None
    """Bytes of host memory of a node; None: `HOST_MEMORY` per GPU in use."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise UserError(f"--gpus and --gpus-per-node must be at least 1, got {self.gpus} and {self.gpus_per_node}")
        if not 0.0 < self.mfu <= 1.0:
            raise UserError(f"--mfu must be above 0 and at most 1, got {self.mfu:g}")

    @property
    def node_gpus(self) -> int:
        """GPUs that share a node."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Nodes that the GPUs are spread over."""
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def read_rate(self) -> float:
        """Disk read bandwidth of a node in bytes/s."""
        return self.bandwidth or DISK_RATE

    @property
    def write_rate(self) -> float:
        """Disk write bandwidth of a node in bytes/s."""
        return self.write_bandwidth or self.read_rate

    @property
    def usable_host_memory(self) -> float:
        """Bytes of a node's host memory that a plan uses."""
        return HOST_USABLE * (self.host_memory or HOST_MEMORY * self.node_gpus)


@dataclass(frozen=True)
class StagePlan:
    """One stage under one layout."""

    memory: Footprint
    tokens_per_second: float
    bound_by: str
    """The bottleneck of a step: `arithmetic`, `links` or `host`."""
    tokens: float | None
    """Tokens that the stage trains on; None if the size of the data is unknown."""

    @property
    def hours(self) -> float | None:
        """Training time without evaluation."""
        return None if self.tokens is None else self.tokens / self.tokens_per_second / 3600


@dataclass(frozen=True)
class Way:
    """One way to run the recipe."""

    name: str
    settings: str
    """Overrides that select it."""
    layout: Layout
    stages: dict[str, StagePlan]
    stage_fits: dict[str, bool]
    """Whether each stage fits a GPU, including the reserve."""

    @property
    def fits(self) -> bool:
        """Whether all stages do."""
        return all(self.stage_fits.values())

    @property
    def peak(self) -> float:
        """Peak bytes on one GPU, over all stages."""
        return max(stage.memory.total for stage in self.stages.values())

    @property
    def seconds_a_token(self) -> float:
        """Sum over all stages, for comparing ways."""
        return sum((s.tokens or 1.0) / s.tokens_per_second for s in self.stages.values())


@dataclass(frozen=True)
class Plan:
    """The resulting plan; in bytes, seconds, tokens."""

    model: str
    shapes: Shapes
    machine: Machine
    ways: list[Way]
    best: str | None
    """Name of the fastest way that fits."""
    disk: dict[str, float]
    state: tuple[float, float]
    """(far sums, window) of one sequence during generation."""
    kept_bytes: float
    """Keys and values of kept groups, per token of a sequence."""
    dtype_bytes: int = 2
    """Of a weight, a key or a value."""

    @property
    def chosen(self) -> Way | None:
        """The fastest way that fits."""
        return next((way for way in self.ways if way.name == self.best), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = dataclasses.asdict(self)
        for way, entry in zip(self.ways, plain["ways"], strict=True):
            entry["fits"] = way.fits
            for name, stage in way.stages.items():
                entry["stages"][name] |= {"total_bytes": stage.memory.total, "hours": stage.hours}
        return plain


def make_plan(recipe: Recipe, machine: Machine, *, tokens: float | None = None) -> tuple[Planner, Plan]:
    """Every way of running ``recipe`` on ``machine``; ``tokens`` is the number of training tokens per epoch.

    Raises ``UserError`` for a model without a readable config, an unsupported family or student, or an unknown GPU.
    """
    if recipe.transfer is None and recipe.lora is None:
        raise UserError("transfer=null and lora=null together leave nothing to plan; leave one of them out")
    shapes = shapes_of(find_config(recipe.model.path, recipe.model.revision))
    planner = Planner(recipe, machine, shapes, tokens)
    whole = recipe.lora is not None and recipe.lora.train == "all"
    possible = [one for one in layouts(machine) if not whole or (one[2].shared_by == 1 and not one[2].nf4)]
    ways = [planner.way(name, settings, layout) for name, settings, layout in possible]
    fitting = [way for way in ways if way.fits]
    best = min(fitting, key=lambda way: way.seconds_a_token).name if fitting else None
    disk = planner.disk()
    state = state_bytes(shapes, recipe.student, planner.dtype_bytes)
    kept = kept_bytes_per_token(shapes, recipe.student, planner.dtype_bytes)
    return planner, Plan(recipe.model.path, shapes, machine, ways, best, disk, state, kept, planner.dtype_bytes)


def with_reserve(size: float) -> float:
    """Memory that a GPU needs to hold ``size`` bytes, including the reserve."""
    return size * (1 + RESERVE_SHARE) + RESERVE_BYTES


def layouts(machine: Machine) -> list[tuple[str, str, Layout]]:
    """(name, settings, layout) of the ways possible on ``machine``."""
    gpus, node = machine.gpus, machine.gpus_per_node
    one = [("one GPU", "", Layout()), ("one GPU, 4-bit base", "model.quantize=nf4", Layout(nf4=True))]
    if gpus == 1:
        return one
    full, offloaded = Layout(ranks=gpus, shared_by=gpus), Layout(ranks=gpus, shared_by=gpus, offload=True)
    hybrid = ("sharded in each node (HSDP)", "parallel.shard=node", Layout(ranks=gpus, shared_by=node))
    return [
        *one,
        ("a copy on each GPU", "parallel.shard=none", Layout(ranks=gpus)),
        ("sharded over all (FSDP)", "parallel.shard=full", full),
        *([hybrid] if gpus > node and gpus % node == 0 else []),
        ("FSDP, shards in host memory", "parallel.shard=full parallel.cpu_offload=true", offloaded),
    ]


@dataclass(frozen=True)
class Planner:
    """The recipe, the machine and the sizes of the model."""

    recipe: Recipe
    machine: Machine
    shapes: Shapes
    tokens: float | None = None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a base weight on a GPU."""
        return 4 if self.recipe.model.dtype == "float32" else 2

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base on a GPU."""
        return torch.float32 if self.dtype_bytes == 4 else torch.bfloat16

    @property
    def stages(self) -> dict[str, Stage]:
        """The recipe's stages by name."""
        found = {"transfer": self.recipe.transfer, "lora": self.recipe.lora}
        return {name: stage for name, stage in found.items() if stage is not None}

    @property
    def flop_rate(self) -> float:
        """FLOP/s of one GPU in the base's precision; ``UserError`` for an unknown GPU."""
        peak = device_peak(self.machine.gpu, self.dtype)
        if peak is None:
            raise UserError(
                f"--gpu {self.machine.gpu!r} is not known; try H100, H200, A100, L40S, RTX 4090, B200, MI300X"
            )
        return peak * self.machine.mfu

    def flops(self, stage: Stage) -> float:
        """FLOPs per token of a training step."""
        seq_len, student = self.recipe.row_tokens(stage), self.recipe.student
        if isinstance(stage, LoraConfig):
            return lora_flops_per_token(self.shapes, student, stage, seq_len).total
        return transfer_flops_per_token(self.shapes, student, seq_len, xent=stage.xent_weight > 0).total

    def step(self, stage: Stage) -> StepSizes:
        """Sizes of a micro-batch of ``stage``."""
        return StepSizes(self.shapes, self.recipe.student, stage, self.recipe.row_tokens(stage), self.dtype_bytes)

    def way(self, name: str, settings: str, layout: Layout) -> Way:
        """Memory, speed and fit of one layout."""
        stages = {key: self.stage(stage, layout) for key, stage in self.stages.items()}
        return Way(name, settings, layout, stages, {key: self.fits(s.memory) for key, s in stages.items()})

    def fits(self, memory: Footprint) -> bool:
        """Whether it fits a GPU, including the reserve."""
        return with_reserve(memory.total) <= self.machine.gpu_memory

    def stage(self, stage: Stage, layout: Layout) -> StagePlan:
        """One stage under ``layout``."""
        memory = self.memory(stage, layout)
        waits = self.seconds(stage, layout)
        bound = max(waits, key=lambda name: waits[name])
        rows = layout.ranks * stage.batch_size * self.recipe.row_tokens(stage)
        return StagePlan(memory, rows / waits[bound], bound, self.stage_tokens(stage))

    def memory(self, stage: Stage, layout: Layout) -> Footprint:
        """Memory of one process."""
        try:
            return footprint(self.step(stage), layout)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"the student does not fit {self.recipe.model.path}: {error}") from error

    def seconds(self, stage: Stage, layout: Layout) -> dict[str, float]:
        """Seconds per micro-batch, by resource; they overlap, so the longest counts."""
        passes = 2 + stage.teacher_pass if isinstance(stage, LoraConfig) else 1
        tokens = stage.batch_size * self.recipe.row_tokens(stage)
        found = {"arithmetic": tokens * self.flops(stage) / self.flop_rate}
        if layout.shared_by > 1:
            base = base_bytes(self.shapes, self.dtype_bytes, nf4=layout.nf4)
            inside = layout.shared_by <= self.machine.gpus_per_node
            link = self.machine.link or (NODE_LINK if inside else NETWORK_LINK)
            found["links"] = passes * base * (1 - 1 / layout.shared_by) / link
            if layout.offload:
                found["host"] = passes * base / layout.shared_by / HOST_LINK
        return found

    def stage_tokens(self, stage: Stage) -> float | None:
        """Tokens that ``stage`` trains on; None if that depends on data of unknown size."""
        if stage.max_steps is not None:
            return float(stage.max_steps * stage.accumulation * stage.batch_size * self.recipe.row_tokens(stage))
        once = self.tokens_a_pass()
        return None if once is None else stage.epochs * once

    def tokens_a_pass(self) -> float | None:
        """Tokens per epoch: as given, as known, or a quarter of a text file's bytes; None if unknown."""
        data = self.recipe.data
        if self.tokens is not None:
            return self.tokens
        if data.max_rows is not None:
            return None
        local = Path(data.path)
        if local.is_file() and local.suffix in (".txt", ".json", ".jsonl"):
            return local.stat().st_size / 4
        return KNOWN_TOKENS.get(data.path)

    def disk(self) -> dict[str, float]:
        """Bytes on disk, by kind."""
        maps = student_parameters(self.shapes, self.recipe.student)
        adapters = 0 if self.recipe.lora is None else self.shapes.lora_parameters(self.recipe.lora)
        found = {"weights of the base": float(self.dtype_bytes * self.shapes.parameters)}
        for name, stage in self.stages.items():
            trained = maps
            if isinstance(stage, LoraConfig):
                trained = trained_parameters(self.shapes, self.recipe.student, stage)
            found[f"checkpoints of {name}"] = checkpoint_bytes(trained, stage)
        whole = self.recipe.lora is not None and self.recipe.lora.train == "all"
        found["adapter"] = 4.0 * (maps + (self.shapes.parameters if whole else adapters))
        found["token cache"] = BYTES_A_TOKEN * (self.tokens_a_pass() or 0.0)
        return found

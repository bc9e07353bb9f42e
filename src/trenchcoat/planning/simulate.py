"""Simulate a training step at full size without the hardware: real modules and sharding, tensors without data.

The model is built on the meta device, its parameters become fake tensors (PyTorch's FakeTensorMode), the collectives of
a fake process group return at once, FSDP2 shards and gathers as in a real run, and PyTorch's memory tracker follows
every allocation. So a single CPU computes the peak memory of one of many GPUs: parameters, gathered layers,
activations, gradients, optimizer shards. Not included: the CUDA context, NCCL buffers, allocator fragmentation, and
memory that a kernel allocates and frees within one call. Softmax attention is PyTorch's fused SDPA.

A step of attention transfer is fully simulated if its loss is the squared error alone (its gradients are in closed
form, without a backward pass); with cross-entropy, only the teacher's forward pass is simulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from trenchcoat.config import LoraConfig, StudentConfig, TransferConfig, UserError
from trenchcoat.models.attach import attach_students, freeze_for_transfer, set_mode, students_of
from trenchcoat.models.families import decoder_of
from trenchcoat.models.interface import LazyMask
from trenchcoat.models.kept import Columns
from trenchcoat.models.stage2 import as_teacher, begin_stage_2, freeze_for_stage_2
from trenchcoat.ops.chunked import chunkwise, closed_form
from trenchcoat.ops.chunked.tiles import Scratch
from trenchcoat.runtime.head import VocabularyHead, run_to_head
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.runtime.sharding import run_decoder, shard_units
from trenchcoat.students import TransferRequest

MOST_TILES = 2
"""Maximum tiles per layer: with the operator's tile size a large model has so many that simulating them takes hours.
The scratch of larger tiles is about 0.1 GiB for 8B and 0.4 GiB for 405B, at a moment that is not the peak."""

Sharding = Literal["full", "node", "none"]


@dataclass(frozen=True)
class Simulated:
    """Peak bytes on one rank during the step, by kind (as named by PyTorch's tracker)."""

    peak: int
    parts: dict[str, int]
    seconds: float


class _CausalMask(LazyMask):
    """The mask of unpadded rows; needs no values, which fake tensors do not have."""

    def __init__(self, batch: int, tokens: int) -> None:
        super().__init__({"q_length": tokens})
        self.shape = (batch, tokens)

    def teacher(self, implementation: str, columns: Columns | None = None) -> Any:
        """None: the fused attention is causal without a mask."""
        return None


class _PeakTracker(FSDPMemTracker):
    """PyTorch's tracker without the per-unit FSDP peaks, which it would update after every operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if now["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)


def simulate(
    config: Any,
    student: StudentConfig,
    stage: TransferConfig | LoraConfig,
    *,
    seq_len: int,
    ranks: int = 1,
    shard: Sharding = "full",
    node_size: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> Simulated:
    """Memory of rank 0 in one step of ``stage``: ``stage.batch_size`` rows of ``seq_len`` tokens per rank.

    ``config`` is a Transformers config, ``shard`` as in ``parallel.shard``. Raises ``UserError`` inside a process group
    and for a family without fused attention.
    """
    began = time.monotonic()
    if isinstance(stage, LoraConfig) and stage.train == "all":
        raise UserError("--simulate knows lora.train=lora and mixer, not all; leave it out: `plan` counts all three")
    if isinstance(stage, LoraConfig) and stage.piece_len is not None:
        raise UserError("--simulate reads whole rows: leave it out, or set lora.piece_len=null; `plan` counts pieces")
    if dist.is_initialized():
        raise UserError("--simulate creates its own process group: run `trenchcoat plan` without torchrun")
    model = _build(config, student, stage, dtype)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        sharded = shard != "none" and ranks > 1
        mesh = _mesh(ranks, shard, node_size) if sharded else None
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_few_tiles(config, stage.batch_size * seq_len))
            snapshot = _step(model, stage, mesh, ranks=ranks, seq_len=seq_len)
    finally:
        dist.destroy_process_group()
    parts = {str(getattr(kind, "value", kind)): int(size) for kind, size in snapshot.items() if size}
    peak = parts.pop("Total")
    return Simulated(peak, parts, time.monotonic() - began)


def _build(config: Any, student: StudentConfig, stage: TransferConfig | LoraConfig, dtype: torch.dtype) -> Any:
    """The complete model of the stage, on the meta device."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        except ValueError as error:
            raise UserError(f"--simulate needs a family with fused attention (sdpa): {error}") from error
        attach_students(model, replace(student, impl="chunkwise"))  # kernels need tensors with data
        if isinstance(stage, LoraConfig):
            begin_stage_2(model, stage)
            freeze_for_stage_2(model, stage)
        else:
            freeze_for_transfer(model)
    set_mode(model, "student" if isinstance(stage, LoraConfig) else "transfer")
    return model


def _mesh(ranks: int, shard: Sharding, node_size: int) -> DeviceMesh:
    if shard == "node" and ranks > node_size:
        if ranks % node_size:
            raise UserError(f"{ranks} processes do not divide into nodes of {node_size}")
        return init_device_mesh("cpu", (ranks // node_size, node_size), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))


@contextmanager
def _few_tiles(config: Any, tokens: int) -> Iterator[None]:
    """Use few tiles, and clear the cached scratch sizes."""
    rows = int(config.num_attention_heads) * tokens
    before, needed = (chunkwise.TILE_TOKENS, closed_form.TILE_TOKENS), dict(Scratch._needed)
    Scratch._needed.clear()
    chunkwise.TILE_TOKENS = max(before[0], -(-rows // MOST_TILES))
    closed_form.TILE_TOKENS = max(before[1], -(-rows // MOST_TILES))
    try:
        yield
    finally:
        chunkwise.TILE_TOKENS, closed_form.TILE_TOKENS = before
        Scratch._needed.clear()
        Scratch._needed.update(needed)


def _step(
    model: Any, stage: TransferConfig | LoraConfig, mesh: DeviceMesh | None, *, ranks: int, seq_len: int
) -> dict[Any, int]:
    """The tracker's snapshot of the peak."""
    model.to_empty(device="cpu")  # fake tensors, as FakeTensorMode is active
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [p for s in students_of(model).values() for p in s.parameters()]
    outside = list(dict.fromkeys([*trained, *own]))
    copies = 2 if ranks == 1 else 4  # both moments; for a shard, also the optimizer's parameter and gradient copies
    optimizer = [torch.empty(-(-p.numel() // ranks), dtype=torch.float32) for p in trained for _ in range(copies)]
    ids = torch.zeros(stage.batch_size, seq_len, dtype=torch.int64)
    if mesh is None:
        held = sum(t.nbytes for t in (*{id(p): p for p in model.parameters()}.values(), ids, *optimizer))
        with live_tensor_memory() as memory:
            _run(model, stage, ids)
        return {"Total": held + memory.peak, "Parameters and optimizer": held, "Activations and gradients": memory.peak}
    shard_units(model, decoder_of(model).layers, mesh=mesh, ignored_params=set(outside))
    tracker = _PeakTracker(model)
    tracker.track_inputs((ids, *optimizer, *outside))
    with tracker:
        _run(model, stage, ids, tracker.reset_mod_stats)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return dict(snapshot)


def _run(
    model: Any, stage: TransferConfig | LoraConfig, ids: Tensor, next_pass: Callable[[], None] = lambda: None
) -> None:
    """One step; ``next_pass`` is called between two forward passes."""
    if isinstance(stage, LoraConfig):
        _lora_step(model, stage, ids, next_pass)
    else:
        _transfer_step(model, stage, ids)


def _lora_step(model: Any, stage: LoraConfig, ids: Tensor, next_pass: Callable[[], None]) -> None:
    """Like `objectives.logit_objective`, without reading values."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": _CausalMask(*ids.shape), "use_cache": False}
    taught_nd: Tensor | None = None
    if stage.teacher_pass:
        with torch.no_grad(), as_teacher(model):
            taught_nd = run_to_head(model, **inputs)[0].flatten(0, 1)
        next_pass()
    model.train()
    hidden_bTd, further = run_to_head(model, **inputs)
    gradient_bTd = _logit_gradient(VocabularyHead(model), hidden_bTd, taught_nd)
    torch.autograd.backward([hidden_bTd, *further], [gradient_bTd, *(torch.zeros_like(t) for t in further)])


def _logit_gradient(head: VocabularyHead, hidden_bTd: Tensor, taught_nd: Tensor | None) -> Tensor:
    """Like `logits.LogitLoss.over`."""
    flat_nd = hidden_bTd.detach().flatten(0, 1)

    def piece(where: slice, logits_nV: Tensor) -> Tensor:
        """The gradient for the logits of a piece."""
        found_nV = F.log_softmax(logits_nV, -1, dtype=torch.float32)
        if taught_nd is not None:
            log_p_nV = F.log_softmax(head(taught_nd[where]), -1, dtype=torch.float32)
            p_nV = log_p_nV.exp()
            torch.linalg.vecdot(p_nV, log_p_nV.sub_(found_nV))
            del log_p_nV
            found_nV = p_nV.add_(found_nV.exp_())
        return found_nV.to(logits_nV.dtype)

    found_nd = torch.zeros_like(flat_nd)
    found_nd.copy_(head.backward(flat_nd.clone(), piece))
    return found_nd.view_as(hidden_bTd)


def _transfer_step(model: Any, stage: TransferConfig, ids: Tensor) -> None:
    """Like `objectives.transfer_objective`."""
    model.eval()
    simulated = stage.xent_weight == 0 and stage.normalize == "none"
    for student in students_of(model).values():
        student.request = TransferRequest(mse_weight=stage.mse_weight)
    if not simulated:
        set_mode(model, "teacher")
    mask = _CausalMask(*ids.shape) if simulated else None
    with torch.no_grad():
        run_decoder(model, input_ids=ids, attention_mask=mask, use_cache=False)

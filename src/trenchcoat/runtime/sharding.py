"""Sharding over processes: the frozen base with FSDP2, and the optimizer state of what is trained.

The frozen base is split into FSDP units (every decoder layer, the embedding, the head), gathered one by one as the
forward and backward pass reach them; nothing in it is trained, so its gradients are never reduced. Students and LoRA
are small: they are replicated on every process, outside FSDP; their gradients are summed once per optimizer step, and
AdamW's state (and the copy of the parameters that it steps) is sharded, as in ZeRO (https://arxiv.org/abs/1910.02054).

Shapes: a parameter is sharded along its first axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trenchcoat.config import ParallelConfig, UserError
from trenchcoat.runtime import distributed
from trenchcoat.runtime.weightfiles import tensor_files


def is_sharded(model: nn.Module) -> bool:
    """Whether the base of ``model`` is sharded over processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether each process holds a shard of ``tensor``."""
    return isinstance(tensor, DTensor)


def shard_base(model: nn.Module, layers: Sequence[nn.Module], cfg: ParallelConfig) -> None:
    """Make FSDP units of the ``layers``, the embedding, the head, and the rest; the model may be on the meta device.

    Call it before students and LoRA are attached: modules added later are not sharded.
    """
    if cfg.cpu_offload and distributed.world().device_type == "cpu":
        raise UserError("parallel.cpu_offload=true needs GPUs: without one, everything is in host memory already")
    policy = CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy()
    shard_units(model, layers, mesh=distributed.mesh(cfg), offload_policy=policy)


def shard_units(model: Any, layers: Sequence[nn.Module], **options: Any) -> None:
    """Make FSDP units of the ``layers``, the embedding and the head (part of the rest if tied), and the rest."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    for unit in (*layers, *(() if tied else (embedding, head)), model):
        fully_shard(unit, reshard_after_forward=True, **options)


def to_device(model: nn.Module, device: torch.device) -> None:
    """Allocate the shards of a model on meta (its buffers are real) on ``device``; buffers keep their values."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, value in buffers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, value.to(device))


def fill_from_files(model: nn.Module, folder: Path) -> None:
    """Read this process's shard of every parameter (and no more) from the safetensors files in ``folder``.

    Raises ``UserError`` naming a tensor that is missing or has another shape.
    """
    where = tensor_files(folder)
    wanted = dict(model.named_parameters())
    missing = sorted(name for name in wanted if name not in where)
    if missing:
        raise UserError(
            f"{folder} has no tensor {missing[0]!r} ({len(missing)} of {len(wanted)} are missing): the family's "
            "tensors are renamed or merged on loading, or the model is incomplete. Set parallel.shard=none"
        )
    for name, parameter in wanted.items():  # reopened for each, so that what was read does not stay mapped
        with torch.no_grad(), safe_open(str(where[name]), framework="pt") as opened:
            _fill(parameter, opened.get_slice(name), f"{name} in {where[name]}")


def _fill(parameter: nn.Parameter, stored: Any, what: str) -> None:
    if tuple(stored.get_shape()) != tuple(parameter.shape):
        raise UserError(f"{what} is {tuple(stored.get_shape())}, the model's is {tuple(parameter.shape)}")
    local, rows = _local(parameter)
    if local.numel():
        local.copy_(stored[rows] if parameter.dim() else stored[:])


def _local(parameter: Tensor) -> tuple[Tensor, slice]:
    """This process's shard of a parameter, and its rows."""
    if not isinstance(parameter, DTensor):
        return parameter.data, slice(0, parameter.shape[0] if parameter.dim() else 1)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), slice(offset[0], offset[0] + shape[0])


def first_elements(tensor: Tensor, count: int) -> Tensor:
    """The first ``count`` elements of a tensor in float32 on the host; a collective when sharded."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().flatten()[:count].to("cpu", torch.float32)
    local, rows = _local(tensor)
    found = torch.zeros(min(count, tensor.numel()))
    start = rows.start * (tensor.numel() // max(1, tensor.shape[0]))
    owns = tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_coordinate()[0] == 0  # type: ignore[index]
    if owns and start < len(found) and local.numel():
        part = local.detach().flatten()[: len(found) - start].to("cpu", torch.float32)
        found[start : start + len(part)] = part
    return distributed.sum_tensor(found)


def compute_device(model: nn.Module) -> torch.device:
    """The device that the layers of ``model`` run on (their weights may be offloaded)."""
    return distributed.device() if is_sharded(model) else next(model.parameters()).device


def run_decoder(model: nn.Module, **inputs: Any) -> Tensor:
    """Forward pass of the layers, without the vocabulary head where possible: hidden states, or of a sharded model the
    logits of one token."""
    hub: Any = model
    if is_sharded(model):  # FSDP needs its root called; the head then runs on one token only
        found: Tensor = hub(**inputs, logits_to_keep=1).logits
        return found
    decoder = hub.get_decoder() if hasattr(hub, "get_decoder") else None
    output = (decoder if isinstance(decoder, nn.Module) else hub)(**inputs)
    return output[0]


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective); other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class MasterCopies:
    """The parameters that the optimizer steps: the trained ones, or with several processes a shard of each.

    ``reduce`` moves gradients from the parameters to the shards (a sum over processes), ``publish`` stepped shards
    back to the parameters.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter]) -> None:
        self.trainable = dict(trainable)
        self.parameters: dict[str, nn.Parameter] = self.trainable
        if distributed.size() > 1:
            self._mesh = distributed.flat_mesh()
            self.parameters = {
                name: nn.Parameter(distribute_tensor(p.detach(), self._mesh, [Shard(0)]))
                for name, p in self.trainable.items()
            }

    @property
    def sharded(self) -> bool:
        """Whether the optimizer works on shards."""
        return distributed.size() > 1

    def reduce(self) -> None:
        """Sum the gradients over processes into the shards; clears the parameters' own gradients."""
        if not self.sharded:
            return
        present = distributed.all_sum([float(p.grad is not None) for p in self.trainable.values()])
        for (name, parameter), owners in zip(self.trainable.items(), present, strict=True):
            if not owners:
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            partial = DTensor.from_local(gradient, self._mesh, [Partial()])
            self.parameters[name].grad = partial.redistribute(placements=[Shard(0)])

    @torch.no_grad()
    def publish(self) -> None:
        """Gather the shards into the parameters."""
        if not self.sharded:
            return
        for name, parameter in self.trainable.items():
            parameter.copy_(whole(self.parameters[name]))

"""Tensors spread over processes: the frozen base by FSDP2, and what is trained by shards of its optimizer state.

The frozen base is cut into units (every decoder layer, the embedding, the head), gathered one by one as the forward
and backward pass reach them; nothing in it is trained, so no gradient of it is ever reduced. Students and LoRA are
small, stay whole on every process and outside FSDP; their gradients are summed once an optimizer step, and AdamW's
state (and the copy of the parameters that it steps) is sharded, as in ZeRO (https://arxiv.org/abs/1910.02054).

Shapes: a parameter is sharded along its first axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trenchcoat.config import ParallelConfig, UserError
from trenchcoat.runtime import distributed


def is_sharded(model: nn.Module) -> bool:
    """Whether the base of ``model`` is spread over processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether each process holds a part of ``tensor``."""
    return isinstance(tensor, DTensor)


def shard_base(model: nn.Module, layers: Sequence[nn.Module], cfg: ParallelConfig) -> None:
    """Make FSDP units of ``layers``, of the embedding and the head, and of what is left; the model may be on meta.

    Call it before students and LoRA are attached: what comes later is left whole.
    """
    if cfg.cpu_offload and distributed.world().device_type == "cpu":
        raise UserError("parallel.cpu_offload=true needs GPUs: without one, everything is in host memory already")
    policy = CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy()
    shard_units(model, layers, mesh=distributed.mesh(cfg), offload_policy=policy)


def shard_units(model: Any, layers: Sequence[nn.Module], **options: Any) -> None:
    """FSDP units of ``layers``, of the embedding and the head (in one with the rest if tied), and of the rest."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    for unit in (*layers, *(() if tied else (embedding, head)), model):
        fully_shard(unit, reshard_after_forward=True, **options)


def to_device(model: nn.Module, device: torch.device) -> None:
    """Give a model on meta (its buffers are real) memory for its shards on ``device``, and its buffers their values."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, value in buffers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, value.to(device))


def tensor_files(folder: Path) -> dict[str, Path]:
    """File of every tensor of a checkpoint in ``folder``: one safetensors file, or several with an index."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} has no safetensors files; several processes read their shares from those only: convert the "
            "model with save_pretrained, or set parallel.shard=none"
        )
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                where |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a readable safetensors file ({error}); get it again") from error
    return where


def fill_from_files(model: nn.Module, folder: Path) -> None:
    """Read this process's part of every parameter (and no more) out of the safetensors files in ``folder``.

    Raises ``UserError`` naming a tensor that is missing or has another shape.
    """
    where = tensor_files(folder)
    wanted = dict(model.named_parameters())
    missing = sorted(name for name in wanted if name not in where)
    if missing:
        raise UserError(
            f"{folder} has no tensor {missing[0]!r} ({len(missing)} of {len(wanted)} are missing): the family's "
            "tensors are renamed or joined when it is loaded whole, or the model is incomplete. Set parallel.shard=none"
        )
    for name, parameter in wanted.items():  # opened anew for each, so that what was read does not stay mapped
        with torch.no_grad(), safe_open(str(where[name]), framework="pt") as opened:
            _fill(parameter, opened.get_slice(name), f"{name} in {where[name]}")


def _fill(parameter: nn.Parameter, stored: Any, what: str) -> None:
    if tuple(stored.get_shape()) != tuple(parameter.shape):
        raise UserError(f"{what} is {tuple(stored.get_shape())}, the model's is {tuple(parameter.shape)}")
    local, rows = _local(parameter)
    if local.numel():
        local.copy_(stored[rows] if parameter.dim() else stored[:])


def _local(parameter: Tensor) -> tuple[Tensor, slice]:
    """This process's part of a parameter, and which of its rows that is."""
    if not isinstance(parameter, DTensor):
        return parameter.data, slice(0, parameter.shape[0] if parameter.dim() else 1)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), slice(offset[0], offset[0] + shape[0])


def first_elements(tensor: Tensor, count: int) -> Tensor:
    """The first ``count`` elements of a tensor in float32 on the host, wherever they are; a collective when sharded."""
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
    """Where the layers of ``model`` compute (their weights may wait elsewhere)."""
    return distributed.device() if is_sharded(model) else next(model.parameters()).device


def run_decoder(model: nn.Module, **inputs: Any) -> Tensor:
    """The forward pass of the layers, without the vocabulary head where possible: hidden states, or of a spread model
    the logits of one token."""
    hub: Any = model
    if is_sharded(model):  # FSDP wants its root to be called; of the head's work one token is left
        found: Tensor = hub(**inputs, logits_to_keep=1).logits
        return found
    decoder = hub.get_decoder() if hasattr(hub, "get_decoder") else None
    output = (decoder if isinstance(decoder, nn.Module) else hub)(**inputs)
    return output[0]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective); others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class MasterCopies:
    """The trained parameters as the optimizer sees them: themselves, or with several processes a shard of each.

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
        """Sum the gradients over processes into the shards; the parameters' own gradients are then gone."""
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
        """Copy the shards, gathered, into the parameters."""
        if not self.sharded:
            return
        for name, parameter in self.trainable.items():
            parameter.copy_(whole(self.parameters[name]))

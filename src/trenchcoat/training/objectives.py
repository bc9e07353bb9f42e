"""What a stage minimizes: attention transfer (stage 1), and losses of the logits (stage 2).

An objective runs the forward pass on one micro-batch and, when gradients are enabled, adds the gradients of the
micro-batch's mean loss to ``.grad``; it returns plain numbers. Shapes: b rows, T tokens, V vocabulary.

    "loss"                          what is minimized; "tokens": number of tokens averaged over
    "loss/layer_03", ...            transfer: the loss of each layer
    "mse/...", "relative/...",      transfer, without gradients only: mean((y - y_hat)^2), its ratio to mean(y^2),
    "xent/..."                      and the attention cross-entropy if its weight is not 0
    "kl", "ce"                      stage 2: the parts of a mixed loss
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trenchcoat.config import LoraConfig, TransferConfig, UserError
from trenchcoat.config.registries import resolved
from trenchcoat.models.cache import detach_cache, new_cache
from trenchcoat.runtime.head import VocabularyHead, run_to_head
from trenchcoat.runtime.sharding import run_decoder
from trenchcoat.students import StudentAttention, TransferRequest, layer_key
from trenchcoat.training.logits import LogitLoss, Teacher, forward_inputs, in_pieces, next_tokens
from trenchcoat.training.losses import OBJECTIVES, check_loss

if TYPE_CHECKING:
    from trenchcoat.data.batches import Batch

IDLE = "idle"
"""Key that marks a batch run only to keep the collectives of all processes matched; its gradients are 0."""

Metrics = dict[str, float]
Objective = Callable[[nn.Module, "Batch"], Metrics]
"""Runs one micro-batch, adds its gradients when they are enabled, and returns its metrics."""


def _mask_if_padded(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask


def forward_decoder(model: nn.Module, batch: Batch) -> Tensor:
    """Run the decoder's layers on a batch of tokens or hidden states, without gradients; returns [b, T, d]."""
    name = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
    inputs: dict[str, Any] = {name: batch[name], "attention_mask": _mask_if_padded(batch), "use_cache": False}
    with torch.no_grad():
        return run_decoder(model, **inputs)


def transfer_objective(cfg: TransferConfig, outputs: Callable[[Batch, Tensor], None] | None = None) -> Objective:
    """Attention transfer (LoLCATs, arXiv 2410.10254, section 3.1), each layer independently.

    Each ``StudentAttention`` in ``transfer`` mode computes its loss and its parameters' gradients inside the forward
    pass, which itself runs without gradients, so no activations are kept from one layer to the next. ``loss`` is the
    mean over layers; gradients are those of each layer's own loss. ``outputs`` is called with every batch (except idle
    ones) and the hidden states [b, T, d] after the last layer. Raises ``UserError`` when no layer is in transfer mode,
    ``RuntimeError`` when the forward pass did not reach one of them.
    """

    def objective(model: nn.Module, batch: Batch) -> Metrics:
        """One micro-batch of attention transfer."""
        students = [m for m in model.modules() if isinstance(m, StudentAttention) and m.mode == "transfer"]
        if not students:
            raise UserError("attention transfer needs layers in transfer mode: attach students, then set_mode(...)")
        learning = torch.is_grad_enabled()
        request = TransferRequest(
            mse_weight=cfg.mse_weight,
            xent_weight=cfg.xent_weight,
            normalize=cfg.normalize,
            backward=learning and IDLE not in batch,
        )
        hidden_bTd = _forward_transfer(model, batch, students, request)
        if outputs is not None and IDLE not in batch:
            outputs(batch, hidden_bTd)
        mask = batch.get("attention_mask")
        tokens = hidden_bTd[..., 0].numel() if mask is None else int(mask.sum())
        return _collect(students, detailed=not learning, xent=cfg.xent_weight > 0) | {"tokens": float(tokens)}

    return objective


def initialise_from_text(model: nn.Module, batch: Batch) -> None:
    """Initialise from `batch` those students whose initial values depend on text (`StudentAttention.initialise`).

    The students of ``model`` must be in ``transfer`` mode.
    """
    students = [m for m in model.modules() if isinstance(m, StudentAttention) and m.mode == "transfer"]
    students = [student for student in students if student.starts_from_text(student.cfg)]
    if students:
        _forward_transfer(model, batch, students, TransferRequest(initialise=True))


def _forward_transfer(
    model: nn.Module, batch: Batch, students: list[StudentAttention], request: TransferRequest
) -> Tensor:
    """Run the decoder with ``request`` set on each of ``students`` (in transfer mode); returns its output."""
    for student in students:
        student.request, student.metrics = request, {}
    if model.training:
        model.eval()
    try:
        return forward_decoder(model, batch)
    finally:
        for student in students:
            student.request = None


def _collect(students: list[StudentAttention], *, detailed: bool, xent: bool) -> Metrics:
    """The metrics of all layers, with a single copy to the host."""
    missed = [student.layer_idx for student in students if "loss" not in student.metrics]
    if missed:
        raise RuntimeError(f"the forward pass did not compute the transfer loss of layers {missed}")
    names = ["loss", "mse", "target_power", *(["xent"] if xent else [])] if detailed else ["loss"]
    device = students[0].metrics["loss"].device
    table = torch.stack(
        [torch.stack([s.metrics[name].to(device).float() for name in names]) for s in students]
    ).tolist()
    columns = {name: [row[i] for row in table] for i, name in enumerate(names)}
    if detailed:
        powers = columns.pop("target_power")
        columns["relative"] = [mse / max(power, 1e-30) for mse, power in zip(columns["mse"], powers, strict=True)]
    metrics: Metrics = {name: sum(values) / len(values) for name, values in columns.items()}
    for name, values in columns.items():
        metrics |= {layer_key(name, s.layer_idx): value for s, value in zip(students, values, strict=True)}
    for student in students:
        student.metrics = {}
    return metrics


def next_token_loss(logits_bTV: Tensor, labels_bT: Tensor) -> tuple[Tensor, int]:
    """(mean next-token cross-entropy in float32, number of labels) over labels other than -100; loss 0 if none."""
    targets = next_tokens(labels_bT).reshape(-1)
    count = int((targets != -100).sum())
    total = F.cross_entropy(
        logits_bTV.reshape(-1, logits_bTV.shape[-1]).float(), targets, ignore_index=-100, reduction="sum"
    )
    return total / max(count, 1), count


def next_token_objective() -> Objective:
    """Next-token prediction on labels other than -100, through the whole model."""
    return logit_objective(kl_weight=0.0)


def logit_objective(*, kl_weight: float, teacher: Teacher | None = None, piece_len: int | None = None) -> Objective:
    """``kl_weight`` KL(teacher || student) + (1 - ``kl_weight``) next-token cross-entropy, through the whole model.

    The divergence is averaged over all real tokens of the micro-batch (of the prompt too, never padding), the
    cross-entropy over the labels other than -100. Both are computed in float32 and in pieces of tokens: see
    :mod:`trenchcoat.runtime.head`. ``tokens`` counts real tokens, or labels where ``kl_weight`` is 0.

    ``piece_len``: rows are read in pieces of so many tokens, each with the cache that the ones before have left. The
    loss is that of whole rows; its gradients end where a piece begins (truncated backpropagation through time).
    """
    if teacher is None and kl_weight > 0:
        raise ValueError("a divergence needs a teacher")

    def objective(model: nn.Module, batch: Batch) -> Metrics:
        """One micro-batch."""
        learning = torch.is_grad_enabled()
        taught = teacher(model, batch) if teacher is not None and kl_weight > 0 else None
        if model.training != learning:
            model.train(learning)
        loss = LogitLoss.of(batch, kl_weight, taught)
        inputs = forward_inputs(batch)
        if piece_len is None:
            _add_gradients(model, loss, inputs, 0, idle=IDLE in batch)
            return loss.metrics()
        cache = new_cache(model)
        for first, piece in in_pieces(inputs, piece_len, cache):
            _add_gradients(model, loss, piece, first, idle=IDLE in batch)
            detach_cache(cache)
        return loss.metrics()

    return objective


def _add_gradients(model: nn.Module, loss: LogitLoss, inputs: dict[str, Any], first: int, *, idle: bool) -> None:
    """Run the model on the columns from ``first`` on and, when gradients are enabled, add those of ``loss``."""
    hidden_bTd, further = run_to_head(model, **inputs)
    gradient_bTd = loss.over(VocabularyHead(model), hidden_bTd, first)
    if torch.is_grad_enabled():
        gradients = [gradient_bTd, *(torch.zeros_like(t) for t in further)]
        torch.autograd.backward([hidden_bTd, *further], [g * 0.0 if idle else g for g in gradients])


def kl(cfg: LoraConfig, teacher: Teacher) -> Objective:
    """The divergence from the teacher alone."""
    return logit_objective(kl_weight=1.0, teacher=teacher, piece_len=cfg.piece_len)


def ce(cfg: LoraConfig, teacher: Teacher) -> Objective:
    """Next-token prediction alone."""
    return logit_objective(kl_weight=0.0, piece_len=cfg.piece_len)


def mix(cfg: LoraConfig, teacher: Teacher) -> Objective:
    """Both, by ``lora.kl_weight``."""
    return logit_objective(kl_weight=cfg.kl_weight, teacher=teacher, piece_len=cfg.piece_len)


def stage_2_objective(cfg: LoraConfig, teacher: Teacher) -> Objective:
    """The objective that ``cfg.loss`` names; raises ``UserError`` for an unknown name."""
    check_loss(cfg.loss)
    return resolved(OBJECTIVES[cfg.loss])(cfg, teacher)


def first_nonfinite(model: nn.Module, objective: Objective, batch: Batch) -> str | None:
    """Name of the first parameter with a NaN or infinity, else of the first module whose output has one."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return name
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        """A hook that records ``name`` if the module's output is the first that is not finite."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            """Check the first output."""
            first = output[0] if isinstance(output, tuple | list) and output else output
            if not found and isinstance(first, Tensor) and first.is_floating_point() and not first.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            objective(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None

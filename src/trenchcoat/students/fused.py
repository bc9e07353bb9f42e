"""Students on the Triton kernels: which implementation runs where, and the feature maps as the kernels take them.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head dim, E value dim.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trenchcoat.config import FeatureMapConfig
from trenchcoat.ops import Rule, StudentState
from trenchcoat.students.feature_maps import FeatureMap

if TYPE_CHECKING:
    from trenchcoat.ops.triton.launch import FusedMap

log = logging.getLogger("trenchcoat")
OLDEST, NOT_YET = (8, 0), (10, 0)
"""Compute capabilities: older tensor cores have no bfloat16, newer ones are for who asks for `triton` by name."""
_told: set[str] = set()


@dataclass(frozen=True)
class Shape:
    """What a layer asks of the kernels."""

    dtype: torch.dtype
    rule: Rule
    dim: int
    values: int


def implementation(impl: str, device: torch.device, feature_map: FeatureMap | None, shape: Shape) -> str:
    """What `student.impl` stands for on `device`.

    `auto` is `triton` on CUDA devices where the kernels can do what `feature_map` and `shape` ask, else `chunkwise`.
    The choice is logged once, with the reason. Before the first use of `triton` on a device its kernels are checked.

    Raises:
        ValueError: `triton` cannot run here.
        RuntimeError: the kernels failed their check.
    """
    if impl not in ("auto", "triton"):
        return impl
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if impl == "auto" and device.type != "cuda":
        reason: str | None = f"{device} is not a CUDA device"
    else:
        reason = _obstacle(device, feature_map)
        if impl == "auto":
            reason = reason or _unfit(device, shape, None if feature_map is None else feature_map.cfg)
        elif reason is not None:
            raise ValueError(f"student.impl is triton, but {reason}; student.impl=chunkwise can do it")
    chosen = "triton" if reason is None else "chunkwise"
    said = f"{device}: {chosen}" + ("" if reason is None else f" ({reason})")
    if said not in _told:
        _told.add(said)
        log.info("attention on %s", said)
    if chosen == "triton":
        from trenchcoat.ops.triton.check import check

        check(device)
    return chosen


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _obstacle(device: torch.device, feature_map: FeatureMap | None) -> str | None:
    """Why the kernels cannot run, as far as it is known before a call; None when they can."""
    if not _installed():
        return "triton is not installed (pip install 'trenchcoat[kernels]')"
    if device.type != "cuda":
        from trenchcoat.ops.triton.launch import INTERPRETED

        if not INTERPRETED:
            return f"{device} is not a CUDA device"
    elif torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if feature_map is not None and feature_map.down is not None:
        return "the kernels have no adapter (student.feature_map.adapter_dim)"
    return None


@lru_cache
def _unfit(device: torch.device, shape: Shape, cfg: FeatureMapConfig | None) -> str | None:
    """Why the kernels cannot, or should not, take tensors of this shape; or None."""
    from trenchcoat.ops.triton.launch import Call, FusedMap, Spans, refusal

    if torch.cuda.get_device_capability(device) >= NOT_YET:
        return f"{torch.cuda.get_device_name(device)} is newer than what the kernels are written for"
    if shape.dtype == torch.float32:
        return "in float32 the kernels multiply without tensor cores"
    q, v = (torch.empty(1, 1, 0, n, dtype=shape.dtype, device=device) for n in (shape.dim, shape.values))
    phi = None if cfg is None else FusedMap(cfg.name, torch.empty(1, shape.dim, cfg.feature_dim, device="meta"))
    return refusal(Call(shape.rule, q, q, v, phi, phi, q, None, None, None, None, Spans()))


def _fused(phi: FeatureMap | None, rule: Rule) -> FusedMap | None:
    """A feature map as the kernels take it; gradients flow to its parameters."""
    if phi is None or not rule.far:
        return None
    from trenchcoat.ops.triton.launch import FusedMap

    return FusedMap(phi.cfg.name, phi.matrix(), phi.bias, phi.cfg.eps)


def attend(
    q: Tensor, k: Tensor, v: Tensor, maps: tuple[FeatureMap | None, FeatureMap | None], mix_H: Tensor, **options: Any
) -> tuple[Tensor, StudentState | None]:
    """:func:`trenchcoat.ops.triton.attention.attend` with a student's maps."""
    from trenchcoat.ops.triton.attention import attend

    rule: Rule = options["rule"]
    query, key = (_fused(m, rule) for m in maps)
    return attend(q, k, v, query, key, rule.log_ratio(mix_H), **options)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: tuple[FeatureMap | None, FeatureMap | None],
    mix_H: Tensor,
    state: StudentState,
    **options: Any,
) -> Tensor:
    """:func:`trenchcoat.ops.triton.decode.decode` with a student's maps."""
    from trenchcoat.ops.triton.decode import decode

    rule: Rule = options["rule"]
    query, key = (_fused(m, rule) for m in maps)
    return decode(q, k, v, query, key, rule.log_ratio(mix_H), state, **options)


def transfer(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    maps: tuple[FeatureMap | None, FeatureMap | None],
    log_ratio_H: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(summed squared error, gradient for log(g / l)); the maps' gradients are added to their parameters' `.grad`."""
    from trenchcoat.ops.triton.attention import transfer

    query, key = (_fused(m, options["rule"]) for m in maps)
    total, grads = transfer(*tensors, query, key, log_ratio_H, **options)
    return total, _add(maps, grads, log_ratio_H, 1.0)


def cross_entropy(
    q: Tensor,
    k: Tensor,
    maps: tuple[FeatureMap | None, FeatureMap | None],
    log_ratio_H: Tensor,
    weight: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy of the attention rows, gradient of `weight` times it for log(g / l)); the maps' gradients
    are added to their parameters' `.grad`."""
    from trenchcoat.ops.triton.crossent_launch import cross_entropy

    query, key = (_fused(m, options["rule"]) for m in maps)
    total, grads = cross_entropy(q, k, query, key, log_ratio_H, **options)
    return total, _add(maps, grads, log_ratio_H, weight)


def _add(
    maps: tuple[FeatureMap | None, FeatureMap | None], grads: list[Tensor | None], log_ratio_H: Tensor, weight: float
) -> Tensor:
    """Add `weight` times the maps' gradients (query matrix and bias, key matrix and bias) to their `.grad`; returns
    that for log(g / l), which comes last."""
    for phi, matrix, bias in ((maps[0], grads[0], grads[1]), (maps[1], grads[2], grads[3])):
        if phi is None or matrix is None:
            continue
        gradients = phi.gradients()
        gradients.weight.add_(matrix, alpha=weight)
        if bias is not None and gradients.bias is not None:
            gradients.bias.add_(bias, alpha=weight)
    return torch.zeros_like(log_ratio_H) if grads[4] is None else grads[4] * weight

"""Students on the Triton kernels: choice of the implementation, and feature maps in the kernels' format.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head dim, E value dim.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trenchcoat.config import FeatureMapConfig
from trenchcoat.ops import Rule
from trenchcoat.students.feature_maps import ACTIVATIONS, FeatureMap

if TYPE_CHECKING:
    from trenchcoat.ops.triton.launch import FusedMaps

_log = logging.getLogger("trenchcoat")
OLDEST, NOT_YET = (8, 0), (10, 0)
"""Compute capabilities: tensor cores before the first do not support bfloat16; from the second on, `auto` does not
choose the kernels, which are not tuned for these."""
_reported: set[str] = set()


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer that the kernels must support."""

    dtype: torch.dtype
    rule: Rule
    dim: int
    values: int


def implementation(impl: str, device: torch.device, feature_map: FeatureMap | None, shape: LayerShape) -> str:
    """The implementation that `student.impl` chooses on `device`.

    `auto` is `triton` on CUDA devices if the kernels support `feature_map` and `shape`, else `chunkwise`. The choice is
    logged once, with the reason. The kernels are checked before their first use on a device.

    Raises:
        ValueError: `triton` cannot run here, or `fla` was asked for.
        RuntimeError: the kernels failed their self-check.
    """
    if impl == "fla":
        raise ValueError("student.impl is fla, whose kernels are for gdn and lightning; use triton, chunkwise or auto")
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
            raise ValueError(f"student.impl is triton, but {reason}; use student.impl=chunkwise")
    chosen = "triton" if reason is None else "chunkwise"
    choice = f"{device}: {chosen}" + ("" if reason is None else f" ({reason})")
    if choice not in _reported:
        _reported.add(choice)
        _log.info("attention on %s", choice)
    if chosen == "triton":
        from trenchcoat.ops.triton.check import check

        check(device)
    return chosen


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _obstacle(device: torch.device, feature_map: FeatureMap | None) -> str | None:
    """Why the kernels cannot run, as far as known before a call; None if they can."""
    if not _installed():
        return "triton is not installed (pip install triton)"
    if device.type != "cuda":
        from trenchcoat.ops.triton.launch import INTERPRETED

        if not INTERPRETED:
            return f"{device} is not a CUDA device"
    elif torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if feature_map is not None and feature_map.act.kernel is None:
        return f"the kernels do not support the feature map {feature_map.cfg.name!r}"
    if feature_map is not None and feature_map.down is not None:
        return "the kernels do not support an adapter (student.feature_map.adapter_dim)"
    return None


@lru_cache
def _unfit(device: torch.device, shape: LayerShape, cfg: FeatureMapConfig | None) -> str | None:
    """Why the kernels cannot or should not run on tensors of this shape, or None."""
    from trenchcoat.ops.triton.launch import Call, FusedMap, refusal

    if torch.cuda.get_device_capability(device) >= NOT_YET:
        return f"{torch.cuda.get_device_name(device)} is newer than the GPUs the kernels are written for"
    if shape.dtype == torch.float32:
        return "in float32 the kernels multiply without tensor cores"
    q, v = (torch.empty(1, 1, 0, n, dtype=shape.dtype, device=device) for n in (shape.dim, shape.values))
    phi = None
    if cfg is not None:
        act, matrix = ACTIVATIONS[cfg.name], torch.empty(1, shape.dim, cfg.feature_dim, device="meta")
        phi = FusedMap(str(act.kernel), act.paired, matrix)
    return refusal(Call(shape.rule, q, q, v, phi, phi, q))


def fused_maps(query: FeatureMap | None, key: FeatureMap | None, rule: Rule) -> FusedMaps | None:
    """Feature maps in the kernels' format, or None without a far part; gradients flow to their parameters."""
    if query is None or key is None or not rule.far:
        return None
    from trenchcoat.ops.triton.launch import FusedMap

    q, k = (FusedMap(str(phi.act.kernel), phi.act.paired, phi.matrix(), phi.bias, phi.cfg.eps) for phi in (query, key))
    return q, k


def add_gradients(
    query: FeatureMap | None, key: FeatureMap | None, found: list[Tensor | None], weight: float = 1.0
) -> Tensor | None:
    """Add `weight` times the kernels' gradients (query matrix and bias, key matrix and bias) to the maps' `.grad`;
    returns the gradient of log(g / l), the last one."""
    for phi, matrix, bias in ((query, found[0], found[1]), (key, found[2], found[3])):
        if phi is None or matrix is None:
            continue
        gradients = phi.gradients()
        gradients.weight.add_(matrix, alpha=weight)
        if bias is not None and gradients.bias is not None:
            gradients.bias.add_(bias, alpha=weight)
    return None if found[4] is None else found[4] * weight

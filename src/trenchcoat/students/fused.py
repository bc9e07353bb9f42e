"""Students on kernels (Triton, C++): choice of the implementation, and feature maps in the kernels' format.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D head dim, E value dim.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from trenchcoat.config import FeatureMapConfig
from trenchcoat.ops import Rule
from trenchcoat.ops.compiled.decode import refusal as refusal_to_decode
from trenchcoat.ops.state import FusedMap, FusedMaps, StudentState
from trenchcoat.students.feature_maps import ACTIVATIONS, FeatureMap

_log = logging.getLogger("trenchcoat")
OLDEST, NOT_YET = (8, 0), (10, 0)
"""Compute capabilities: tensor cores before the first do not support bfloat16; from the second on, `auto` does not
choose the kernels, which are not tuned for these."""
_reported: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer that the kernels must support."""

    dtype: torch.dtype
    rule: Rule
    dim: int
    values: int


def implementation(
    impl: str, device: torch.device, feature_map: FeatureMap | None, shape: LayerShape, part: str = "attention"
) -> str:
    """The implementation that `student.impl` chooses on `device` (for a `part` of a student, named in the log).

    `auto` is `triton` on CUDA devices and `compiled` on CPUs if the kernels support `feature_map` and `shape` there,
    else `chunkwise`. The choice is logged once, with the reason. Kernels are checked before their first use on a
    device.

    Raises:
        ValueError: the implementation asked for cannot run here.
        RuntimeError: the kernels failed their self-check.
    """
    if impl == "fla":
        raise ValueError("student.impl is fla, whose kernels are not for this student; use triton, chunkwise or auto")
    if impl not in ("auto", "compiled", "triton"):
        return impl
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    kernels = impl if impl != "auto" else "compiled" if device.type == "cpu" else "triton"
    reason = _obstacle(kernels, device, feature_map, shape, automatic=impl == "auto")
    if impl != "auto" and reason is not None:
        raise ValueError(f"student.impl is {impl}, but {reason}; use student.impl=chunkwise")
    chosen = kernels if reason is None else "chunkwise"
    choice = f"{device}: {chosen}" + ("" if reason is None else f" ({reason})")
    if (part, choice) not in _reported:
        _reported.add((part, choice))
        _log.info("%s on %s", part, choice)
    if chosen == "triton" and device.type == "cuda":  # on a CPU it is Triton's interpreter, which needs minutes
        from trenchcoat.ops.triton.check import check

        check(device)
    return chosen


def _obstacle(
    kernels: str, device: torch.device, feature_map: FeatureMap | None, shape: LayerShape, *, automatic: bool
) -> str | None:
    """Why `kernels` cannot run, or (if `automatic`) should not; None if they can."""
    act = None if feature_map is None else feature_map.act
    if act is not None and act.kernel is None:
        return f"the kernels do not support the feature map {feature_map.cfg.name!r}"  # type: ignore[union-attr]
    if feature_map is not None and feature_map.down is not None:
        return "the kernels do not support an adapter (student.feature_map.adapter_dim)"
    if kernels == "compiled":
        return _compiled_obstacle(shape, device, None if act is None else act.kernel)
    reason = _triton_obstacle(device)
    if reason is None and automatic:
        reason = _unfit(device, shape, None if feature_map is None else feature_map.cfg)
    return reason


@lru_cache
def _compiled_obstacle(shape: LayerShape, device: torch.device, kernel: str | None) -> str | None:
    """Why the C++ kernels cannot run; they are built and checked if nothing else stands in the way."""
    from trenchcoat.ops.compiled.attention import refusal
    from trenchcoat.ops.compiled.build import Unavailable
    from trenchcoat.ops.compiled.check import check

    reason = refusal(shape.rule, shape.dtype, device, kernel)
    if reason is None:
        try:
            check()
        except Unavailable as error:
            reason = str(error)
    return reason


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on `device`; None if they can."""
    if not _installed():
        return "triton is not installed (pip install triton)"
    if device.type != "cuda":
        from trenchcoat.ops.triton.launch import INTERPRETED

        return None if INTERPRETED else f"{device} is not a CUDA device"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    from trenchcoat.ops.triton.assembler import obstacle

    return obstacle(device)


@lru_cache
def _unfit(device: torch.device, shape: LayerShape, cfg: FeatureMapConfig | None) -> str | None:
    """Why the kernels cannot or should not run on tensors of this shape, or None."""
    from trenchcoat.ops.triton.launch import Call, refusal

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


def kernels_of(impl: str) -> ModuleType | None:
    """The module with `attend` and `transfer_error` on kernels that compute the feature maps too; None if `impl` has
    none."""
    if impl == "triton":
        from trenchcoat.ops.triton import attention as on_gpu

        return on_gpu
    if impl == "compiled":
        from trenchcoat.ops.compiled import attention as on_cpu

        return on_cpu
    return None


def decodes(state: StudentState, rule: Rule) -> bool:
    """Whether the C++ kernels decode from `state`; if not, PyTorch does, and the reason is logged once."""
    reason = refusal_to_decode(state, rule)
    if reason is not None and ("decoding", reason) not in _reported:
        _reported.add(("decoding", reason))
        _log.info("decoding in PyTorch: the compiled kernels do not read %s", reason)
    return reason is None


def fused_maps(query: FeatureMap | None, key: FeatureMap | None, rule: Rule) -> FusedMaps | None:
    """Feature maps in the kernels' format, or None without a far part; gradients flow to their parameters."""
    if query is None or key is None or not rule.far:
        return None
    q, k = (FusedMap(str(phi.act.kernel), phi.act.paired, phi.matrix(), phi.bias, phi.cfg.eps) for phi in (query, key))
    return q, k


class DecodingMaps:
    """:func:`fused_maps` for a student that decodes, made once where the maps are the parameters themselves."""

    def __init__(self) -> None:
        self._known: FusedMaps | None = None

    def of(self, query: FeatureMap | None, key: FeatureMap | None, rule: Rule) -> FusedMaps | None:
        """The maps of a student's queries and keys."""
        known = self._known
        if not rule.far or query is None or key is None or query.cfg.skip:
            return fused_maps(query, key, rule)
        if known is None or known[0].matrix is not query.weight or known[1].matrix is not key.weight:
            known = self._known = fused_maps(query, key, rule)
        return known


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

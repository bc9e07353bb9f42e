"""FLOPs per token of each stage, for the MFU of a run.

MFU (model FLOPs utilization, PaLM, https://arxiv.org/abs/2204.02311, appendix B) counts the operations that define the
step, two per multiply-add, and nothing that an implementation repeats: recomputation under gradient checkpointing, the
window's scores computed twice, padding. Softmax rows, norms, activations and rotations are not counted. Two things
differ from the usual 6 N: the frozen base gets no weight gradients, and causal attention is counted causally ((T + 1) /
2 keys per query).

Shape legend: H query heads, G key/value heads, K key maps, D head dim, P columns of a map, F features, W window,
T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trenchcoat.config import LoraConfig, StudentConfig
from trenchcoat.config.keep import kept_total
from trenchcoat.models.shapes import Shapes
from trenchcoat.students import StudentAttention, build_student


@dataclass(frozen=True)
class Cost:
    """FLOPs per token."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Of a training step."""
        return self.forward + self.backward


def transfer_flops_per_token(shapes: Shapes, student_cfg: StudentConfig, seq_len: int, *, xent: bool = False) -> Cost:
    """Attention transfer: the teacher's forward without its vocabulary head, and the layer-local step of each student.

    ``xent``: the cross-entropy of the attention maps has a nonzero weight; it is quadratic in ``seq_len``.
    """
    student = layer_student(shapes, student_cfg)
    linear = shapes.layers - kept_layers(shapes, student_cfg)
    teacher = shapes.layers * (2.0 * shapes.used_parameters + _softmax_forward(shapes, seq_len))
    own = student.flops(seq_len)
    # q, k and v are constants: gradients of the query features, the later queries' sums, those of the key features
    forward, backward = own.maps + own.write + own.read + own.near, 2.0 * own.read + own.write + own.maps
    if xent and student.has_far:
        pairs = shapes.heads * (seq_len + 1) / 2
        forward += pairs * 2.0 * (shapes.head_dim + student.features)
        backward += pairs * 4.0 * student.features + own.maps
    return Cost(teacher + linear * forward, linear * backward)


def lora_flops_per_token(shapes: Shapes, student_cfg: StudentConfig, lora_cfg: LoraConfig, seq_len: int) -> Cost:
    """Stage 2: activations' gradients through the base, parameters' gradients of what ``lora_cfg.train`` names.

    With ``lora_cfg.train_feature_maps`` the maps' parameters get theirs too; with a loss that needs the teacher, its
    forward pass is added.
    """
    student = layer_student(shapes, student_cfg)
    kept = kept_layers(shapes, student_cfg)
    linear = shapes.layers - kept
    base = whole = 2.0 * (shapes.layers * shapes.used_parameters + shapes.vocab * shapes.hidden)
    lora = 2.0 * shapes.lora_parameters(lora_cfg)
    own = student.flops(seq_len)
    maps, near, far = own.maps, own.near, own.write + own.read
    if student.replaces_layer:  # the layer's projections are not computed
        base -= linear * sum(2.0 * inputs * outputs for _, inputs, outputs in shapes.projections)
    softmax = _softmax_forward(shapes, seq_len)
    forward = base + lora + linear * (maps + far + near) + kept * softmax
    learned_maps = maps if lora_cfg.train_feature_maps else 0.0
    # two products for each of the forward: gradients of features and values, of weights, values, queries and keys
    weights = base if lora_cfg.train == "all" else 0.0
    backward = base + weights + 2.0 * lora + linear * (maps + learned_maps + 2.0 * (far + near)) + kept * 2.0 * softmax
    teacher = whole + shapes.layers * softmax if lora_cfg.teacher_pass else 0.0
    return Cost(forward + teacher, backward)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float, devices: int = 1) -> float:
    """Fraction of the devices' peak that a run uses: tokens/s of all devices together, FLOP/s of one."""
    return tokens_per_second * flops_per_token / (peak * devices)


def layer_student(shapes: Shapes, cfg: StudentConfig) -> StudentAttention:
    """The student of one layer on the meta device; its parameters can be counted. ValueError when it does not fit."""
    with torch.device("meta"):
        return build_student(
            cfg,
            num_heads=shapes.heads,
            num_kv_heads=shapes.kv_heads,
            head_dim=shapes.head_dim,
            hidden_size=shapes.hidden,
        )


def student_parameters(shapes: Shapes, cfg: StudentConfig) -> int:
    """Trainable parameters of the students of all linear layers."""
    one = sum(p.numel() for p in layer_student(shapes, cfg).parameters())
    return round(one * (shapes.layers - kept_layers(shapes, cfg)))


def kept_layers(shapes: Shapes, cfg: StudentConfig) -> float:
    """Softmax attention that is kept, in layers: every kept group counts 1 / G. What a layer costs is proportional to
    its groups."""
    return kept_total(cfg, shapes.layers, shapes.kv_heads) / shapes.kv_heads


def trained_parameters(shapes: Shapes, student_cfg: StudentConfig, lora_cfg: LoraConfig) -> int:
    """Parameters that stage 2 trains."""
    maps = student_parameters(shapes, student_cfg) if lora_cfg.train_feature_maps else 0
    base = shapes.parameters if lora_cfg.train == "all" else 0
    return base + shapes.lora_parameters(lora_cfg) + maps


def _softmax_forward(shapes: Shapes, seq_len: int) -> float:
    return 4.0 * shapes.heads * shapes.head_dim * (seq_len + 1) / 2

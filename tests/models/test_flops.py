"""FLOPs a token against PyTorch's own counter on real steps, and the devices' peaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny_families import tiny_model
from trenchcoat.config import FeatureMapConfig, LoraConfig, StudentConfig, TransferConfig
from trenchcoat.models.attach import attach_students, freeze_for_transfer, set_mode, students_of
from trenchcoat.models.flops import (
    layer_student,
    lora_flops_per_token,
    mfu,
    student_parameters,
    transfer_flops_per_token,
)
from trenchcoat.models.lora import add_lora
from trenchcoat.models.shapes import Shapes, shapes_of
from trenchcoat.models.stage2 import as_teacher
from trenchcoat.runtime.devices import device_peak
from trenchcoat.training import objectives
from trenchcoat.training.logits import own_teacher

TOKENS = 512
WIDE = {"hidden_size": 96, "intermediate_size": 256, "head_dim": 16}
STUDENT = StudentConfig(window=16, feature_map=FeatureMapConfig(feature_dim=12), impl="chunkwise")
LORA = LoraConfig(rank=4, loss="ce", train_feature_maps=False)


def _counted(work: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops() / TOKENS


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (1, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _model(student: StudentConfig) -> tuple[torch.nn.Module, Shapes]:
    model = tiny_model("llama", attn_implementation="eager", **WIDE)
    attach_students(model, student)
    return model, shapes_of(model.config)


def _uncounted_near(shapes: Shapes, student: StudentConfig) -> float:
    """What the operator computes of the window beyond what is near: two whole chunks a query."""
    layers = shapes.layers - len(student.keep_softmax)
    seen = {"terrace": 1.5, "terrace_gated": 1.5, "sliding": 1.0, "linear": 0.0}[student.name] * student.window
    computed = (0 if student.name == "linear" else 2) * student.window
    return layers * 4.0 * shapes.heads * shapes.head_dim * (computed - seen)


@pytest.mark.parametrize("name", ["terrace", "linear", "terrace_gated"])
@pytest.mark.parametrize("key_maps", ["per_query_head", "per_kv_head"])
def test_a_transfer_step_costs_what_is_counted(name: str, key_maps: str) -> None:
    student = replace(STUDENT, name=name, key_maps=key_maps)
    model, shapes = _model(student)
    freeze_for_transfer(model)
    set_mode(model, "transfer")
    objective = objectives.transfer_objective(TransferConfig())
    counted = _counted(lambda: objective(model, _batch()))
    expected = transfer_flops_per_token(shapes, student, TOKENS)
    causal = shapes.layers * 4.0 * shapes.heads * shapes.head_dim * (TOKENS - 1) / 2  # eager attention computes all T
    extra = causal + _uncounted_near(shapes, student)
    assert counted == pytest.approx(expected.total + extra, rel=0.06)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_lora_step_costs_what_is_counted(loss: str) -> None:
    model, shapes = _model(STUDENT)
    cfg = replace(LORA, loss=loss)
    add_lora(model, cfg)
    set_mode(model, "student")
    objective = objectives.stage_2_objective(cfg, own_teacher(as_teacher))
    counted = _counted(lambda: objective(model, _batch()))
    expected = lora_flops_per_token(shapes, STUDENT, cfg, TOKENS)
    # the window's scores are computed again in the backward; layer 0's inputs need no gradient
    first = 2.0 * sum(inputs * outputs for name, inputs, outputs in shapes.projections if name != "o_proj")
    extra = 4 * _uncounted_near(shapes, STUDENT) - first
    if loss == "kl":  # eager attention computes all T
        extra += shapes.layers * 4.0 * shapes.heads * shapes.head_dim * (TOKENS - 1) / 2
    assert counted == pytest.approx(expected.total + extra, rel=0.06)
    assert expected.total < 2.5 * expected.forward  # no weight gradients of the base


def test_layers_that_stay_softmax_and_cross_entropy_count() -> None:
    shapes = _model(STUDENT)[1]
    kept = replace(STUDENT, keep_softmax=(0,))
    plain = transfer_flops_per_token(shapes, STUDENT, TOKENS)
    assert transfer_flops_per_token(shapes, kept, TOKENS).backward == pytest.approx(plain.backward / 2)
    assert transfer_flops_per_token(shapes, STUDENT, TOKENS, xent=True).total > plain.total
    longer = [lora_flops_per_token(shapes, kept, LORA, length).total for length in (TOKENS, 2 * TOKENS, 3 * TOKENS)]
    assert longer[2] - longer[1] == pytest.approx(longer[1] - longer[0])
    assert longer[1] > longer[0]
    trained = lora_flops_per_token(shapes, STUDENT, replace(LORA, train_feature_maps=True), TOKENS)
    assert trained.backward > lora_flops_per_token(shapes, STUDENT, LORA, TOKENS).backward


def test_student_parameters_are_those_of_the_real_students() -> None:
    for cfg in (STUDENT, replace(STUDENT, key_maps="per_kv_head"), replace(STUDENT, keep_softmax=(1,))):
        model, shapes = _model(cfg)
        real = sum(p.numel() for s in students_of(model).values() for p in s.parameters())
        assert student_parameters(shapes, cfg) == real
    with pytest.raises(ValueError, match="skip needs feature_dim"):
        layer_student(shapes, replace(STUDENT, feature_map=FeatureMapConfig(feature_dim=5, skip=True)))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362.1e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("h100", 989.4e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("Quadro P600", None),
        ("cpu", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert device_peak(name) == peak


def test_peaks_by_dtype_and_utilization() -> None:
    assert device_peak("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert device_peak("NVIDIA A100-SXM4-80GB", torch.float64) is None
    assert mfu(1000.0, 1e9, 2e12, devices=2) == pytest.approx(0.25)

"""Student attentions: registry, the three modes, layer-local learning in closed form against autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trenchcoat.config import FeatureMapConfig, StudentConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.ops import HeadWeights, Tokens, reference
from trenchcoat.ops.chunked import closed_form
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.students import (
    ACTIVATIONS,
    STUDENTS,
    StudentAttention,
    SumAttention,
    TransferRequest,
    build_student,
    register_student,
    student_class,
)

HEADS, KV, DIM, SCALE = 4, 2, 6, 0.4
WIDTH = 10
SIZES = {"num_heads": HEADS, "num_kv_heads": KV, "head_dim": DIM, "hidden_size": WIDTH}
LEARNING = [n for n in STUDENTS if issubclass(student_class(n), SumAttention) and student_class(n).has_far]
"""Those whose far part is the sum of the operator; `test_hybrid.py` tests what the others compute."""


def _student(name: str = "terrace", *, feature: dict[str, Any] | None = None, **options: Any) -> StudentAttention:
    phi = FeatureMapConfig(**(feature or {"feature_dim": 5}))
    student = build_student(StudentConfig(name=name, window=4, feature_map=phi, **options), **SIZES)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return student


def _inputs(tokens: int, dtype: torch.dtype = torch.float64, batch: int = 3) -> list[Tensor]:
    return [torch.randn(batch, heads, tokens, DIM, dtype=dtype) for heads in (HEADS, KV, KV, HEADS)]


def _layer_input(student: StudentAttention, tokens: int, batch: int = 3) -> dict[str, Tensor]:
    """The layer's input, for a student that reads it."""
    return {"x_BTM": torch.randn(batch, tokens, WIDTH)} if student.uses_input else {}


def _span(given: dict[str, Tensor], span: slice) -> dict[str, Tensor]:
    return {name: x[:, span] for name, x in given.items()}


def _mask(kind: str | None, tokens: int, batch: int = 3) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    if kind == "left":
        mask[0, : tokens // 2] = False
    elif kind == "right":
        mask[0, tokens - tokens // 2 :] = False
    else:
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3)) > 0.3
    return mask


def _expected(
    student: StudentAttention, inputs: list[Tensor], request: TransferRequest, mask: Tensor | None, **call: Any
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by autograd through the quadratic reference."""
    q, k, v, y = inputs
    student.cfg = replace(student.cfg, impl="reference")
    y_hat, _ = student(q, k, v, scale=SCALE, mask_BT=mask, **call)
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask
    target = y * real[:, None, :, None]
    count = max(1, int(real.sum()) * HEADS * DIM)
    mse = (target - y_hat).square().sum() / count
    power = target.square().sum() / count
    loss = request.mse_weight * (mse / power.clamp_min(1e-30) if request.normalize == "layer" else mse)
    if request.xent_weight:
        loss = loss + request.xent_weight * _expected_xent(student, q, k, mask, real, **call)
    parameters = list(student.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else []
    return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=False)]


def _expected_xent(
    student: StudentAttention, q: Tensor, k: Tensor, mask: Tensor | None, real: Tensor, **call: Any
) -> Tensor:
    sink = call.get("sink_logit")
    softcap = call.get("softcap")
    rule = student._rule(SCALE, softcap)
    features = student._features(q, k, rule)
    assert features is not None
    tokens = Tokens(q, k, k, mask)
    hat = reference.weights(tokens, features, HeadWeights(student._mix(q).double(), sink), rule)
    a = reference.teacher_weights(tokens, rule, sink)
    a = a[..., : hat.shape[-1]]
    log_hat = torch.where(a > 0, hat.clamp_min(1e-300), 1.0).log()
    rows = -(a * log_hat).sum(-1) * real[:, None]
    return rows.sum() / max(1, int(real.sum()) * HEADS)


def _check(
    student: StudentAttention, inputs: list[Tensor], request: TransferRequest, mask: Tensor | None, **call: Any
) -> None:
    student = student.double()
    loss, grads = _expected(student, inputs, request, mask, **call)
    for p in student.parameters():
        p.grad = torch.full_like(p, 2.0)
    student.request = request
    with torch.no_grad():
        student.transfer(*inputs, scale=SCALE, mask_BT=mask, **call)
    torch.testing.assert_close(student.metrics["loss"], loss, rtol=1e-9, atol=1e-10)
    for p, want in zip(student.parameters(), grads, strict=True):
        assert p.grad is not None
        scale = want.abs().max().clamp_min(1.0)
        torch.testing.assert_close((p.grad - 2.0) / scale, want / scale, rtol=0, atol=1e-9)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"key_maps": "per_kv_head"},
    {"affine": True},
    {"tied": True},
    {"sinks": 3, "mask": "odd", "sink_logit": True, "softcap": 2.0},
    {"mask": "left"},
    {"mask": "right", "normalize": "layer"},
    {"feature": {"feature_dim": 6, "skip": True, "adapter_dim": 3, "bias": True}},
]


@pytest.mark.parametrize("tile", [16, 1024])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 9, 23, 24])
@pytest.mark.parametrize("name", LEARNING)
def test_transfer_equals_autograd_through_the_reference(
    name: str, tokens: int, setting: dict[str, Any], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_form, "TILE_TOKENS", tile)
    setting = dict(setting)
    mask = _mask(setting.pop("mask", None), tokens)
    call: dict[str, Any] = {"softcap": setting.pop("softcap", None)}
    if setting.pop("sink_logit", False):
        call["sink_logit"] = torch.randn(HEADS, dtype=torch.float64)
    request = TransferRequest(normalize=setting.pop("normalize", "none"))
    if name == "linear":
        setting.pop("sinks", None)
    _check(_student(name, **setting), _inputs(tokens), request, mask, **call)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("feature_map", ACTIVATIONS)
@pytest.mark.parametrize("name", LEARNING)
def test_transfer_with_every_feature_map(name: str, feature_map: str, sinks: int) -> None:
    sinks = 0 if name == "linear" else sinks
    student = _student(name, feature={"name": feature_map, "feature_dim": 5}, sinks=sinks)
    _check(student, _inputs(23), TransferRequest(xent_weight=0.5), None)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", LEARNING)
def test_cross_entropy_of_the_maps(name: str, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from trenchcoat.ops import crossent

    monkeypatch.setattr(crossent, "MAP_ELEMENTS", 23 * 5)
    setting = dict(setting)
    mask = _mask(setting.pop("mask", None), 23)
    call: dict[str, Any] = {"softcap": setting.pop("softcap", None)}
    if setting.pop("sink_logit", False) and name != "linear":
        call["sink_logit"] = torch.randn(HEADS, dtype=torch.float64)
    setting.pop("normalize", None)
    if name == "linear":
        setting.pop("sinks", None)
    request = TransferRequest(mse_weight=3.0, xent_weight=2.0)
    _check(_student(name, **setting), _inputs(23), request, mask, **call)


def test_cross_entropy_keeps_no_full_map() -> None:
    tokens, cfg = 512, StudentConfig(window=16, feature_map=FeatureMapConfig(feature_dim=8))
    student = build_student(cfg, num_heads=16, num_kv_heads=16, head_dim=8)
    q, k, v, y = (torch.randn(1, 16, tokens, 8) for _ in range(4))
    student.request = TransferRequest(xent_weight=1.0)
    with live_tensor_memory() as memory:
        student.transfer(q, k, v, y, scale=SCALE)
    assert memory.peak < 16 * tokens * tokens * 4


def test_transfer_memory_is_not_quadratic_in_the_length() -> None:
    student = build_student(StudentConfig(window=16), num_heads=4, num_kv_heads=2, head_dim=64)
    student.request = TransferRequest()
    peaks = []
    for tokens in (2048, 4096):
        inputs = [torch.randn(1, heads, tokens, 64) for heads in (4, 2, 2, 4)]
        with live_tensor_memory() as memory:
            student.transfer(*inputs, scale=0.125)
        peaks.append(memory.peak)
    assert peaks[1] < 2.3 * peaks[0]


@pytest.mark.parametrize("name", LEARNING)
def test_measuring_the_loss_leaves_no_gradient(name: str) -> None:
    student = _student(name)
    student.request = TransferRequest(xent_weight=1.0, backward=False)
    student.transfer(*_inputs(23, torch.float32), scale=SCALE)
    assert all(p.grad is None for p in student.parameters())
    assert set(student.metrics) == {"loss", "mse", "xent", "target_power"}
    assert all(value.ndim == 0 and not value.requires_grad for value in student.metrics.values())


def test_transfer_in_low_precision_models_keeps_float32_students() -> None:
    student = _student()
    inputs = _inputs(23, torch.float32)
    student.request = TransferRequest()
    student.transfer(*(t.bfloat16() for t in inputs), scale=SCALE)
    low = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    for p in student.parameters():
        p.grad = None
    student.transfer(*(t.bfloat16().float() for t in inputs), scale=SCALE)
    for p, grad in zip(student.parameters(), low, strict=True):
        torch.testing.assert_close(grad, p.grad)


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("key_maps", ["per_query_head", "per_kv_head"])
def test_forward_then_decode_equals_forward(name: str, key_maps: Any) -> None:
    student = _student(name, key_maps=key_maps, sinks=0 if name == "linear" else 2)
    (q, k, v, _), more = _inputs(31, torch.float32), _layer_input(student, 31)
    whole, _ = student(q, k, v, scale=SCALE, **more)
    empty = student.empty_state(3, dtype=torch.float32)
    begun = _span(more, slice(0, 13))
    y, state = student(q[:, :, :13], k[:, :, :13], v[:, :, :13], scale=SCALE, state=empty, **begun)
    size = state.nbytes()
    outputs = [y]
    for t in range(13, 31):
        step = (x[:, :, t : t + 1] for x in (q, k, v))
        outputs.append(student.decode(*step, state=state, scale=SCALE, **_span(more, slice(t, t + 1))))
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-4, atol=1e-5)
    assert state.nbytes() == size == student.empty_state(3, dtype=torch.float32).nbytes()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in STUDENTS), ("terrace", {"sinks": 2}), ("sliding", {"sinks": 2}),
     ("terrace", {"key_maps": "per_kv_head"}), ("sliding", {"affine": True})],
)  # fmt: skip
@torch.no_grad()
def test_a_token_for_each_of_several_states(name: str, options: dict[str, Any], together: bool) -> None:
    """As for the rows of one state, at positions that differ, computed together or one by one."""
    student = _student(name, **options).float()
    lengths, decode_rows = (1, 7, 8, 11), type(student).decode_rows if together else StudentAttention.decode_rows
    states = []
    for length in lengths:
        before = student.empty_state(1, dtype=torch.float32)
        more = _layer_input(student, length, 1)
        states.append(student(*_inputs(length, torch.float32, 1)[:3], scale=SCALE, state=before, **more)[1])
    for _ in range(6):
        token, more = _inputs(1, torch.float32, len(lengths))[:3], _layer_input(student, 1, len(lengths))
        copies = [state.clone() for state in states]
        expected = [
            student.decode(
                *(x[row : row + 1] for x in token),
                state=copies[row],
                scale=SCALE,
                **{name: x[row : row + 1] for name, x in more.items()},
            )
            for row in range(len(lengths))
        ]
        found = decode_rows(student, *token, states=states, scale=SCALE, **more)
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=2e-6)
        for state, copy in zip(states, copies, strict=True):
            torch.testing.assert_close(state.tensors(), copy.tensors(), rtol=0, atol=2e-6)
    assert [int(state.seen_B) for state in states] == [length + 6 for length in lengths]


def test_one_key_map_per_kv_head_shrinks_the_state() -> None:
    many = _student(key_maps="per_query_head").empty_state(1, dtype=torch.float32)
    few = _student(key_maps="per_kv_head").empty_state(1, dtype=torch.float32)
    assert many.far_s_BKFE.numel() == few.far_s_BKFE.numel() * HEADS // KV


@pytest.mark.parametrize("name", ["terrace", "sliding"])
def test_the_far_part_can_be_disabled(name: str) -> None:
    student = _student(name)
    q, k, v, _ = _inputs(31, torch.float32)
    on, _ = student(q, k, v, scale=SCALE)
    student.far_enabled = False
    off, _ = student(q, k, v, scale=SCALE)
    assert not torch.allclose(on[:, :, 16:], off[:, :, 16:])
    torch.testing.assert_close(on[:, :, :4], off[:, :, :4])


def test_within_the_window_a_student_is_softmax_attention() -> None:
    q, k, v, _ = _inputs(8, torch.float32)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    for name in ("terrace", "window_sinks"):
        y, _ = _student(name)(q, k, v, scale=SCALE)
        torch.testing.assert_close(y, want)


def test_the_untrained_baseline_has_no_parameters() -> None:
    student = _student("window_sinks", sinks=4)
    assert not list(student.parameters())
    student.request = TransferRequest()
    student.transfer(*_inputs(23, torch.float32), scale=SCALE)
    assert float(student.metrics["mse"]) > 0


def test_parameters_can_be_created_on_meta_and_initialised_later() -> None:
    cfg = StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=DIM), mix_init=0.25)
    with torch.device("meta"):
        student = build_student(cfg, **SIZES)
    assert all(p.is_meta and p.dtype == torch.float32 for p in student.parameters())
    student.to_empty(device="cpu")
    for p in student.parameters():
        torch.nn.init.constant_(p, float("nan"))
    student.reset_parameters()
    fresh = build_student(cfg, **SIZES)
    for a, b in zip(student.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    assert student.mix_H is not None
    torch.testing.assert_close(student.mix_H.sigmoid(), torch.full((HEADS,), 0.25))


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'terrace'"):
        student_class("terace")


def test_a_custom_student_is_one_registry_line() -> None:
    class Own(SumAttention):
        kind = "sliding"

    assert register_student("own", Own) is Own
    try:
        assert isinstance(_student("own"), Own)
        with pytest.raises(ValueError, match="already Own"):
            register_student("own", student_class("terrace"))
        with pytest.raises(ValueError, match="windw is no field"):
            register_student("own", Own, unused=("windw",))
        register_student("own", Own, unused=("window",))
        with pytest.raises(UserError, match=r"student\.name=own does not use student\.window=8"):
            load_recipe("demo", ["student.name=own", "student.window=8"])
    finally:
        del STUDENTS["own"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix_init": 0.0}, "mix_init is 0.0"),
        ({"tied": True, "key_maps": "per_kv_head"}, "needs one key map per query"),
        ({"key_maps": "some"}, "key_maps is 'some'"),
        ({"name": "linear", "sinks": 2}, "no near part"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(StudentConfig(**options), **SIZES)


def test_mismatched_inputs_are_rejected_with_and_without_gradients() -> None:
    student = _student("terrace")
    q, k, v, _ = _inputs(9)
    with pytest.raises(ValueError, match="mask has shape"):
        student(q, k, v, scale=1.0, mask_BT=torch.ones(1, 3))
    with torch.no_grad(), pytest.raises(ValueError, match="mask has shape"):
        student(q, k, v, scale=1.0, mask_BT=torch.ones(1, 3))

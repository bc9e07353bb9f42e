"""Students with a window beside a far part of its own: parity with the definitions, splits, padding, the start."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import trenchcoat
from conftest import with_student
from trenchcoat.cli import app as cli
from trenchcoat.config import FeatureMapConfig, StudentConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion.run import check_names
from trenchcoat.models.attach import students_of
from trenchcoat.ops import HeadWeights, Rule, Tokens, linear_window_attention, recurrences
from trenchcoat.ops.compiled import decode as compiled
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.runtime.runlog import read_metrics
from trenchcoat.students import STUDENTS, TransferRequest, build_student, hybrid, operator_of, student_class
from trenchcoat.students.hybrid import LEAST_MIX, HybridAttention
from trenchcoat.students.lightning import LightningAttention
from trenchcoat.students.terrace_gated import HALF_LIVES, TerraceGatedAttention

HEADS, KV, DIM, WIDTH, WINDOW, SCALE = 4, 2, 6, 10, 4, 0.4
HYBRID = [name for name in STUDENTS if issubclass(student_class(name), HybridAttention)]
Given = dict[str, Tensor]


def _student(name: str, *, disturbed: float = 0.5, heads: int = HEADS, kv: int = KV, **options: Any) -> Any:
    phi = options.pop("feature_map", FeatureMapConfig(feature_dim=5))
    cfg = StudentConfig(name=name, window=options.pop("window", WINDOW), feature_map=phi, **options)
    student = build_student(cfg, num_heads=heads, num_kv_heads=kv, head_dim=DIM, hidden_size=WIDTH).double()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(disturbed * torch.randn_like(p))
    return student


def _inputs(length: int, batch: int = 3) -> Given:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    q, k, v = (random(batch, heads, length, DIM) for heads in (HEADS, KV, KV))
    return {"q_BHTD": q, "k_BGTD": k, "v_BGTE": v, "x_BTM": random(batch, length, WIDTH)}


def _span(given: Given, span: slice) -> Given:
    return {name: x[:, span] if name in ("x_BTM", "mask_BT") else x[:, :, span] for name, x in given.items()}


def _mask(length: int) -> Tensor:
    """One row padded left, one padded right, one with gaps."""
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, : length // 3] = mask[1, length - length // 3 :] = mask[2, 1::3] = False
    return mask


def _gated_far(student: Any, given: Given, real_BT: Tensor, rule: Rule) -> Tensor:
    direction = normalize(given["x_BTM"], dim=-1)
    forget = student.forget_gate(direction).sigmoid().log()
    write = 15.0 * torch.tanh(student.input_gate(direction) / 15.0)
    fk = student.keys_phi(given["k_BGTD"])
    v = given["v_BGTE"].repeat_interleave(fk.shape[1] // KV, 1)
    return recurrences.gated_far(student.query_map(given["q_BHTD"]), fk, v, forget, write, real_BT, rule)


def _memory_far(student: Any, given: Given, real_BT: Tensor, rule: Rule) -> Tensor:
    """The read of the memory, normed, sized and gated."""
    x = given["x_BTM"] / given["x_BTM"].norm(dim=-1, keepdim=True)
    k, v = (given[key].repeat_interleave(HEADS // KV, 1) for key in ("k_BGTD", "v_BGTE"))
    q, k = given["q_BHTD"] + given["q_BHTD"] @ student.query_HDD, k + k @ student.key_HDD
    start = torch.zeros(len(q), HEADS, DIM, DIM, dtype=q.dtype)
    if student.cfg.name in ("gdn", "kda"):
        q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
        gate = student.forget_gate
        if student.cfg.name == "gdn":
            logit = gate(x)[..., None]
        else:
            logit = (x @ gate.down_RM.T @ gate.up_XR.T + gate.bias_X).view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
        forget = (-student.log_rate_H.exp()[:, None, None] * (1.0 + logit.exp()).log()).expand(k.shape)
        read, _ = recurrences.kimi_delta(q, k, v, forget, student.write_gate(x).sigmoid(), real_BT, start)
    else:
        q, k = (y / y.square().mean(-1, keepdim=True).sqrt() for y in (q, k))
        forget = torch.tensor([-(2.0 ** (-8.0 * h / HEADS)) for h in range(1, HEADS + 1)], dtype=q.dtype)
        read, _ = recurrences.gated_sums(q, k, v, forget[:, None].expand(q.shape[:3]), real_BT, start)
        read = read / math.sqrt(DIM)
    read = read / (read.square().mean(-1, keepdim=True) + 1e-8).sqrt()
    gate = (x @ student.gate_RM.T @ student.gate_XR.T).sigmoid().view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
    return read * gate * student.size_HE[:, None]


FAR: dict[str, Callable[[Any, Given, Tensor, Rule], Tensor]] = {
    "terrace_gated": _gated_far,
    "gdn": _memory_far,
    "kda": _memory_far,
    "lightning": _memory_far,
}
"""The definition of each student's far part, from its parameters."""


def _definition(student: Any, given: Given) -> Tensor:
    """(1 - o) near + o far, all from definitions."""
    mask, cfg = given.get("mask_BT"), student.cfg
    q, k, v = given["q_BHTD"], given["k_BGTD"], given["v_BGTE"]
    rule = Rule(kind="terrace", window=cfg.window, scale=SCALE, sinks=cfg.sinks, far=False)
    near, _ = linear_window_attention(
        Tokens(q, k, v, mask), None, HeadWeights(torch.zeros(HEADS)), rule, impl="reference"
    )
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask
    position = real.long().cumsum(1) - 1
    far_BT = real & ((position // cfg.window - 1) * cfg.window > cfg.sinks)
    parts = [q, *(x.repeat_interleave(HEADS // KV, 1) for x in (k, v))]
    unit = torch.cat([x / x.norm(dim=-1, keepdim=True) for x in parts], -1)
    mix = ((unit * student.mix_HX[:, None]).sum(-1) + student.mix_bias_H[:, None]).sigmoid() * far_BT[:, None]
    far = FAR[cfg.name](student, given, real, rule)
    return near * (1.0 - mix[..., None]) + mix[..., None] * far


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"key_maps": "per_kv_head", "sinks": 5}], ids=str)
@pytest.mark.parametrize("length", [1, WINDOW, 2 * WINDOW + 1, 23])
@pytest.mark.parametrize("name", HYBRID)
def test_outputs_and_gradients_match_the_definition(
    name: str, length: int, options: dict[str, Any], padded: bool
) -> None:
    student, given = _student(name, **options), _inputs(length)
    leaves = [*(x.requires_grad_() for x in given.values()), *student.parameters()]
    if padded:
        given["mask_BT"] = _mask(length)
    y, _ = student(**given, scale=SCALE)
    wanted = _definition(student, given)
    torch.testing.assert_close(y, wanted, **TOLERANCE[name])
    projection = torch.randn_like(y)
    found, expected = (
        torch.autograd.grad((out * projection).sum(), leaves, allow_unused=True, materialize_grads=True)
        for out in (y, wanted)
    )
    for grad, want in zip(found, expected, strict=True):
        size = want.abs().max().clamp_min(1.0)
        torch.testing.assert_close(grad / size, want / size, **TOLERANCE[name])


TOLERANCE: dict[str, dict[str, float]] = {
    "terrace_gated": {"rtol": 1e-10, "atol": 1e-11},
    "lightning": {"rtol": 1e-10, "atol": 1e-11},
    "gdn": {"rtol": 0.0, "atol": 2e-5},
    "kda": {"rtol": 0.0, "atol": 2e-5},
}
"""Against values of order 1: about a thousand roundings of float64; two hundred of float32 for gdn and kda, which
Transformers computes in float32."""


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", HYBRID)
def test_any_split_into_prefill_and_decode_gives_the_same_row(name: str, padded: bool) -> None:
    student, given = _student(name, sinks=2), _inputs(31)
    if padded:
        given["mask_BT"] = _mask(31)
    whole, _ = student(**given, scale=SCALE)
    for edges in ((0, 13, 14, 15, 31), (0, 1, 2, 31), (0, 8, 20, 22, 31), (0, *range(1, 32))):
        state, found = student.empty_state(3, dtype=torch.float64), []
        size = state.nbytes()
        for start, stop in zip(edges, edges[1:], strict=False):
            span = _span(given, slice(start, stop))
            if stop - start < 3 or (start, stop) == (8, 20):
                found.append(student.decode(**span, scale=SCALE, state=state))
            else:
                y, state = student(**span, scale=SCALE, state=state)
                found.append(y)
        torch.testing.assert_close(torch.cat(found, 2), whole, **TOLERANCE[name])
        assert state.seen_B.tolist() == (given["mask_BT"].sum(1).tolist() if padded else [31] * 3)
        assert state.nbytes() == size


@pytest.mark.parametrize("name", HYBRID)
def test_padding_and_later_tokens_have_no_effect(name: str) -> None:
    student, given, mask = _student(name), _inputs(23), _mask(23)
    y, _ = student(**given, mask_BT=mask, scale=SCALE)
    for b in range(3):
        alone = {key: x[b : b + 1, mask[b]] if key == "x_BTM" else x[b : b + 1, :, mask[b]] for key, x in given.items()}
        whole, _ = student(**alone, scale=SCALE)
        torch.testing.assert_close(y[b : b + 1, :, mask[b]], whole, **TOLERANCE[name])
        assert bool((y[b, :, ~mask[b]] == 0).all())
        for cut in (1, 9, 13):
            prefix, _ = student(**_span(alone, slice(0, cut)), scale=SCALE)
            torch.testing.assert_close(prefix, whole[:, :, :cut], **TOLERANCE[name])


@pytest.mark.parametrize("name", HYBRID)
def test_up_to_two_windows_it_is_softmax_attention(name: str) -> None:
    student, given = _student(name), _inputs(2 * WINDOW + 1)
    y, _ = student(**given, scale=SCALE)
    qkv = (given["q_BHTD"], given["k_BGTD"], given["v_BGTE"])
    softmax = scaled_dot_product_attention(*qkv, is_causal=True, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(y[:, :, : 2 * WINDOW], softmax[:, :, : 2 * WINDOW])
    assert (y - softmax)[:, :, 2 * WINDOW].abs().max() > 1e-3
    student.far_enabled = False
    window, _ = student(**given, scale=SCALE)
    assert (y - window)[:, :, 2 * WINDOW].abs().max() > 1e-3


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("name", "asked", "taken"),
    [*((name, "auto", "compiled") for name in HYBRID), ("terrace_gated", "compiled", "compiled"),
     ("terrace_gated", "triton", "triton")],
)  # fmt: skip
def test_the_window_on_kernels_is_that_of_pytorch(
    name: str, asked: str, taken: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: outputs, gradients and the state after a row are the same."""
    if taken == "triton":
        pytest.importorskip("triton", reason="triton is not installed; pip install triton")
    elif operator_of(StudentConfig(), head_dim=64, dtype=torch.float32, device=torch.device("cpu")) != "compiled":
        pytest.skip("no C++ compiler here")
    device = "cuda" if taken == "triton" and torch.cuda.is_available() else "cpu"
    given = {key: x.float() for key, x in _inputs(23).items()} | ({"mask_BT": _mask(23)} if padded else {})
    given = {key: x.to(device) for key, x in given.items()}
    found, used = [], []

    def near(*args: Any, **kwargs: Any) -> Any:
        """The operator, noting its implementation."""
        used.append(kwargs["impl"])
        return linear_window_attention(*args, **kwargs)

    monkeypatch.setattr(hybrid, "linear_window_attention", near)
    for impl in ("chunkwise", asked):
        torch.manual_seed(5)
        student = _student(name, sinks=2, impl=impl).float().to(device)
        inputs = {key: x.clone().requires_grad_(x.is_floating_point()) for key, x in given.items()}
        y, state = student(**inputs, scale=SCALE, state=student.empty_state(3, dtype=torch.float32, device=device))
        y.square().sum().backward()
        gradients = [x.grad for x in inputs.values() if x.requires_grad] + [p.grad for p in student.parameters()]
        found.append([y.detach(), *state.tensors().values(), *(g for g in gradients if g is not None)])
    assert used == ["chunkwise", *([taken] if taken != "triton" else [])]
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5 * max([1.0, *slow.abs().flatten().tolist()]))


@pytest.mark.parametrize("case", ["plain", "padded", "short"])
@pytest.mark.parametrize("name", [name for name in HYBRID if name != "terrace_gated"])
def test_the_window_of_single_tokens_on_kernels_is_that_of_pytorch(
    name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, from the first token on, over chunk edges; `terrace_gated` has kernels for both its parts. `short`: a
    state in bfloat16, with a sink logit and a soft cap."""
    if operator_of(StudentConfig(), head_dim=64, dtype=torch.float32, device=torch.device("cpu")) != "compiled":
        pytest.skip("no C++ compiler here")
    given = {key: x.float() for key, x in _inputs(23).items()} | ({"mask_BT": _mask(23)} if case == "padded" else {})
    scores: dict[str, Any] = {"scale": SCALE}
    if case == "short":
        scores |= {"softcap": 3.0, "sink_logit": torch.randn(HEADS)}
    held = torch.bfloat16 if case == "short" else torch.float32
    found, called = [], []

    def step(*args: Any) -> Tensor:
        """The kernels, noting that they were called."""
        called.append(args[4].far)
        return compiled.decode(*args)

    monkeypatch.setattr(hybrid, "compiled_decode", step)
    for impl in ("chunkwise", "auto"):
        torch.manual_seed(5)
        student = _student(name, sinks=2, impl=impl).float()
        state = student.empty_state(3, dtype=held)
        ys = [student.decode(**_span(given, slice(t, t + 1)), state=state, **scores) for t in range(20)]
        ys.append(student.decode(**_span(given, slice(20, 23)), state=state, **scores))
        found.append([*ys, *state.tensors().values()])
    assert called == [False] * 23
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5 * max([1.0, *slow.abs().flatten().tolist()]))


@pytest.mark.parametrize("normalize_by", ["none", "layer"])
@pytest.mark.parametrize("name", HYBRID)
def test_transfer_learns_by_autograd(name: str, normalize_by: Any) -> None:
    student, given = _student(name), {**_inputs(13), "mask_BT": _mask(13)}
    y = torch.randn(3, HEADS, 13, DIM, dtype=torch.float64)
    target, count = y * given["mask_BT"][:, None, :, None], int(given["mask_BT"].sum()) * HEADS * DIM
    loss = 7.0 * (_definition(student, given) - target).square().sum() / count
    loss = loss / (target.square().sum() / count) if normalize_by == "layer" else loss
    wanted = torch.autograd.grad(loss, list(student.parameters()))
    student.request = TransferRequest(mse_weight=7.0, normalize=normalize_by)
    with torch.no_grad():
        student.transfer(y_BHTE=y, scale=SCALE, **given)
    torch.testing.assert_close(student.metrics["loss"], loss.detach(), **TOLERANCE[name])
    for p, want in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, **TOLERANCE[name])


def _error(student: Any, given: Given, y: Tensor) -> float:
    student.request = TransferRequest(backward=False)
    student.transfer(y_BHTE=y, scale=SCALE, **given)
    return float(student.metrics["mse"])


@pytest.mark.parametrize("name", HYBRID)
def test_the_start_is_fitted_to_the_first_text(name: str) -> None:
    """The teacher's outputs are softmax attention: the fitted start is closer to them than the window with sinks, and
    than the start before any text."""
    student, given = _student(name, disturbed=0.0, sinks=2), {**_inputs(40), "mask_BT": _mask(40)}
    mask, qkv = given["mask_BT"], [given[key] for key in ("q_BHTD", "k_BGTD", "v_BGTE")]
    seen = mask[:, None, None] & torch.ones(40, 40, dtype=torch.bool).tril()
    y = scaled_dot_product_attention(*qkv, attn_mask=seen, scale=SCALE, enable_gqa=True).nan_to_num()
    before = _error(student, given, y)
    assert type(student).starts_from_text(student.cfg)
    student.request = TransferRequest(initialise=True)
    student.transfer(y_BHTE=y, scale=SCALE, **given)
    after = _error(student, given, y)
    student.far_enabled = False
    window = _error(student, given, y)
    assert after < min(before, window)


@pytest.mark.parametrize("name", HYBRID)
def test_rows_within_the_window_leave_the_start_as_it_is(name: str, caplog: pytest.LogCaptureFixture) -> None:
    student, given = _student(name, disturbed=0.0), _inputs(2 * WINDOW)
    before = {key: p.clone() for key, p in student.named_parameters()}
    student.request = TransferRequest(initialise=True)
    student.transfer(y_BHTE=given["q_BHTD"], scale=SCALE, **given)
    assert all(torch.equal(p, before[key]) for key, p in student.named_parameters())
    assert "not fitted" in caplog.text


@pytest.mark.parametrize("name", HYBRID)
def test_memory_is_not_quadratic_in_the_length(name: str) -> None:
    cfg = StudentConfig(name=name, window=16, feature_map=FeatureMapConfig(feature_dim=8))
    student = build_student(cfg, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=16)
    peaks = []
    for length in (512, 1024):
        inputs = [torch.randn(1, heads, length, 16) for heads in (4, 2, 2, 4)]
        with live_tensor_memory() as memory:
            student.transfer(*inputs, scale=0.25, x_BTM=torch.randn(1, length, 16))
        peaks.append(memory.peak)
    assert peaks[1] < 2.3 * peaks[0]


@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize("sizes", [(4, 2, 32, 32), (3, 1, 64, 16)])
def test_the_graph_that_the_plan_counts_is_the_one_that_is_held(name: str, sizes: tuple[int, ...]) -> None:
    heads, kv, dim, window = sizes
    cfg = StudentConfig(name=name, window=window, feature_map=FeatureMapConfig(feature_dim=dim))
    student = build_student(cfg, num_heads=heads, num_kv_heads=kv, head_dim=dim, hidden_size=heads * dim)
    inputs = [torch.randn(1, n, 512, dim) for n in (heads, kv, kv, heads)]
    with live_tensor_memory() as memory:
        student.transfer(*inputs, scale=0.25, x_BTM=torch.randn(1, 512, heads * dim))
    features = student.features * (heads + student.key_heads)
    assert memory.peak / 4 / 512 == pytest.approx(features + student.graph_numbers, rel=0.25)


@pytest.mark.parametrize("name", HYBRID)
def test_a_bfloat16_state_is_about_half_the_size(name: str) -> None:
    cfg = StudentConfig(name=name, window=4, feature_map=FeatureMapConfig(feature_dim=32))
    student = build_student(cfg, num_heads=4, num_kv_heads=2, head_dim=32, hidden_size=16)
    whole = student.empty_state(1, dtype=torch.float32).nbytes()
    student.state_dtype = torch.bfloat16
    state = student.empty_state(2, dtype=torch.float32)
    assert state.index_select(torch.tensor([0])).nbytes() < 0.6 * whole
    q, k, v = (torch.randn(2, heads, 40, 32) for heads in (4, 2, 2))
    x = torch.randn(2, 40, 16)
    y, _ = student(q, k, v, x_BTM=x, scale=0.2)
    steps = [
        student.decode(*(z[:, :, t : t + 1] for z in (q, k, v)), x_BTM=x[:, t : t + 1], scale=0.2, state=state)
        for t in range(40)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), y, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", HYBRID)
def test_what_it_cannot_do_is_refused(name: str) -> None:
    student, given = _student(name), _inputs(5)
    del given["x_BTM"]
    with pytest.raises(ValueError, match="x_BTM"):
        student(**given, scale=SCALE)
    with pytest.raises(ValueError, match="hidden_size"):
        build_student(student.cfg, num_heads=HEADS, num_kv_heads=KV, head_dim=DIM)
    for impl in ("reference", "fla", *(() if name == "terrace_gated" else ("triton", "compiled"))):
        student.cfg = replace(student.cfg, impl=impl)
        with pytest.raises(ValueError, match=rf"student\.impl is {impl}.*use"):
            student.implementation(torch.float32, torch.device("cpu"))
    student.request = TransferRequest(xent_weight=1.0)
    with pytest.raises(ValueError, match=r"transfer\.xent_weight=0"):
        student.transfer(**_inputs(5), y_BHTE=given["q_BHTD"], scale=SCALE)
    with pytest.raises(UserError, match=f"student.name={name} does not use student.affine=true"):
        load_recipe("demo", [f"student.name={name}", "student.affine=true"])
    with pytest.raises(UserError, match=r"no attention rows.*transfer\.xent_weight=0"):
        check_names(load_recipe("demo", [f"student.name={name}", "transfer.xent_weight=0.5"]))
    check_names(load_recipe("demo", ["transfer.xent_weight=0.5"]))


def test_both_stages_train_one(tiny_overrides: list[str]) -> None:
    folder = Path(tiny_overrides[-1].removeprefix("run.dir="))
    own = [*with_student("lightning", tiny_overrides), "student.sinks=2", "student.keep=[0.1]"]
    for stage in ("transfer", "finetune"):
        assert cli.main([stage, "demo", *own]) == 0
    assert json.loads((folder / "environment.json").read_text())["implementation"] == "chunkwise"
    losses = [line["loss"] for line in read_metrics(folder) if line["kind"] == "eval" and line["stage"] == "transfer"]
    assert losses[-1] < losses[0]
    model, _ = trenchcoat.load(folder / "adapter", device="cpu")
    for student in students_of(model).values():
        assert isinstance(student, LightningAttention)
        assert all(bool(p.any()) for p in (student.query_HDD, student.key_HDD, student.gate_XR, student.mix_HX))


def test_kda_starts_as_gdn() -> None:
    """Every key channel of a head has the head's rate, before the first text and after it."""
    given, y = _inputs(40), torch.randn(3, HEADS, 40, DIM, dtype=torch.float64)
    found: list[Tensor] = []
    for name in ("gdn", "kda"):
        student = _student(name, disturbed=0.0, sinks=2)
        outputs = [student(**given, scale=SCALE)[0]]
        student.request = TransferRequest(initialise=True)
        student.transfer(y_BHTE=y, scale=SCALE, **given)
        found.append(torch.stack([*outputs, student(**given, scale=SCALE)[0]]))
    torch.testing.assert_close(*found, rtol=0.0, atol=2e-5)


# terrace_gated


def test_before_any_text_it_is_the_ungated_sum_with_its_own_denominator() -> None:
    """And a half-life of 16,384 tokens, which changes 40 tokens by less than 0.2 %."""
    student, given = _student("terrace_gated", disturbed=0.0, mix_init=0.25), _inputs(40)
    x = normalize(given["x_BTM"], dim=-1)
    forget, write = student.gates(x)
    torch.testing.assert_close(forget.exp() ** HALF_LIVES[0], torch.full_like(forget, 0.5))
    assert bool((write == 0).all())
    ungated = build_student(
        StudentConfig(name="terrace", window=WINDOW, feature_map=student.cfg.feature_map),
        num_heads=HEADS, num_kv_heads=KV, head_dim=DIM,
    ).double()  # fmt: skip
    ungated.load_state_dict({n: t for n, t in student.state_dict().items() if "map" in n}, strict=False)
    with torch.no_grad():
        ungated.mix_H.fill_(-800.0)  # type: ignore[union-attr]  # g = 0: the far part alone
    qkv = {key: given[key] for key in ("q_BHTD", "k_BGTD", "v_BGTE")}
    far = ungated(**qkv, scale=SCALE)[0][:, :, 2 * WINDOW :]
    y = student(**given, scale=SCALE)[0][:, :, 2 * WINDOW :]
    student.far_enabled = False
    near = student(**given, scale=SCALE)[0][:, :, 2 * WINDOW :]
    torch.testing.assert_close(y, 0.25 * near + 0.75 * far, rtol=0, atol=2e-3)


def test_a_forgetful_head_reads_the_newest_far_key_alone() -> None:
    student, given = _student("terrace_gated"), _inputs(23)
    student.forget_gate.start(-60.0)
    student.input_gate.start(0.0)
    student.set_mix(torch.ones(HEADS))
    y, _ = student(**given, scale=SCALE)
    student.far_enabled = False
    near, _ = student(**given, scale=SCALE)
    newest = [(t // WINDOW - 1) * WINDOW - 1 for t in range(2 * WINDOW, 23)]
    far = given["v_BGTE"][:, :, newest].repeat_interleave(HEADS // KV, 1)
    torch.testing.assert_close(y[:, :, 2 * WINDOW :], 0.02 * near[:, :, 2 * WINDOW :] + 0.98 * far)


def test_a_key_that_is_not_written_is_not_read() -> None:
    """The cap leaves e^-30 between the largest and the smallest input gate."""
    student, given = _student("terrace_gated"), _inputs(23)
    student.input_gate.start(-400.0)
    with torch.no_grad():
        student.input_gate.weight_NM[:, 0] = 1000.0
    given["x_BTM"] = torch.zeros_like(given["x_BTM"])
    given["x_BTM"][:, :, 1] = given["x_BTM"][:, 3, 0] = 1.0
    given["x_BTM"][:, 3, 1] = 0.0
    student.set_mix(torch.ones(HEADS))
    y, _ = student(**given, scale=SCALE)
    student.far_enabled = False
    near, _ = student(**given, scale=SCALE)
    far = given["v_BGTE"][:, :, 3:4].repeat_interleave(HEADS // KV, 1)
    torch.testing.assert_close(y[:, :, 2 * WINDOW :], 0.02 * near[:, :, 2 * WINDOW :] + 0.98 * far)


@pytest.mark.parametrize("key_maps", ["per_query_head", "per_kv_head"])
def test_the_fitted_start_is_at_least_as_good_as_the_ungated_far_part_with_any_mix(key_maps: Any) -> None:
    student, given = _student("terrace_gated", key_maps=key_maps, disturbed=0.0), _inputs(60)
    y = torch.randn(3, HEADS, 60, DIM, dtype=torch.float64)
    errors = []
    for mix in torch.linspace(LEAST_MIX, 0.98, 9).double():
        student.set_mix(mix.expand(HEADS))
        errors.append(_error(student, given, y))
    student.request = TransferRequest(initialise=True)
    student.transfer(y_BHTE=y, scale=SCALE, **given)
    assert _error(student, given, y) <= min(errors)
    half_lives = math.log(0.5) / student.gates(normalize(given["x_BTM"], dim=-1))[0][0, :, 0, 0]
    assert all(min(abs(found - each) for each in HALF_LIVES) < 1e-6 * found for found in half_lives.tolist())
    assert isinstance(student, TerraceGatedAttention)

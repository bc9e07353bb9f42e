"""The compiled kernels equal the quadratic reference: outputs, every gradient, transfer, states, decoding."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from operator_kit import Case, budget, compare, error, label, variants
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.ops import StudentState
from trenchcoat.ops.compiled import check
from trenchcoat.ops.compiled.build import compiler
from trenchcoat.students import StudentAttention, TransferRequest, build_student

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
KINDS = ("terrace", "sliding", "linear")
CASES = [case for kind in KINDS for case in variants(kind)]
SCALE = 0.6


@pytest.mark.parametrize("case", CASES, ids=label)
def test_given_features(case: Case) -> None:
    compare(case, "compiled", double=False)
    compare(replace(case, tokens=40), "compiled", double=False)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 12, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_lengths(kind: str, tokens: int) -> None:
    compare(Case(kind=kind, tokens=tokens), "compiled", double=False)


@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_tokens(kind: str) -> None:
    case = Case(kind=kind, tokens=500, window=64, batch=1, heads=2, kv_heads=1, dim=20, values=36, features=24)
    compare(replace(case, key_maps=2), "compiled", double=False)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_inputs_are_accumulated_in_float32(kind: str) -> None:
    case = Case(kind=kind, tokens=100)
    rounded = [t.to(torch.bfloat16) for t in case.tensors()[:3]] + [t.float() for t in case.tensors()[3:]]
    y, _ = case.call(rounded, impl="compiled")
    exact, _ = case.call([t.double() for t in rounded], impl="reference")
    assert y.dtype == torch.bfloat16
    assert error(y, exact) <= torch.finfo(torch.bfloat16).eps


def test_inputs_of_several_types_are_widened_not_narrowed() -> None:
    """Values in float32 beside queries and keys in bfloat16, and the other way round."""
    exact = Student(tokens=25, options={"sinks": 2})
    for narrow in ((0, 1), (2,), (1, 3)):
        x = [t.bfloat16() if i in narrow else t for i, t in enumerate(exact.inputs(torch.float32)[:4])]
        found = []
        for impl, dtype in (("compiled", None), ("chunkwise", torch.float64)):
            student = exact.made(impl, dtype or torch.float32)
            q, k, v, y_BHTE = (t if dtype is None else t.to(dtype) for t in x)
            y, _ = student(q, k, v, scale=SCALE)
            student.request = TransferRequest(mse_weight=1.0)
            student.transfer(q, k, v, y_BHTE, scale=SCALE)
            state = student.empty_state(2, dtype=dtype or torch.float32)
            steps = [
                student.decode(*(z[:, :, t : t + 1] for z in (q, k, v)), state=state, scale=SCALE) for t in range(25)
            ]
            found.append([student.metrics["mse"], y, torch.cat(steps, 2)])
        rounding = torch.finfo(torch.bfloat16).eps if 0 in narrow else 0.0
        assert error(found[0][0], found[1][0]) <= budget(0.0, 25 * 5 * 6)
        for one, other in zip(found[0][1:], found[1][1:], strict=True):
            assert error(one, other) <= max(rounding, 4 * budget(0.0, 25 * 5 * 6))


def test_inputs_may_lie_in_memory_in_any_order() -> None:
    case = Case(tokens=30, mask="right")
    tensors = [t.float() for t in case.tensors()]
    want, _ = case.call(tensors, impl="compiled")
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t for t in tensors]
    turned[0] = turned[0].mT.contiguous().mT
    found, _ = case.call(turned, impl="compiled")
    assert torch.equal(found, want)


def test_extreme_scores_stay_finite_and_nan_stays_visible() -> None:
    tensors = [t.float() for t in Case(tokens=30).tensors()]
    leaves = [(1e4 * t if i < 2 else t).requires_grad_() for i, t in enumerate(tensors[:6])]
    y, _ = Case(tokens=30).call([*leaves, tensors[6]], impl="compiled")
    y.sum().backward()
    for t in (y, *(leaf.grad for leaf in leaves)):
        assert t is not None
        assert bool(torch.isfinite(t).all())
    tensors[0][1, 2, 20] = float("nan")
    y, _ = Case(tokens=30).call(tensors, impl="compiled")
    assert bool(y[1, 2, 20].isnan().all())
    assert int(y.isnan().sum()) == y.shape[-1]


@dataclass(frozen=True)
class Student:
    """A student whose maps the kernels compute, and one call of it."""

    name: str = "terrace"
    heads: int = 4
    kv_heads: int = 2
    dim: int = 6
    tokens: int = 31
    batch: int = 2
    window: int = 4
    mask: str | None = None
    sink_logit: bool = False
    softcap: float | None = None
    feature: dict[str, Any] = field(default_factory=lambda: {"feature_dim": 5})
    options: dict[str, Any] = field(default_factory=dict)

    def made(self, impl: str, dtype: torch.dtype = torch.float32) -> StudentAttention:
        """The student with fixed random parameters."""
        cfg = StudentConfig(
            name=self.name,
            window=self.window,
            feature_map=FeatureMapConfig(**self.feature),
            impl=impl,
            **self.options,  # type: ignore[arg-type]
        )
        student = build_student(cfg, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.dim)
        make = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.4 * torch.randn(p.shape, generator=make))
        return student.to(dtype)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v, a teacher's output and the gradient of the student's."""
        make = torch.Generator().manual_seed(self.tokens)
        counts = (self.heads, self.kv_heads, self.kv_heads, self.heads, self.heads)
        shape = (self.tokens, self.dim)
        return [torch.randn(self.batch, n, *shape, generator=make, dtype=torch.float64).to(dtype) for n in counts]

    def scores(self, dtype: torch.dtype, span: slice = slice(None)) -> dict[str, Any]:
        """Keywords of a call for the tokens `span`."""
        mask = Case(tokens=self.tokens, batch=self.batch, mask=self.mask).real()
        logit = torch.linspace(-1, 1, self.heads, dtype=dtype) if self.sink_logit else None
        mask = None if mask is None else mask[:, span]
        return {"scale": SCALE, "mask_BT": mask, "softcap": self.softcap, "sink_logit": logit}

    def results(self, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output, its gradients, and transfer's loss and gradients, in float64."""
        student = self.made(impl, dtype)
        *leaves, y_BHTE, dy = self.inputs(dtype)
        leaves = [t.requires_grad_() for t in leaves]
        y, _ = student(*leaves, **self.scores(dtype))
        names = ["q", "k", "v", *(name for name, _ in student.named_parameters())]
        grads = torch.autograd.grad((y * dy).sum(), [*leaves, *student.parameters()], allow_unused=True)
        found = {"y": y, **{f"d{name}": g for name, g in zip(names, grads, strict=True) if g is not None}}
        student.request = TransferRequest(mse_weight=float(y.numel()))
        student.transfer(*(t.detach() for t in leaves), y_BHTE, **self.scores(dtype))
        found |= {"loss": student.metrics["loss"]}
        found |= {f"transfer {name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
        return {name: t.detach().double() for name, t in found.items()}


STUDENTS = [
    Student(),
    Student(tokens=9, options={"key_maps": "per_kv_head"}),
    Student(feature={"feature_dim": 5, "bias": True}, mask="left"),
    Student(feature={"feature_dim": 6, "skip": True}, options={"sinks": 3, "affine": True}, mask="odd"),
    Student(feature={"name": "hedgehog_half", "feature_dim": 9}, options={"tied": True}, sink_logit=True, mask="right"),
    Student(kv_heads=1, options={"key_maps": "per_kv_head", "sinks": 2}, softcap=2.0, sink_logit=True),
    Student(kv_heads=4, dim=17, window=16, tokens=70, batch=1, feature={"feature_dim": 24}),
    Student(name="sliding"),
    Student(name="sliding", options={"sinks": 3}, mask="odd", sink_logit=True, softcap=2.0),
    Student(name="sliding", options={"sinks": 6, "key_maps": "per_kv_head"}, window=5, mask="left"),
    Student(name="sliding", tokens=70, window=16, dim=17, options={"tied": True}, feature={"feature_dim": 24}),
    Student(name="linear", mask="right"),
    Student(name="linear", options={"key_maps": "per_kv_head"}, window=5, feature={"feature_dim": 5, "bias": True}),
    Student(name="window_sinks", options={"sinks": 3}, mask="left"),
]


@pytest.mark.parametrize("case", STUDENTS, ids=lambda case: f"{case.name},{case.feature}{case.options}{case.mask}")
def test_maps_inside_the_kernels(case: Student) -> None:
    exact = case.results("chunkwise", torch.float64)
    independent = case.results("reference", torch.float32)
    found = case.results("compiled", torch.float32)
    assert exact.keys() == found.keys()
    terms = case.tokens * case.heads * case.feature["feature_dim"] * case.dim
    for name, value in exact.items():
        assert error(found[name], value) <= budget(error(independent[name], value), terms), name


@pytest.mark.parametrize("case", STUDENTS, ids=lambda case: f"{case.name},{case.feature}{case.options}{case.mask}")
def test_pieces_and_decode_steps_continue_a_row(case: Student) -> None:
    """Prefill in pieces of any length, then token by token: outputs of the whole row, and the state of a prefill."""
    exact, student = case.made("chunkwise", torch.float64), case.made("compiled")
    q, k, v, *_ = case.inputs(torch.float32)
    double = [x.double() for x in (q, k, v)]
    with torch.no_grad():
        whole, _ = exact(*double, **case.scores(torch.float64))
        empty = exact.empty_state(case.batch, dtype=torch.float64)
        _, want = exact(*double, state=empty, **case.scores(torch.float64))
        state = student.empty_state(case.batch, dtype=torch.float32)
        pieces = []
        for start, stop in itertools.pairwise((0, 1, 7, 19, case.tokens)):
            span = slice(start, stop)
            part = [x[:, :, span] for x in (q, k, v)]
            call = case.scores(torch.float32, span)
            if stop == 7 or stop == case.tokens:
                pieces += [
                    student.decode(
                        *(x[:, :, t - start : t - start + 1] for x in part),
                        state=state, **case.scores(torch.float32, slice(t, t + 1)),
                    )
                    for t in range(start, min(stop, case.tokens))
                ]  # fmt: skip
                continue
            y, state = student(*part, state=state, **call)
            pieces.append(y)
    allowed = budget(0.0, case.tokens * case.feature["feature_dim"] * case.dim)
    assert error(torch.cat(pieces, 2), whole) <= 8 * allowed
    for name, value in want.tensors().items():
        assert error(state.tensors()[name], value) <= 8 * allowed, name


def test_several_tokens_and_several_states_in_one_call() -> None:
    case = Student(batch=3, tokens=24, options={"sinks": 2})
    student, kept = case.made("compiled"), case.made("chunkwise")
    q, k, v, *_ = case.inputs(torch.float32)
    with torch.no_grad():
        one, other = (s.empty_state(3, dtype=torch.float32) for s in (student, kept))
        rows = [student.empty_state(1, dtype=torch.float32) for _ in range(3)]
        for t in range(0, 24, 3):
            part = [x[:, :, t : t + 3] for x in (q, k, v)]
            y = student.decode(*part, state=one, scale=SCALE)
            want = kept.decode(*part, state=other, scale=SCALE)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
            for s in range(3):
                token = [x[:, :, t + s : t + s + 1] for x in (q, k, v)]
                each = student.decode_rows(*token, states=rows, scale=SCALE)
                assert torch.equal(each, y[:, :, s : s + 1])
    assert one.positions() == [24] * 3
    assert [state.positions() for state in rows] == [[24]] * 3


def test_decoding_with_bfloat16_buffers_and_sums() -> None:
    case = Student(tokens=21, batch=1)
    found = {}
    for impl in ("chunkwise", "compiled"):
        student = case.made(impl)
        q, k, v, *_ = case.inputs(torch.bfloat16)
        for state_dtype in (torch.float32, torch.bfloat16):
            student.state_dtype = state_dtype
            state = student.empty_state(1, dtype=torch.bfloat16)
            steps = [
                student.decode(*(x[:, :, t : t + 1] for x in (q, k, v)), state=state, scale=SCALE) for t in range(21)
            ]
            found[impl, state_dtype] = torch.cat(steps, 2)
            assert found[impl, state_dtype].dtype == torch.bfloat16
    step = 2 * torch.finfo(torch.bfloat16).eps
    for state_dtype in (torch.float32, torch.bfloat16):
        assert error(found["compiled", state_dtype], found["chunkwise", state_dtype]) <= step


def test_results_do_not_depend_on_threads_or_on_what_memory_held() -> None:
    case = Student(tokens=70, batch=2, window=8)
    before = torch.get_num_threads()
    want = case.results("compiled", torch.float32)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            student = case.made("compiled")
            poison = [torch.full_like(x, float("nan")) for x in case.inputs(torch.float32)]
            student.transfer(*poison[:4], scale=SCALE)
            student(*(x.requires_grad_() for x in poison[:3]), scale=SCALE)[0].sum().backward()
            for name, value in case.results("compiled", torch.float32).items():
                assert torch.equal(value, want[name]), name
    finally:
        torch.set_num_threads(before)


def test_frozen_maps_pass_gradients_on() -> None:
    """As when LoRA trains and the maps do not."""
    case, found = Student(tokens=30, options={"sinks": 2}), []
    for frozen in (False, True):
        student = case.made("compiled").requires_grad_(not frozen)
        *leaves, _, dy = case.inputs(torch.float32)
        leaves = [t.requires_grad_() for t in leaves]
        y, _ = student(*leaves, scale=SCALE)
        found.append(torch.autograd.grad((y * dy).sum(), leaves))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("mask", [None, "right"])
@pytest.mark.parametrize("sinks", [0, 5])
def test_rows_are_cut_where_there_are_more_threads_than_heads(mask: str | None, sinks: int) -> None:
    """Outputs and states of one row and head on one thread and on three, with a part of a text before it."""
    case = Student(heads=1, kv_heads=1, batch=1 if mask is None else 2, tokens=131, mask=mask, options={"sinks": sinks})
    student, before = case.made("compiled"), torch.get_num_threads()
    q, k, v, *_ = case.inputs(torch.float32)
    found: list[list[Tensor]] = []
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                state = student.empty_state(case.batch, dtype=torch.float32)
                found.append([student(q, k, v, **case.scores(torch.float32))[0]])
                for span in (slice(0, 17), slice(17, 131)):
                    part = [x[:, :, span] for x in (q, k, v)]
                    y, state = student(*part, state=state, **case.scores(torch.float32, span))
                    found[-1] += [y, *state.tensors().values()]
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert error(other, one) <= budget(0.0, case.tokens * case.dim)
    assert not all(map(torch.equal, *found))
    y, _ = student(q[:0], k[:0], v[:0], scale=SCALE)
    assert y.shape == (0, 1, 131, case.dim)


def test_only_requested_gradients_are_computed() -> None:
    tensors = [t.float().requires_grad_(i in (3, 4, 5)) for i, t in enumerate(Case(tokens=23).tensors())]
    y, _ = Case(tokens=23).call(tensors, impl="compiled")
    y.sum().backward()
    assert [t.grad is not None for t in tensors] == [False, False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (Case(), torch.float64, "float32 and bfloat16 inputs, not torch.float64"),
        (Case(), torch.float16, "float32 and bfloat16 inputs, not torch.float16"),
    ],
)
def test_what_the_kernels_do_not_compute_is_an_error(case: Case, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*use impl='chunkwise'"):
        case.call([t.to(dtype) for t in case.tensors()], impl="compiled")


def test_a_wrong_result_fails_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in check.CASES:
        assert max(check.deviations(case).values()) <= check.ALLOWED
    right = check.attend

    def wrong(*arguments: Any, **keywords: Any) -> tuple[Tensor, StudentState | None]:
        y, state = right(*arguments, **keywords)
        return y * (1 + 1e-4), state

    monkeypatch.setattr(check, "attend", wrong)
    with pytest.raises(RuntimeError, match=r"self-check: the output deviates by 0\.0001.*student\.impl=chunkwise"):
        check.check.__wrapped__()

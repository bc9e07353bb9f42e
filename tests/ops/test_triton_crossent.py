"""The cross-entropy kernels equal the blockwise code in float64: sums and every gradient; in the interpreter on CPUs
(odd shapes, small tiles), compiled on GPUs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; pip install triton")

import triton
import triton.language as tl

from kernel_kit import DEVICE, KernelCase
from low_precision import DRAWS, LowPrecision, tolerances
from operator_kit import budget, error
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.ops import Features, HeadWeights, Rule, crossent
from trenchcoat.ops.crossent import attention_cross_entropy
from trenchcoat.ops.state import FusedMap
from trenchcoat.ops.triton import check, crossent_launch
from trenchcoat.ops.triton.crossent import key_range, query_range
from trenchcoat.ops.triton.crossent_launch import Tiles, cross_entropy, tiles_of
from trenchcoat.ops.triton.launch import INTERPRETED, Call, Spans, refusal
from trenchcoat.ops.triton.parts import Constants
from trenchcoat.students import TransferRequest, build_student
from trenchcoat.students.feature_maps import FeatureMap

PARAMETERS = ("query_matrix", "query_bias", "key_matrix", "key_bias", "log_ratio")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One call; `eps` is the lower clamp of the features, `lengths` the rows' tokens, `tiles` resident and streamed
    tokens, `gain` a factor on the maps' matrices."""

    case: KernelCase
    tiles: tuple[int, int] = (32, 16)
    teacher_window: int | None = None
    lengths: tuple[int, ...] | None = None
    eps: float = 1e-12
    gain: float = 1.0

    def __str__(self) -> str:
        size = "x".join(map(str, self.tiles))
        return f"{self.case.kind}-{self.case.map}-{size}-{self.teacher_window}-{self.lengths}"

    @property
    def keywords(self) -> dict[str, Any]:
        """Arguments of both implementations."""
        length = None if self.lengths is None else torch.tensor(self.lengths, device=DEVICE)
        return {"length_B": length, "teacher_window": self.teacher_window}

    def phi(self, leaves: dict[str, Tensor], side: str) -> FeatureMap:
        """The case's map with this clamp."""
        phi = self.case.phi(leaves, side)
        phi.cfg = replace(phi.cfg, eps=self.eps)
        return phi

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The case's leaves, with this gain."""
        made = self.case.leaves(dtype)
        with torch.no_grad():
            for side in ("query", "key"):
                made[f"{side}_matrix"].mul_(self.gain)
        return made

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Results of the blockwise code, and autograd through the maps."""
        leaves = self.leaves(dtype)
        fq, fk = self.phi(leaves, "query")(leaves["q"]), self.phi(leaves, "key")(leaves["k"])
        total, found = attention_cross_entropy(
            self.case.qkv(leaves), Features(fq.detach(), fk.detach()), self.case.weights(leaves), self.case.rule,
            **self.keywords,
        )  # fmt: skip
        assert found is not None
        named = [leaves[n] for n in PARAMETERS[:4]]
        return _named(total, [*torch.autograd.grad((fq, fk), named, found[:2], allow_unused=True), found[2]])

    def low_precision(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Results of the independent run."""
        leaves = self.leaves(torch.float64)
        log_ratio = self.case.rule.log_ratio(leaves["mix"]).detach().requires_grad_()
        total = LowPrecision(rule=self.case.rule, map=self.case.map, dtype=dtype).cross_entropy(leaves, log_ratio)
        learned = [leaves["query_matrix"], leaves["key_matrix"], log_ratio]
        query, key, dlog = torch.autograd.grad(total, learned, allow_unused=True)
        return _named(total.detach(), [query, None, key, None, torch.zeros_like(log_ratio) if dlog is None else dlog])

    def kernels(self, dtype: torch.dtype, *, learn: bool = True) -> dict[str, Tensor]:
        """The same by the kernels; parameters stay float32."""
        leaves = {n: t.detach() for n, t in self.leaves(torch.float32).items()}
        query, key = (replace(m, floor=self.eps) for m in self.case.maps(leaves) or ())
        inputs = self.case.qkv(leaves, dtype), (query, key), self.case.weights(leaves), self.case.rule
        return _named(*cross_entropy(*inputs, learn=learn, **self.keywords))


def _named(total: Tensor, grads: list[Tensor | None]) -> dict[str, Tensor]:
    pairs = zip(PARAMETERS, grads, strict=True)
    return {"total": total.double(), **{n: g.double() for n, g in pairs if g is not None}}


def _tile(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    """Small tiles, so that short rows have tiles of every sort; compiled kernels use their own sizes."""
    if INTERPRETED:
        monkeypatch.setattr(crossent_launch, "tiles_of", lambda c, itemsize, available: Tiles(*rows.tiles, 4, 1))


CASES = [
    Rows(case=KernelCase(tokens=75, window=3, batch=1, bias=True, key_maps=1)),
    Rows(
        case=KernelCase(tokens=53, window=16, batch=1, heads=4, kv_heads=2, key_maps=2, map="exp_half"), tiles=(64, 16)
    ),
    Rows(
        case=KernelCase(tokens=70, window=16, batch=1, sink_logit=True, options={"softcap": 2.0, "sinks": 3}),
        tiles=(16, 16),
    ),
    Rows(case=KernelCase(tokens=75, window=4, batch=1, map="elu", options={"sinks": 2}), teacher_window=3),
    Rows(
        case=KernelCase(
            kind="sliding", tokens=75, window=5, sink_logit=True, options={"sinks": 18, "affine": True}
        ),
        lengths=(75, 20), tiles=(16, 16), teacher_window=40,
    ),
    Rows(case=KernelCase(kind="sliding", tokens=75, window=5, batch=1, map="exp"), teacher_window=21),
    Rows(case=KernelCase(kind="sliding", tokens=64, window=4, batch=1, key_maps=1, map="hedgehog_half")),
    Rows(
        case=KernelCase(kind="linear", tokens=75, batch=1, map="t2r", bias=True, sink_logit=True, columns=3), eps=0.0
    ),
    Rows(case=KernelCase(kind="linear", tokens=40, batch=1, map="exp_half"), eps=0.0, gain=16.0),
    Rows(case=KernelCase(kind="linear", tokens=60), lengths=(17, 60), teacher_window=30),
    Rows(case=KernelCase(tokens=40, batch=1, dim=200, columns=200, heads=1, key_maps=1)),
]  # fmt: skip


@pytest.mark.parametrize("rows", CASES, ids=str)
def test_sums_and_gradients(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    _tile(monkeypatch, rows)
    exact, independent = rows.expected(torch.float64), rows.expected(torch.float32)
    found = rows.kernels(torch.float32)
    assert set(found) == set(exact)
    for name, value in exact.items():
        assert error(found[name], value) <= budget(error(independent[name], value), rows.case.terms), name


def test_similarities_below_the_clamp_get_no_gradient() -> None:
    """The case above has many of them, large enough that their gradient would be visible."""
    rows = next(r for r in CASES if r.gain > 1)
    leaves = rows.leaves(torch.float64)
    x = rows.phi(leaves, "query")(leaves["q"]) @ rows.phi(leaves, "key")(leaves["k"]).mT
    assert int(((x < crossent.SMALLEST) & (x > crossent.SMALLEST / 100)).tril().sum()) > 20


def _constants(rule: Rule, dim: int = 16, columns: int = 16, dtype: torch.dtype = torch.float32) -> Constants:
    q, phi = torch.empty(1, 1, 1, dim, dtype=dtype), FusedMap("softmax", True, torch.empty(1, dim, columns))
    return Call(rule, q, q, q, phi, phi, torch.ones(1), None, None, None, None, Spans()).constants


@triton.jit
def _ranges(
    OUT, i, length, teacher_window, C: tl.constexpr, WINDOWED: tl.constexpr, RESIDENT: tl.constexpr,
    STREAMED: tl.constexpr,
):  # fmt: skip
    """Tiles of a query tile's keys and of a key tile's queries, as the kernels visit them."""
    t0 = i * RESIDENT
    last = tl.minimum(t0 + RESIDENT, length) - 1
    stop, part, whole, edge, end = key_range(t0, last, teacher_window, C, WINDOWED, STREAMED)
    begin, far, cut, final = query_range(t0, length, teacher_window, C, WINDOWED, RESIDENT, STREAMED)
    tl.store(OUT, stop)
    tl.store(OUT + 1, part)
    tl.store(OUT + 2, whole)
    tl.store(OUT + 3, edge)
    tl.store(OUT + 4, end)
    tl.store(OUT + 5, begin)
    tl.store(OUT + 6, far)
    tl.store(OUT + 7, cut)
    tl.store(OUT + 8, final)


@pytest.mark.parametrize("teacher_window", [None, 3, 40])
@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_only_tiles_that_matter_are_visited(kind: str, teacher_window: int | None) -> None:
    """Future tiles and those the teacher does not see are skipped; unmasked ones are far and seen in every pair."""
    rule = Rule(kind=kind, window=20, scale=1.0, sinks=0 if kind == "linear" else 18)  # type: ignore[arg-type]
    length, resident, streamed = 203, 32, 16
    token = torch.arange(length)
    query, key = token[:, None], token[None]
    near, far, seen = rule.is_near(query, key), rule.is_far(query, key), key <= query
    seen = seen & (key > query - (teacher_window or length))
    for i in range(-(-length // resident)):
        out = torch.zeros(9, dtype=torch.int32, device=DEVICE)
        _ranges[(1,)](
            out, i, length, teacher_window or 0, _constants(rule), WINDOWED=teacher_window is not None,
            RESIDENT=resident, STREAMED=streamed,
        )  # fmt: skip
        stop, part, whole, edge, end, begin, wholly, cut, final = out.tolist()
        mine = slice(i * resident, (i + 1) * resident)
        for j in range(-(-length // streamed)):
            other = slice(j * streamed, (j + 1) * streamed)
            n, f, s = (m[mine, other] for m in (near, far, seen))
            plain, masked = whole <= j < edge, j < stop or part <= j < whole or edge <= j < end
            assert not plain or bool((f & s).all())
            assert (plain or masked) == bool(n.any() or s.any() or (f.any() and not f.all())), (i, j)
            f, s = (m[other, mine] for m in (far, seen))
            plain, visited = wholly <= j < cut, begin <= j < final
            sinks = mine.start < rule.sinks
            assert not plain or bool(s.all() and (f.all() or sinks) and len(s) == streamed)
            assert visited or not bool((f & s).any() or (f.any() and j < wholly)), (i, j)
            assert not visited or (bool(f.any() or sinks) and bool(j < wholly or s.any())), (i, j)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_low_precision(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """q and k have bfloat16 values in every run; tests/low_precision.py defines the tolerances."""
    rows = Rows(case=KernelCase(kind=kind, tokens=40, batch=1, key_maps=1))
    _tile(monkeypatch, rows)
    draws = [replace(rows, case=replace(rows.case, seed=1000 + i)) for i in range(DRAWS)]
    allowed = tolerances([(r.low_precision(dtype), r.expected(torch.float64)) for r in draws])
    exact, found = rows.expected(torch.float64), rows.kernels(dtype)
    for name, value in exact.items():
        assert float((found[name] - value).abs().max()) <= allowed[name], name


def test_measuring_gives_the_same_sum_and_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(case=KernelCase(tokens=37, batch=1, sink_logit=True))
    _tile(monkeypatch, rows)
    measured, learned = rows.kernels(torch.float32, learn=False), rows.kernels(torch.float32)
    assert set(measured) == {"total"}
    assert torch.equal(measured["total"], learned["total"])


def _poisoned(x: Tensor) -> Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


def test_nothing_uninitialised_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN; a row of 9 tokens leaves whole tiles of 45 unwritten."""
    rows = Rows(case=KernelCase(kind="sliding", tokens=45, heads=1, key_maps=1), lengths=(45, 9), tiles=(16, 16))
    _tile(monkeypatch, rows)
    wanted = rows.kernels(torch.float32)
    with monkeypatch.context() as patch:
        for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
            make = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, make=make, **k: _poisoned(make(*a, **k)))
        found = rows.kernels(torch.float32)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_padding_after_a_row_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory after a row's tokens is not read, even if it is NaN."""
    rows = Rows(case=KernelCase(tokens=40, batch=1), lengths=(21,))
    _tile(monkeypatch, rows)
    wanted = rows.kernels(torch.float32)
    leaves = KernelCase.leaves

    def spoilt(case: KernelCase, dtype: torch.dtype) -> dict[str, Tensor]:
        made = leaves(case, dtype)
        with torch.no_grad():
            made["q"][:, :, 21:], made["k"][:, :, 21:] = float("nan"), float("nan")
        return made

    monkeypatch.setattr(KernelCase, "leaves", spoilt)
    found = rows.kernels(torch.float32)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["terrace", "sliding", "linear"])
def test_students_learn_as_with_the_blockwise_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "check", lambda device: None)
    torch.manual_seed(2)
    q, k, v, y = (torch.randn(2, heads, 14, 6, device=DEVICE) for heads in (2, 1, 1, 2))
    mask = torch.ones(2, 14, dtype=torch.bool, device=DEVICE)
    mask[0, :5] = False
    found, blockwise = [], []
    real = crossent.attention_cross_entropy
    monkeypatch.setattr(
        "trenchcoat.students.sums.attention_cross_entropy", lambda *a, **o: blockwise.append(1) or real(*a, **o)
    )
    for impl in ("chunkwise", "triton"):
        torch.manual_seed(1)
        phi = FeatureMapConfig(feature_dim=6, skip=True, init="kaiming", bias=True)
        cfg = StudentConfig(name=name, window=3, feature_map=phi, impl=impl, tied=name == "sliding")
        student = build_student(cfg, num_heads=2, num_kv_heads=1, head_dim=6).to(DEVICE)
        student.request = TransferRequest(mse_weight=0.0, xent_weight=3.0)
        student.transfer(q, k, v, y, scale=0.4, mask_BT=mask)
        found.append({n: p.grad for n, p in student.named_parameters()} | student.metrics)
    assert len(blockwise) == 1, "impl triton must not run the blockwise code"
    assert float(found[0]["xent"]) > 0
    for key, value in found[0].items():
        assert value is not None, key
        assert error(found[1][key], value) <= 1e-5, key  # float32 inputs of unit size, as in test_triton_students.py


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"far": False}}, "needs the far part"),
        ({"dtype": torch.float64}, r"impl is 'triton', but q, k, v are torch.float64.*chunkwise"),
        ({"window": 200}, "window is 200"),
        ({"shared": 2_000}, "no tile of head dim 6 and 8 features fits into the 2000.*smaller feature_dim"),
    ],
)
def test_unsupported_calls_are_rejected(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = change.pop("dtype", torch.float32)
    shared = change.pop("shared", 1 << 18)
    monkeypatch.setattr(crossent_launch, "shared_limit", lambda device: shared)
    case = replace(KernelCase(tokens=3, batch=1), **change)
    maps = case.maps({n: t.detach() for n, t in case.leaves(torch.float32).items()})
    heads = HeadWeights(torch.zeros(2, device=DEVICE))
    with pytest.raises(ValueError, match=message):
        cross_entropy(case.qkv(case.leaves(dtype)), maps, heads, case.rule)


@pytest.mark.parametrize(
    ("dtype", "dim", "columns", "wanted"),
    [
        (torch.bfloat16, 128, 64, (128, 64, 8, 2)),
        (torch.bfloat16, 256, 64, (128, 64, 8, 2)),
        (torch.bfloat16, 128, 128, (64, 32, 8, 2)),
        (torch.float32, 128, 64, (32, 32, 4, 1)),
    ],
)
def test_tiles_fit_on_chip(
    dtype: torch.dtype, dim: int, columns: int, wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles of the compiler report; with less shared memory, smaller ones or none."""
    monkeypatch.setattr(crossent_launch, "INTERPRETED", False)
    c = _constants(Rule(kind="terrace", window=64, scale=1.0), dim, columns, dtype)
    assert tiles_of(c, dtype.itemsize, 227 * 1024) == Tiles(*wanted)
    small = tiles_of(c, dtype.itemsize, Tiles(*wanted).shared_bytes(c, dtype.itemsize) - 1)
    assert small is None or small.resident * small.stages < wanted[0] * wanted[3]
    assert tiles_of(c, dtype.itemsize, 1024) is None


def test_tiles_fit_every_shape_the_other_kernels_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossent_launch, "INTERPRETED", False)
    rule, taken = Rule(kind="terrace", window=16, scale=1.0), 0
    for dtype, dim, columns, name in itertools.product(
        (torch.bfloat16, torch.float32),
        (16, 64, 96, 128, 192, 256),
        (16, 48, 64, 128, 256),
        (("softmax", True), ("elu", False)),
    ):
        q = torch.empty(1, 1, 1, dim, dtype=dtype, device=DEVICE)
        phi = FusedMap(*name, torch.empty(1, dim, columns))
        call = Call(rule, q, q, q, phi, phi, torch.ones(1), None, None, None, None, Spans())
        if refusal(call) is None:
            taken += 1
            assert tiles_of(call.constants, dtype.itemsize, 227 * 1024) is not None, (dtype, dim, columns, name)
    assert taken > 60


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["terrace", "sliding", "linear"])
def test_twenty_runs_are_equal_and_right(kind: str) -> None:
    """No race, at tiles of real sizes; tolerances as in `test_low_precision`."""
    case = KernelCase(kind=kind, window=64, tokens=1500, heads=8, kv_heads=2, key_maps=8, dim=128, columns=64)
    rows = Rows(case=replace(case, options={"softcap": 20.0}), lengths=(1500, 777))
    exact, independent = rows.expected(torch.float64), rows.expected(torch.float64, short=True)
    first = rows.kernels(torch.bfloat16)
    for name, value in exact.items():
        assert error(first[name], value) <= 8 * max(error(independent[name], value), 2.0**-8), name
    for _ in range(19):
        again = rows.kernels(torch.bfloat16)
        assert all(torch.equal(again[name], value) for name, value in first.items())

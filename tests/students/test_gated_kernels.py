"""`terrace_gated` in the compiled kernels, decoding and whole rows: as its definition says, and as PyTorch does."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from operator_kit import budget, error
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.ops import GatedState, HeadWeights, Rule, Tokens, linear_window_attention, recurrences
from trenchcoat.ops.compiled.build import compiler
from trenchcoat.ops.compiled.decode import STATE_FIELDS, Kept, StatePages
from trenchcoat.students import build_student, terrace_gated
from trenchcoat.students.terrace_gated import TerraceGatedAttention

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
WIDTH, SCALE = 10, 0.4
Given = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A student and a text for it."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 6
    values: int = 6
    window: int = 4
    tokens: int = 31
    batch: int = 3
    padded: bool = False
    softcap: float | None = None
    sink_logit: bool = False
    feature: dict[str, Any] = field(default_factory=lambda: {"feature_dim": 5})
    options: dict[str, Any] = field(default_factory=dict)

    def made(self, impl: str = "auto", dtype: torch.dtype = torch.float32) -> TerraceGatedAttention:
        """The student with fixed random parameters."""
        phi = FeatureMapConfig(**self.feature)
        cfg = StudentConfig(name="terrace_gated", window=self.window, feature_map=phi, impl=impl, **self.options)
        sizes = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.dim}
        torch.manual_seed(7)
        student = build_student(cfg, **sizes, value_dim=self.values, hidden_size=WIDTH)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.7 * torch.randn_like(p))
        assert isinstance(student, TerraceGatedAttention)
        return student.to(dtype).requires_grad_(False)

    def given(self, dtype: torch.dtype = torch.float32) -> Given:
        """Keywords with a token axis: q, k, v, x and, if padded, the mask."""
        make, tokens = torch.Generator().manual_seed(self.tokens), self.tokens
        shapes = {
            "q_BHTD": (self.heads, tokens, self.dim), "k_BGTD": (self.kv_heads, tokens, self.dim),
            "v_BGTE": (self.kv_heads, tokens, self.values), "x_BTM": (tokens, WIDTH),
        }  # fmt: skip
        given = {name: torch.randn(self.batch, *shape, generator=make).to(dtype) for name, shape in shapes.items()}
        if self.padded:
            mask = torch.ones(self.batch, tokens, dtype=torch.bool)
            mask[0, : tokens // 3] = mask[1, tokens - tokens // 3 :] = mask[2, 1::3] = False
            given["mask_BT"] = mask
        return given

    def scores(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The other keywords."""
        logit = torch.linspace(-1, 1, self.heads, dtype=dtype) if self.sink_logit else None
        return {"scale": SCALE, "softcap": self.softcap, "sink_logit": logit}

    @property
    def allowed(self) -> float:
        """Error of float32 relative to the largest number."""
        return 4 * budget(0.0, self.tokens * self.feature["feature_dim"] * self.dim)

    def definition(self) -> Tensor:
        """(1 - o) near + o far in float64, all from definitions."""
        student, given = self.made(dtype=torch.float64), self.given(torch.float64)
        q, k, v, x, mask = (given.get(name) for name in ("q_BHTD", "k_BGTD", "v_BGTE", "x_BTM", "mask_BT"))
        assert q is not None and k is not None and v is not None and x is not None  # noqa: PT018
        rule = Rule(
            kind="terrace", window=self.window, scale=SCALE, softcap=self.softcap, sinks=student.cfg.sinks, far=False
        )
        heads = HeadWeights(torch.zeros(self.heads), self.scores(torch.float64)["sink_logit"])
        near, _ = linear_window_attention(Tokens(q, k, v, mask), None, heads, rule, impl="reference")
        real = torch.ones(self.batch, self.tokens, dtype=torch.bool) if mask is None else mask
        forget = student.forget_gate(normalize(x, dim=-1)).sigmoid().log()
        write = 15.0 * torch.tanh(student.input_gate(normalize(x, dim=-1)) / 15.0)
        assert student.query_map is not None and student.keys_phi is not None  # noqa: PT018
        fq, fk = student.query_map(q), student.keys_phi(k)
        of_maps = v.repeat_interleave(fk.shape[1] // self.kv_heads, 1)
        far = recurrences.gated_far(fq, fk, of_maps, forget, write, real, rule)
        parts = [q, *(t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))]
        unit = torch.cat([t / t.norm(dim=-1, keepdim=True) for t in parts], -1)
        o = ((unit * student.mix_HX[:, None]).sum(-1) + student.mix_bias_H[:, None]).sigmoid()
        position = real.long().cumsum(1) - 1
        o = o * (real & (rule.near_start(position) > rule.sinks))[:, None]
        return near * (1.0 - o[..., None]) + o[..., None] * far


CASES = [
    Case(),
    Case(padded=True, options={"key_maps": "per_kv_head"}),
    Case(kv_heads=1, softcap=2.0, sink_logit=True, options={"key_maps": "per_kv_head", "sinks": 3}),
    Case(dim=17, values=9, window=5, padded=True, feature={"feature_dim": 7, "bias": True}, options={"sinks": 6}),
    Case(values=5, padded=True, feature={"name": "hedgehog_half", "feature_dim": 9}, options={"tied": True}),
    Case(heads=6, kv_heads=2, feature={"feature_dim": 6, "skip": True}, options={"sinks": 1}, sink_logit=True),
    Case(heads=9, kv_heads=3, dim=64, values=64, window=16, tokens=90, batch=1, feature={"feature_dim": 64}),
]


def label(case: Case) -> str:
    return ",".join(f"{name}={value}" for name, value in vars(case).items() if value != getattr(Case(), name))


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every call of the kernels."""
    found: list[int] = []
    for name in ("attend", "decode", "decode_pages"):
        original = getattr(terrace_gated, name)

        def counted(tokens: Tokens, *args: Any, call: Any = original, **kwargs: Any) -> Tensor:
            found.append(tokens.q_BHTD.shape[2])
            return call(tokens, *args, **kwargs)

        monkeypatch.setattr(terrace_gated, name, counted)
    return found


def span(given: Given, start: int, stop: int) -> Given:
    """Some of the tokens."""
    return {n: x[:, start:stop] if n in ("x_BTM", "mask_BT") else x[:, :, start:stop] for n, x in given.items()}


def decoded(student: Any, case: Case, state: Any, start: int = 0, step: int = 1) -> Tensor:
    """The tokens from `start` on, `step` at a time."""
    given, scores = case.given(student_dtype(student)), case.scores()
    pieces = [
        student.decode(**span(given, t, min(t + step, case.tokens)), **scores, state=state)
        for t in range(start, case.tokens, step)
    ]
    return torch.cat(pieces, 2)


def student_dtype(student: TerraceGatedAttention) -> torch.dtype:
    return student.mix_bias_H.dtype


def same_state(found: GatedState, wanted: GatedState, allowed: float) -> None:
    """Within `allowed` of the largest number of each tensor; slots that were never written hold nothing."""
    for name, value in wanted.tensors().items():
        assert error(found.tensors()[name], value) <= allowed, name


@pytest.mark.parametrize("step", [1, 3, 20])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_token_by_token_it_is_the_definition(case: Case, step: int, calls: list[int]) -> None:
    """And the state is that of PyTorch's steps, in float64."""
    student, exact = case.made(), case.made("chunkwise", torch.float64)
    state, wanted = (s.empty_state(case.batch, dtype=student_dtype(s)) for s in (student, exact))
    y = decoded(student, case, state, step=step)
    assert error(y, case.definition()) <= case.allowed
    assert len(calls) == -(-case.tokens // step)
    decoded(exact, case, wanted)
    assert len(calls) == -(-case.tokens // step)
    same_state(state, wanted, case.allowed)


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=label)
def test_every_split_into_prefill_and_decode_gives_the_same_row(case: Case, calls: list[int]) -> None:
    student, given, wanted = case.made(), case.given(), case.definition()
    _, after = case.made("chunkwise", torch.float64)(
        **case.given(torch.float64), **case.scores(torch.float64),
        state=case.made().empty_state(case.batch, dtype=torch.float64),
    )  # fmt: skip
    for split in range(1, case.tokens):
        state = student.empty_state(case.batch, dtype=torch.float32)
        first, state = student(**span(given, 0, split), **case.scores(), state=state)
        y = torch.cat([first, decoded(student, case, state, split, 1 + split % 3)], 2)
        assert error(y, wanted) <= case.allowed, split
        same_state(state, after, case.allowed)
    assert len(calls) > case.tokens


@pytest.mark.parametrize("edges", [(0, None), (0, 7, 19, 20, None), (0, 1, None)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_rows_in_pieces_without_gradients_are_the_definition(
    case: Case, edges: tuple[int, ...], calls: list[int]
) -> None:
    """And the state is that of PyTorch's steps, in float64."""
    student, exact, given = case.made(), case.made("chunkwise", torch.float64), case.given()
    state, wanted = (s.empty_state(case.batch, dtype=student_dtype(s)) for s in (student, exact))
    pieces = []
    for start, stop in itertools.pairwise(edge if edge is not None else case.tokens for edge in edges):
        y, state = student(**span(given, start, stop), **case.scores(), state=state)
        pieces.append(y)
    assert len(calls) == len(pieces)
    assert error(torch.cat(pieces, 2), case.definition()) <= case.allowed
    decoded(exact, case, wanted)
    same_state(state, wanted, case.allowed)
    if len(pieces) == 1:
        alone, after = student(**given, **case.scores())
        assert after is None
        assert error(alone, y) <= case.allowed


def test_rows_with_gradients_are_computed_in_pytorch(calls: list[int]) -> None:
    case = CASES[1]
    student, given = case.made().requires_grad_(), case.given()
    y, _ = student(**given, **case.scores())
    assert y.requires_grad
    assert not calls
    with torch.no_grad():
        same, _ = student(**given, **case.scores())
    assert calls == [case.tokens]
    assert error(same, y) <= case.allowed
    student.requires_grad_(False)
    assert student(**given | {"x_BTM": given["x_BTM"].requires_grad_()}, **case.scores())[0].requires_grad


def test_a_chunk_is_folded_when_it_leaves_the_window_and_not_a_token_sooner_or_later() -> None:
    """With forget gates of nearly 0 the far part is the newest far key's value: each token shows which one that is."""
    case = Case(tokens=41)
    student, given = case.made(), case.given()
    student.forget_gate.start(-60.0)
    student.input_gate.start(0.0)
    student.set_mix(torch.ones(case.heads))
    far = decoded(student, case, student.empty_state(case.batch, dtype=torch.float32))
    student.far_enabled = False
    near = decoded(student, case, student.empty_state(case.batch, dtype=torch.float32))
    v = given["v_BGTE"].repeat_interleave(2, 1)
    for t in range(case.tokens):
        newest = (t // case.window - 1) * case.window - 1
        wanted = near[:, :, t] if newest < 0 else 0.02 * near[:, :, t] + 0.98 * v[:, :, newest]
        torch.testing.assert_close(far[:, :, t], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefill", [False, True], ids=["steps", "row"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=label)
def test_bfloat16_inputs_and_states(case: Case, state_dtype: torch.dtype, prefill: bool, calls: list[int]) -> None:
    """As PyTorch, whose sums are rounded by the same thresholds."""
    found = []
    for impl in ("auto", "chunkwise"):
        student, given = case.made(impl), case.given(torch.bfloat16)
        student.state_dtype = state_dtype
        state = student.empty_state(case.batch, dtype=torch.bfloat16)
        if prefill:
            found.append(student(**given, **case.scores(), state=state))
            continue
        steps = [student.decode(**span(given, t, t + 1), **case.scores(), state=state) for t in range(case.tokens)]
        found.append((torch.cat(steps, 2), state))
    (y, state), (wanted, other) = found
    assert len(calls) == (1 if prefill else case.tokens)
    assert y.dtype == torch.bfloat16
    assert error(y, wanted) <= 2 * torch.finfo(torch.bfloat16).eps
    for name, value in other.tensors().items():
        mine = state.tensors()[name]
        assert mine.dtype == value.dtype
        assert error(mine, value) <= torch.finfo(torch.bfloat16).eps, name
    assert (state.far_s_BKFE == other.far_s_BKFE).float().mean() > (0.98 if state_dtype == torch.bfloat16 else 0.0)


def test_several_states_of_one_row_at_different_positions(calls: list[int]) -> None:
    case = Case(options={"sinks": 2})
    student, given, wanted = case.made(), case.given(), case.definition()
    lengths, states = (0, 7, 13), []
    for row, length in enumerate(lengths):
        one = {name: x[row : row + 1] for name, x in span(given, 0, length).items()}
        state = student.empty_state(1, dtype=torch.float32)
        states.append(student(**one, **case.scores(), state=state)[1] if length else state)
    for t in range(case.tokens - max(lengths)):
        one = {
            name: torch.cat([span(given, n + t, n + t + 1)[name][row : row + 1] for row, n in enumerate(lengths)])
            for name in given
        }
        y = student.decode_rows(**one, states=states, scale=SCALE)
        for row, length in enumerate(lengths):
            assert error(y[row], wanted[row, :, length + t, None]) <= case.allowed
    assert calls == [*lengths[1:], *[1] * (case.tokens - max(lengths))]
    assert [state.positions() for state in states] == [[length + case.tokens - max(lengths)] for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 2])
def test_kept_groups_in_the_same_call(step: int, dtype: torch.dtype) -> None:
    """Group 1 of three keeps softmax attention; each part gives what it gives alone, but for rounding."""
    case, free = Case(heads=6, kv_heads=3, options={"sinks": 2}), [0, 2]
    part = replace(case, heads=4, kv_heads=2)
    student, given, state = part.made(), case.given(dtype), part.made().empty_state(3, dtype=dtype)
    alone, groups = part.made("chunkwise"), torch.tensor(free)
    heads = torch.tensor([0, 1, 4, 5])
    own = {"q_BHTD": given["q_BHTD"][:, heads], "x_BTM": given["x_BTM"]}
    own |= {name: given[name][:, groups] for name in ("k_BGTD", "v_BGTE")}
    far_alone = alone.empty_state(3, dtype=dtype)
    keys = torch.zeros(3, 1, case.tokens, case.dim, dtype=dtype)
    values = torch.zeros_like(keys)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.0, "atol": 0.03}
    for t in range(0, case.tokens - step + 1, step):
        one, stop = span(given, t, t + step), t + step
        kept = Kept(keys[:, :, :stop], values[:, :, :stop], t, (heads, groups, torch.tensor([1])))
        y = student.decode_with_kept(**one, state=state, kept=kept, scale=SCALE)
        wanted = alone.decode(**span(own, t, stop), state=far_alone, scale=SCALE)
        torch.testing.assert_close(y[:, heads], wanted, **tolerance)
        q, k, v = one["q_BHTD"][:, 2:4], given["k_BGTD"][:, 1:2, :stop], given["v_BGTE"][:, 1:2, :stop]
        seen = torch.ones(step, stop, dtype=torch.bool).tril(t)
        softmax = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE, enable_gqa=True)
        torch.testing.assert_close(y[:, 2:4], softmax, **tolerance)
    assert torch.equal(keys[:, :, :stop], given["k_BGTD"][:, 1:2, :stop])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_states_in_pages(parts: int, state_dtype: torch.dtype) -> None:
    """Pages in any order, with anything in them but far sums of 0, in one or two caches: as states of their own."""
    case = Case(options={"sinks": 2, "key_maps": "per_kv_head" if parts == 1 else "per_query_head"})
    student, given = case.made(), case.given()
    student.state_dtype = state_dtype
    like = student.empty_state(1, dtype=torch.float32, device="meta")
    tensors, places, size = like.tensors(), [], 4
    for name in STATE_FIELDS[:-1]:
        places.append(size)
        size += tensors[name].nbytes // parts
        size += -size % 4
    caches = tuple(torch.randint(-128, 128, (5, size + 12), dtype=torch.int8) for _ in range(parts))
    slots = [torch.tensor([3, 1, 4]), torch.tensor([0, 4, 2])][:parts]
    for name in ("far_s_BKFE", "far_z_BKF"):
        at = places[STATE_FIELDS.index(name)]
        for cache in caches:
            cache[:, at : at + tensors[name].nbytes // parts] = 0
    others = [[page for page in range(5) if page not in slot.tolist()] for slot in slots]
    before = [cache[other].clone() for cache, other in zip(caches, others, strict=True)]
    pages = StatePages(caches, like, tuple(places))
    state = student.empty_state(3, dtype=torch.float32)
    assert student.decodes_pages(given["q_BHTD"], like)
    for t in range(case.tokens):
        one, seen_B = span(given, t, t + 1), torch.full((3,), t)
        y = student.decode_pages(**one, states=pages, slots=slots, seen_B=seen_B, scale=SCALE)
        assert torch.equal(y, student.decode(**one, state=state, scale=SCALE))
    for cache, other, untouched in zip(caches, others, before, strict=True):
        assert torch.equal(cache[other], untouched)


def test_results_do_not_depend_on_threads() -> None:
    case, before, found = replace(CASES[6], heads=2, kv_heads=1, tokens=300), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            student = case.made()
            row, _ = student(**case.given(), **case.scores())
            found.append((row, decoded(student, case, student.empty_state(1, dtype=torch.float32), step=50)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("case", "dtype", "impl", "reason"),
    [
        (Case(), torch.float64, "auto", "not torch.float64"),
        (Case(), torch.float32, "chunkwise", None),
        (Case(feature={"name": "elu", "feature_dim": 5}), torch.float32, "auto", "not 'elu'"),
        (Case(feature={"feature_dim": 5, "adapter_dim": 2}), torch.float32, "compiled", "adapter"),
    ],
    ids=["float64", "chunkwise", "elu", "adapter"],
)
def test_what_the_kernels_refuse_is_decoded_in_pytorch(
    case: Case, dtype: torch.dtype, impl: str, reason: str | None, calls: list[int],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("trenchcoat.students.fused._reported", set())
    student = case.made(impl, dtype)
    with caplog.at_level(logging.INFO, "trenchcoat"):
        y = decoded(student, case, student.empty_state(case.batch, dtype=dtype))
        row, _ = student(**case.given(dtype), **case.scores())
    assert not calls
    assert error(y, case.definition()) <= case.allowed
    assert error(row, case.definition()) <= case.allowed
    lines = [line for line in caplog.messages if line.startswith("terrace_gated's far part on cpu: chunkwise")]
    assert [reason in line for line in lines] == ([True] if reason else [])


def test_the_layers_input_is_needed_only_for_the_far_part() -> None:
    case = Case()
    student, given = case.made(), case.given()
    del given["x_BTM"]
    state = student.empty_state(case.batch, dtype=torch.float32)
    with pytest.raises(ValueError, match="x_BTM"):
        student.decode(**span(given, 0, 1), state=state, scale=SCALE)
    student.far_enabled = False
    student.decode(**span(given, 0, 1), state=state, scale=SCALE)


def test_the_layers_input_may_be_of_any_type_and_order_in_memory() -> None:
    case = Case()
    student, given = case.made(), case.given()
    x = given.pop("x_BTM").to(torch.bfloat16)
    found = []
    turned = (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1))
    for each in (x.float(), x, x.double(), *turned):
        state = student.empty_state(case.batch, dtype=torch.float32)
        found.append(student.decode(**given, x_BTM=each, state=state, scale=SCALE))
    for y in found[1:]:
        torch.testing.assert_close(y, found[0], rtol=0, atol=1e-6)

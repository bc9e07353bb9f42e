"""A new far part that is not a sum of phi(k) v^T: one class in `students/`, one line in STUDENTS.

The example is linear attention with a decay, one learned number per head. Nothing else needs changing: caches,
adapters, merged models, both stages, the report and the plan work with it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import trenchcoat
from tiny_families import logits, tiny_model, tokens
from trenchcoat.cli import app as cli
from trenchcoat.config import FeatureMapConfig, ModelConfig, StudentConfig
from trenchcoat.models.attach import attach_students, set_mode, students_of
from trenchcoat.models.loading import load_model
from trenchcoat.models.shapes import find_config, shapes_of
from trenchcoat.ops import RowState
from trenchcoat.planning.footprint import state_bytes
from trenchcoat.students import STUDENTS, StudentAttention, TransferRequest, build_student, register_student

EPS = 1e-12

# --8<-- what a contributor writes


@dataclass
class DecayState(RowState):
    """S = sum_j gamma^(n - j) phi(k_j) v_j^T and the same of phi(k_j), at the last real token n."""

    s_BKFE: Tensor
    z_BKF: Tensor


def _to_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[dim], dim)


class DecayAttention(StudentAttention):
    """y_t = phi(q_t) S_t / (phi(q_t) z_t + eps); S_t = gamma S_{t-1} + phi(k_t) v_t^T, z_t = gamma z_{t-1} + phi(k_t).

    gamma = sigmoid(decay), one number per key map. Shape legend: as in :mod:`trenchcoat.students.base`; J keys.
    """

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(cfg, **sizes)
        self.decay_K = nn.Parameter(torch.empty(self.key_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """From 1 - 1/8 to 1 - 1/1024."""
        super().reset_parameters()
        self.decay_K.copy_((2.0 ** torch.linspace(3.0, 10.0, self.key_heads) - 1.0).log())

    def empty_state(self, batch_size: int, *, dtype: torch.dtype, device: Any = None) -> DecayState:
        """Zeros, in float32 at least."""
        wide, shape = torch.promote_types(dtype, torch.float32), (batch_size, self.key_heads, self.features)
        s_BKFE = torch.zeros(*shape, self.value_dim, dtype=wide, device=device)
        seen_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return DecayState(s_BKFE, s_BKFE[..., 0].clone(), seen_B=seen_B)

    def forward(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, mask_BT: Any = None, state: Any = None, **_: Any
    ) -> tuple[Tensor, DecayState | None]:
        """As a T x T product, plus the contribution of the state."""
        assert self.query_map is not None
        assert self.keys_phi is not None
        heads, log_K = self.num_heads, nn.functional.logsigmoid(self.decay_K)
        fq_BHTF, fk_BKTF, v_BKTE = self.query_map(q_BHTD), self.keys_phi(k_BGTD), _to_heads(v_BGTE, self.key_heads, 1)
        v_BKTE = v_BKTE.to(fk_BKTF.dtype)
        real_BT = torch.ones_like(k_BGTD[:, 0, :, 0], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        count_BT = real_BT.cumsum(1)
        log_BHT1 = _to_heads(log_K, heads, 0)[:, None, None] * count_BT[:, None, :, None]
        seen_BTJ = real_BT[:, None] & torch.ones_like(real_BT[0, :, None] & real_BT[0]).tril()
        age_BHTJ = (log_BHT1 - log_BHT1.mT).masked_fill(~seen_BTJ[:, None], float("-inf"))
        weight_BHTJ = fq_BHTF @ _to_heads(fk_BKTF, heads, 1).mT * age_BHTJ.exp()
        num, den = weight_BHTJ @ _to_heads(v_BKTE, heads, 1), weight_BHTJ.sum(-1, keepdim=True) + EPS
        if state is not None:
            before_BHTF = fq_BHTF * log_BHT1.exp()
            num = num + before_BHTF @ _to_heads(state.s_BKFE, heads, 1)
            den = den + before_BHTF @ _to_heads(state.z_BKF, heads, 1)[..., None]
        y = torch.where(real_BT[:, None, :, None], num / den, 0.0).to(q_BHTD.dtype)
        return y, None if state is None else self._after(fk_BKTF, v_BKTE, real_BT, log_K, state)

    @torch.no_grad()
    def _after(self, fk_BKTF: Tensor, v_BKTE: Tensor, real_BT: Tensor, log_K: Tensor, state: DecayState) -> DecayState:
        count_BT = real_BT.cumsum(1)
        left_BKT = (log_K[:, None] * (count_BT[:, -1:] - count_BT)[:, None]).exp() * real_BT[:, None]
        kept_BK1 = (log_K[:, None] * count_BT[:, None, -1:]).exp()
        fk_BKTF = fk_BKTF * left_BKT[..., None]
        s_BKFE = state.s_BKFE * kept_BK1[..., None] + fk_BKTF.mT @ v_BKTE
        return DecayState(s_BKFE, state.z_BKF * kept_BK1 + fk_BKTF.sum(2), seen_B=state.seen_B + count_BT[:, -1])


# --8<-- and the line in STUDENTS: "decay": StudentEntry("trenchcoat.students.decay.DecayAttention"),

HEADS, KV, DIM, SCALE = 4, 2, 6, 0.4
CFG = StudentConfig(name="decay", window=4, feature_map=FeatureMapConfig(feature_dim=5))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_student("decay", DecayAttention)
    yield
    del STUDENTS["decay"]


def _student(key_maps: Any = "per_query_head") -> StudentAttention:
    cfg = StudentConfig(name="decay", window=4, feature_map=FeatureMapConfig(feature_dim=5), key_maps=key_maps)
    student = build_student(cfg, num_heads=HEADS, num_kv_heads=KV, head_dim=DIM).double()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return student


def _inputs(length: int, batch: int = 3) -> list[Tensor]:
    return [torch.randn(batch, heads, length, DIM, dtype=torch.float64) for heads in (HEADS, KV, KV)]


def _mask(length: int) -> Tensor:
    """One row padded left, one padded right, one with gaps."""
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, : length // 3] = mask[1, length - length // 3 :] = mask[2, 1::3] = False
    return mask


def _loop(student: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The definition, token by token."""
    fq, fk = student.query_map(q), student.keys_phi(k)
    fk, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (fk, v))
    gamma = student.decay_K.sigmoid().repeat_interleave(HEADS // len(student.decay_K))
    rows = []
    for b in range(len(q)):
        s, z, outputs = torch.zeros(HEADS, fq.shape[-1], DIM).double(), torch.zeros(HEADS, fq.shape[-1]).double(), []
        for t in range(q.shape[2]):
            if mask is not None and not mask[b, t]:
                outputs.append(torch.zeros(HEADS, DIM).double())
                continue
            s = gamma[:, None, None] * s + fk[b, :, t, :, None] * v[b, :, t, None, :]
            z = gamma[:, None] * z + fk[b, :, t]
            num, den = (fq[b, :, t, :, None] * s).sum(1), (fq[b, :, t] * z).sum(1)
            outputs.append(num / (den + EPS)[:, None])
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("key_maps", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 9, 23])
def test_outputs_and_gradients_match_the_loop(length: int, key_maps: str, padded: bool) -> None:
    student, mask = _student(key_maps), _mask(length) if padded else None
    x = [t.requires_grad_() for t in _inputs(length)]
    leaves = [*x, *student.parameters()]
    y, _ = student(*x, scale=SCALE, mask_BT=mask)
    wanted = _loop(student, *x, mask)
    torch.testing.assert_close(y, wanted)
    projection = torch.randn_like(y)
    grads, expected = (torch.autograd.grad((out * projection).sum(), leaves) for out in (y, wanted))
    for found, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("padded", [False, True])
def test_any_split_into_prefill_and_decode_gives_the_same_row(padded: bool) -> None:
    student, (q, k, v) = _student(), _inputs(23)
    mask = _mask(23) if padded else torch.ones(3, 23, dtype=torch.bool)
    whole, _ = student(q, k, v, scale=SCALE, mask_BT=mask)
    for edges in ((0, 13, 14, 15, 23), (0, 1, 2, 23), (0, 22, 23)):
        state, found = student.empty_state(3, dtype=torch.float64), []
        for start, stop in zip(edges, edges[1:], strict=False):
            span = [x[:, :, start:stop] for x in (q, k, v)]
            options: dict[str, Any] = {"scale": SCALE, "mask_BT": mask[:, start:stop], "state": state}
            if stop - start < 3:
                found.append(student.decode(*span, **options))
            else:
                y, state = student(*span, **options)
                found.append(y)
        torch.testing.assert_close(torch.cat(found, 2), whole)
        assert state.seen_B.tolist() == mask.sum(1).tolist()
        assert state.nbytes() == student.empty_state(3, dtype=torch.float64).nbytes()


def test_padding_and_later_tokens_have_no_effect() -> None:
    student, (q, k, v), mask = _student(), _inputs(23), _mask(23)
    y, _ = student(q, k, v, scale=SCALE, mask_BT=mask)
    for b in range(3):
        alone = [x[b : b + 1, :, mask[b]] for x in (q, k, v)]
        whole, _ = student(*alone, scale=SCALE)
        torch.testing.assert_close(y[b : b + 1, :, mask[b]], whole)
        assert bool((y[b, :, ~mask[b]] == 0).all())
        for cut in (1, 4, 9):
            prefix, _ = student(*(x[:, :, :cut] for x in alone), scale=SCALE)
            torch.testing.assert_close(prefix, whole[:, :, :cut])


@pytest.mark.parametrize("normalize", ["none", "layer"])
def test_transfer_learns_by_autograd(normalize: Any) -> None:
    student, x, mask = _student(), _inputs(9), _mask(9)
    y = torch.randn(3, HEADS, 9, DIM, dtype=torch.float64)
    target, count = y * mask[:, None, :, None], int(mask.sum()) * HEADS * DIM
    loss = 7.0 * (_loop(student, *x, mask) - target).square().sum() / count
    loss = loss / (target.square().sum() / count) if normalize == "layer" else loss
    wanted = torch.autograd.grad(loss, list(student.parameters()))
    student.request = TransferRequest(mse_weight=7.0, normalize=normalize)
    with torch.no_grad():
        student.transfer(*x, y, scale=SCALE, mask_BT=mask)
    torch.testing.assert_close(student.metrics["loss"], loss.detach())
    for p, want in zip(student.parameters(), wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, want)
    student.request = TransferRequest(xent_weight=1.0)
    with pytest.raises(ValueError, match=r"transfer\.xent_weight=0"):
        student.transfer(*x, y, scale=SCALE)


def test_a_named_implementation_is_refused() -> None:
    student = build_student(StudentConfig(name="decay", impl="triton"), num_heads=HEADS, num_kv_heads=KV, head_dim=DIM)
    with pytest.raises(ValueError, match=r"student\.impl is triton.*use auto"):
        student.implementation(torch.float32, torch.device("cpu"))


def test_generation_uses_its_state_and_beam_search_reorders_it() -> None:
    model = tiny_model()
    attach_students(model, CFG)
    set_mode(model, "student")
    ids = tokens(2, 11)
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        fixed: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        found = [model.generate(ids, use_cache=cached, **fixed, **options) for cached in (True, False)]
        assert torch.equal(*found)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert all(isinstance(layer.state, DecayState) for layer in cache.layers)


def test_adapters_merged_models_and_saved_states_keep_it(
    tiny_model_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = ModelConfig(path=str(tiny_model_dir), device="cpu", dtype="float32")
    model, _ = load_model(base)
    attach_students(model, CFG)
    set_mode(model, "student")
    with torch.no_grad():
        for student in students_of(model).values():
            for p in student.parameters():
                p.add_(0.1 * torch.randn_like(p))
    ids = tokens(2, 30)
    wanted = logits(model, ids)
    trenchcoat.save_adapter(model, tmp_path / "adapter", base=base)
    trenchcoat.save_merged(model, tmp_path / "merged", tokenizer=tokenizer)
    for folder in ("adapter", "merged"):
        loaded, _ = trenchcoat.load(tmp_path / folder, device="cpu")
        assert torch.equal(logits(loaded, ids), wanted)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    trenchcoat.save_state(tmp_path / "state", model, cache)
    again, _ = trenchcoat.load_state(tmp_path / "state", model)
    one = tokens(2, 1)
    found = [model(input_ids=one, past_key_values=c, use_cache=True).logits for c in (cache, again)]
    assert torch.equal(*found)


def test_linearize_trains_it_in_both_stages(tiny_overrides: list[str]) -> None:
    folder = Path(tiny_overrides[-1].removeprefix("run.dir="))
    more = ["student.name=decay", "transfer.max_steps=2", "lora.max_steps=2", "eval.baselines=false"]
    more += ["student.feature_map.init=kaiming", "data.seq_len=24"]
    assert cli.main(["linearize", "demo", *tiny_overrides, *more]) == 0
    assert json.loads((folder / "environment.json").read_text())["implementation"] == "pytorch"
    assert "decay" in (folder / "recipe.yaml").read_text()
    student = build_student(CFG, num_heads=4, num_kv_heads=2, head_dim=8)
    model, _ = trenchcoat.load(folder / "adapter", device="cpu")
    for learned in students_of(model).values():
        assert isinstance(learned, DecayAttention)
        assert not torch.equal(learned.decay_K, student.decay_K)  # type: ignore[arg-type]


def test_the_plan_names_the_size_of_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = shapes_of(find_config("meta-llama/Llama-3.1-405B"))
    far, window = state_bytes(shapes, StudentConfig(name="decay", key_maps="per_kv_head"))
    assert (far, window) == (4 * 126 * 8 * 128 * (128 + 1), 0)
    settings = ["student.name=decay", "student.key_maps=per_kv_head"]
    assert cli.main(["plan", "lolcats_llama3_1_405b", *settings, "--details"]) == 0
    assert f"{far / 2**30:.3g} GiB" in capsys.readouterr().out

"""Scores agree with plain Python on small rows; probes match their definition; cache sizes are exact."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from conftest import tiny_llama_config
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.evaluation.scoring import EvalRows, cache_bytes, decode_curve, gather_rows, recall_probes, score
from trenchcoat.models.attach import attach_students, set_mode

VOCAB = 97


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = tiny_llama_config(
        vocab_size=VOCAB, intermediate_size=48, max_position_embeddings=256, tie_word_embeddings=False,
        initializer_range=0.02,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def student(llama: LlamaForCausalLM) -> LlamaForCausalLM:
    model = copy.deepcopy(llama)
    attach_students(model, StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=8)))
    set_mode(model, "student")
    return model


def random_rows(rows: int, length: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, side: str, pads: list[int]) -> dict[str, Tensor]:
    """A batch whose row i keeps its first ``T - pads[i]`` tokens, padded on ``side``."""
    length = ids.shape[1]
    rows, masks = [], []
    for row, pad in zip(ids, pads, strict=True):
        filler, zeros, ones = torch.full((pad,), 2), torch.zeros(pad, dtype=torch.long), torch.ones(length - pad).long()
        kept = row[: length - pad]
        rows.append(torch.cat([filler, kept] if side == "left" else [kept, filler]))
        masks.append(torch.cat([zeros, ones] if side == "left" else [ones, zeros]))
    mask = torch.stack(masks)
    batch = {"input_ids": torch.stack(rows), "attention_mask": mask}
    return batch | {"labels": torch.where(mask.bool(), batch["input_ids"], -100)}


def plain_losses(model: LlamaForCausalLM, row: Tensor) -> Tensor:
    """[T] -> [T - 1] next-token losses, one row alone."""
    with torch.no_grad():
        logits = model(row[None]).logits[0, :-1]
    return F.cross_entropy(logits.double(), row[1:], reduction="none")


def plain_probes(ids: list[list[int]], window: int) -> set[tuple[int, int]]:
    """The three conditions of ``recall_probes``, literally."""
    found = set()
    triples = [{tuple(row[i : i + 3]) for i in range(len(row) - 2)} for row in ids]
    for r, row in enumerate(ids):
        for n in range(1, len(row) - 1):
            wanted = tuple(row[n - 1 : n + 2])
            said_before = any(tuple(row[j - 1 : j + 2]) == wanted for j in range(1, n) if j + 1 <= n - 2 * window)
            near = row[max(0, n - 2 * window + 1) : n + 1]
            elsewhere = any(wanted in other for o, other in enumerate(triples) if o != r)
            if said_before and row[n + 1] not in near and not elsewhere:
                found.add((r, n + 1))
    return found


def test_losses_agree_with_one_row_at_a_time(llama: LlamaForCausalLM) -> None:
    ids = random_rows(5, 40)
    scores = score(llama, ids, window=8, batch_size=2)
    expected = torch.stack([plain_losses(llama, row) for row in ids])
    assert scores.all.count == 5 * 39
    assert scores.all.mean == pytest.approx(expected.mean().item(), abs=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(expected.mean().item()), rel=1e-6)
    torch.testing.assert_close(torch.tensor(scores.position_loss), expected.mean(0).float(), atol=1e-5, rtol=0)
    assert scores.position_count == [5] * 39
    torch.testing.assert_close(torch.tensor(scores.all.sums), expected.sum(1).float(), atol=1e-4, rtol=0)


def test_past_two_windows_starts_where_a_token_is_out_of_the_window(llama: LlamaForCausalLM) -> None:
    ids = random_rows(3, 40)
    scores = score(llama, ids, window=8)
    expected = torch.stack([plain_losses(llama, row) for row in ids])[:, 16:]  # query 16 is the first with 17 tokens
    assert scores.far.count == 3 * 23
    assert scores.far.mean == pytest.approx(expected.mean().item(), abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_on_either_side(llama: LlamaForCausalLM, side: str) -> None:
    ids, pads = random_rows(3, 40), [0, 7, 31]
    scores = score(llama, [padded(ids, side, pads)], window=4, batch_size=2)
    alone = [plain_losses(llama, row[: 40 - pad]) for row, pad in zip(ids, pads, strict=True)]
    assert scores.all.counts == [39, 32, 8]
    for found, expected in zip(scores.all.sums, alone, strict=True):
        assert found == pytest.approx(expected.sum().item(), abs=1e-4)
    assert scores.far.counts == [31, 24, 0]
    assert scores.position_count[0] == 3
    assert scores.position_count[-1] == 1
    assert scores.position_loss[0] == pytest.approx(sum(row[0].item() for row in alone) / 3, abs=1e-5)


def test_masked_labels_do_not_count(llama: LlamaForCausalLM) -> None:
    ids = random_rows(2, 30)
    labels = ids.clone()
    labels[:, :10] = -100
    scores = score(llama, [{"input_ids": ids, "labels": labels}], window=4)
    expected = torch.stack([plain_losses(llama, row) for row in ids])[:, 9:]
    assert scores.all.count == 40
    assert scores.all.mean == pytest.approx(expected.mean().item(), abs=1e-6)
    assert all(math.isnan(loss) for loss in scores.position_loss[:9])


def test_batches_of_different_lengths_are_one_text(llama: LlamaForCausalLM) -> None:
    long, short = random_rows(2, 40), random_rows(2, 25, seed=1)
    scores = score(
        llama, [{"input_ids": long}, {"input_ids": short, "attention_mask": torch.ones_like(short)}], window=4
    )
    assert scores.all.counts == [39, 39, 24, 24]


def test_the_models_mode_is_restored(llama: LlamaForCausalLM) -> None:
    llama.train()
    score(llama, random_rows(1, 12), window=2)
    assert llama.training
    llama.eval()


@pytest.mark.parametrize(("rows", "match"), [
    ([], "no rows"),
    (torch.zeros(0, 8, dtype=torch.long), "no rows"),
    (torch.zeros(3, 1, dtype=torch.long), "no token counts"),
])  # fmt: skip
def test_nothing_to_score_is_an_error(llama: LlamaForCausalLM, rows: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        score(llama, rows, window=4)


def test_a_bad_window_is_an_error(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="window=0"):
        score(llama, random_rows(1, 8), window=0)


def test_probe_on_a_row_made_by_hand() -> None:
    name = [7, 8, 9]
    row = torch.tensor([[*name, *range(20, 32), *name]])
    found = recall_probes(gather_rows(row), window=4).nonzero().tolist()
    assert found == [[0, 17]]  # the last token of the name, whose three tokens occurred 15 tokens earlier
    assert not recall_probes(gather_rows(row), window=8).any()  # there it is within the last 16 tokens


def test_probe_token_must_be_outside_the_window() -> None:
    row = torch.tensor([[7, 8, 9, *range(20, 30), 9, 31, 7, 8, 9]])
    assert not recall_probes(gather_rows(row), window=4).any()


def test_probe_excludes_text_of_other_rows() -> None:
    with_name = [7, 8, 9, *range(20, 32), 7, 8, 9]
    assert not recall_probes(gather_rows(torch.tensor([with_name, [7, 8, 9, *range(40, 55)]])), window=4).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 5), st.integers(1, 3), st.integers(3, 40))
def test_probes_agree_with_the_definition(seed: int, rows: int, vocab: int, window: int, length: int) -> None:
    ids = random_rows(rows, length, vocab, seed) * 3 + 5
    found = {(r, p) for r, p in recall_probes(gather_rows(ids), window).nonzero().tolist()}
    assert found == plain_probes(ids.tolist(), window)


def test_probes_agree_with_the_definition_on_many_tokens() -> None:
    ids = random_rows(3, 400, 12)
    expected = plain_probes(ids.tolist(), 10)
    assert len(expected) > 10
    assert {tuple(x) for x in recall_probes(gather_rows(ids), 10).nonzero().tolist()} == expected


def test_probes_ignore_padding_and_masked_labels() -> None:
    name = [7, 8, 9]
    row = torch.tensor([*name, *range(20, 32), *name])
    batch = padded(torch.stack([torch.cat([row, row[:4]])]), "left", [4])
    assert recall_probes(gather_rows([batch]), window=4).nonzero().tolist() == [[0, 17]]
    labels = row[None].clone()
    labels[0, 17] = -100
    assert not recall_probes(gather_rows([{"input_ids": row[None], "labels": labels}]), window=4).any()


class Copier(nn.Module):
    """Predicts what followed the last occurrence of the current two tokens among the ``sight`` newest tokens."""

    def __init__(self, sight: int) -> None:
        super().__init__()
        self.sight, self.weight = sight, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for r, row in enumerate(input_ids.tolist()):
            for n in range(1, len(row)):
                for j in range(n - 1, max(0, n - self.sight + 1), -1):
                    if row[j - 1 : j + 1] == row[n - 1 : n + 1]:
                        logits[r, n, row[j + 1]] = 9.0
                        break
        return CausalLMOutput(logits=logits)


def test_a_model_that_sees_only_the_window_fails_the_probe() -> None:
    text = random_rows(4, 60, 40, seed=3) + 1  # the copier predicts token 0 if it finds nothing
    ids = torch.cat([text, random_rows(4, 30, 40, seed=4) + 50, text], dim=1)
    near, far = (score(Copier(sight), ids, window=8) for sight in (16, 10_000))
    assert near.recall.count == far.recall.count > 100
    assert sum(near.recall_hits.sums) == 0
    assert far.recall_hits.mean > 0.9
    assert far.recall.mean < near.recall.mean - 2


def test_cache_bytes_counts_each_storage_once_and_whole() -> None:
    base = torch.zeros(100, dtype=torch.float32)
    assert cache_bytes({"a": base, "b": [base[:3], base.view(10, 10)]}) == 400
    assert cache_bytes(None) == 0


def test_teacher_cache_grows_with_the_context(llama: LlamaForCausalLM) -> None:
    points = decode_curve(llama, (16, 64), steps=3, warmup=1)
    layers, kv_heads, head_dim, floats = 2, 2, 8, 4
    assert [p.cache_bytes for p in points] == [2 * layers * kv_heads * head_dim * floats * n for n in (16, 64)]
    assert [p.context for p in points] == [16, 64]
    for point in points:
        assert 0 < point.ms_quartiles[0] <= point.ms_per_token <= point.ms_quartiles[1]
        assert point.prefill_ms > 0
        assert point.ms_mean > 0


def test_the_students_cache_does_not_grow(student: LlamaForCausalLM) -> None:
    points = decode_curve(student, (3, 16, 64), steps=2, warmup=1)
    assert len({point.cache_bytes for point in points}) == 1


def test_a_student_is_scored_alike_in_any_batch_and_padding(student: LlamaForCausalLM) -> None:
    ids, pads = random_rows(3, 40), [0, 7, 21]
    alone = [score(student, row[None, : 40 - pad], window=4).all.sums[0] for row, pad in zip(ids, pads, strict=True)]
    for side in ("left", "right"):
        together = score(student, [padded(ids, side, pads)], window=4, batch_size=3).all.sums
        assert together == pytest.approx(alone, abs=1e-3)


def test_decode_curve_refuses_a_length_of_zero(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"lengths=\(0, 4\)"):
        decode_curve(llama, (0, 4))


def test_rows_already_gathered_are_taken_as_they_are(llama: LlamaForCausalLM) -> None:
    rows = gather_rows(random_rows(2, 20))
    assert isinstance(rows, EvalRows)
    assert score(llama, rows, window=2).all.sums == score(llama, rows.ids, window=2).all.sums

"""Stage 2's losses: the divergence and its gradients equal a dense float64 computation; padding counts for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_families import FAMILIES, tiny_model, tokens
from training_kit import STUDENT, RandomBatches, lora_settings, start_lora, tiny_llama
from trenchcoat.config import LoraConfig
from trenchcoat.models.attach import attach_students, mode_of, set_mode
from trenchcoat.models.lora import add_lora, lora_parameters
from trenchcoat.models.stage2 import as_teacher
from trenchcoat.runtime import head
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.training.logits import own_teacher
from trenchcoat.training.losses import OBJECTIVES
from trenchcoat.training.objectives import IDLE, Objective, stage_2_objective

LOSSES = {"kl": 1.0, "mix": 0.7, "ce": 0.0}
TEACHER = own_teacher(as_teacher)


def objective(loss: str) -> Objective:
    return stage_2_objective(LoraConfig(loss=loss, kl_weight=0.7), TEACHER)


def student_model(family: str = "llama", *, dropout: float = 0.0, **changes: Any) -> nn.Module:
    """In float64, with a LoRA that is not zero."""
    model = tiny_model(family, **changes)
    attach_students(model, STUDENT)
    start_lora(model, lora_settings(dropout=dropout))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model.double()


def padded_batch(rows: int = 2, length: int = 13) -> dict[str, Tensor]:
    """The second row ends in padding, the first row's prompt has no labels."""
    ids = tokens(rows, length)
    mask = torch.ones_like(ids)
    mask[1:, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense(model: Any, batch: Mapping[str, Tensor], kl_weight: float) -> Tensor:
    """The loss by its definition, from two whole tensors of logits."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    with torch.no_grad(), as_teacher(model):
        log_p = model(**inputs).logits.log_softmax(-1)
    log_q = model.train()(**inputs).logits.log_softmax(-1)
    real = batch["attention_mask"] != 0
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[real].mean()
    targets = batch["labels"][:, 1:]
    ce = nn.functional.cross_entropy(log_q[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    return kl_weight * kl + (1 - kl_weight) * ce


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_loss_and_gradients_equal_a_dense_float64_computation(family: str, loss: str) -> None:
    changes = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    model, batch = student_model(family, **changes), padded_batch()
    expected = dense(model, batch, LOSSES[loss])
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    measured = objective(loss)(model, batch)
    assert measured["loss"] == pytest.approx(expected.item(), rel=1e-9)
    assert expected.item() > 0.01
    found = gradients(model)
    assert found.keys() == wanted.keys()
    assert any(".student." in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_from_oneself_is_zero(family: str) -> None:
    """Rows no longer than the window: the student is the teacher, and a new LoRA changes nothing."""
    model = tiny_model(family)
    attach_students(model, STUDENT)
    set_mode(model, "student")
    add_lora(model, LoraConfig(rank=2))
    length = STUDENT.window
    ids = tokens(2, length)
    measured = objective("kl")(model, {"input_ids": ids, "labels": ids})
    assert abs(measured["loss"]) < 1e-6
    assert all(float(gradient.abs().max()) < 1e-5 for gradient in gradients(model).values())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_length_of_a_piece_does_not_matter(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, found = student_model(), padded_batch(), []
    for elements in (1, 5 * 97, 1 << 25):
        monkeypatch.setattr(head, "PIECE_ELEMENTS", elements)
        model.zero_grad()
        found.append((objective(loss)(model, batch), gradients(model)))
    for measured, gradient in found[1:]:
        assert measured == pytest.approx(found[0][0], rel=1e-12)
        for name, one in gradient.items():
            torch.testing.assert_close(one, found[0][1][name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_is_invisible(loss: str) -> None:
    """Loss, gradients and token count are those of the row without its padding, whatever the padding holds."""
    model = student_model()
    batch = {name: tensor[1:] for name, tensor in padded_batch().items()}
    alone = {name: tensor[:, :-4] for name, tensor in batch.items()}
    expected = objective(loss)(model, alone)
    wanted = gradients(model)
    for filler in (3, 50):
        model.zero_grad()
        ids = torch.where(batch["attention_mask"] == 0, filler, batch["input_ids"])
        assert objective(loss)(model, {**batch, "input_ids": ids}) == pytest.approx(expected, rel=1e-9)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-12)


def test_the_prompt_counts_for_the_divergence_only() -> None:
    model, batch = student_model(), padded_batch()
    measured = {loss: objective(loss)(model, batch) for loss in LOSSES}
    assert measured["kl"]["tokens"] == measured["mix"]["tokens"] == float(batch["attention_mask"].sum())
    assert measured["ce"]["tokens"] == float((batch["labels"][:, 1:] != -100).sum())
    mixed = measured["mix"]
    assert mixed["loss"] == pytest.approx(0.7 * mixed["kl"] + 0.3 * mixed["ce"])
    assert mixed["kl"] == pytest.approx(measured["kl"]["loss"])
    assert mixed["ce"] == pytest.approx(measured["ce"]["loss"])


def test_the_teacher_has_no_dropout_and_the_model_is_left_as_it_was() -> None:
    """Modes, training flags and trained parameters are the same afterwards; evaluation leaves no gradients."""
    model, batch = student_model(dropout=0.5), padded_batch()
    with as_teacher(model), torch.no_grad():
        plain = model(input_ids=batch["input_ids"], use_cache=False).logits
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    objective("kl")(model, batch)
    assert model.training
    assert mode_of(model) == "student"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    with torch.no_grad(), as_teacher(model):
        assert torch.equal(model(input_ids=batch["input_ids"], use_cache=False).logits, plain)
    model.zero_grad()
    with torch.no_grad():
        first, second = (objective("kl")(model, batch) for _ in range(2))
    assert first == second
    assert not model.training
    assert not gradients(model)


def test_an_idle_batch_leaves_zeros() -> None:
    model = student_model()
    for loss in OBJECTIVES:
        objective(loss)(model, {**padded_batch(), IDLE: torch.ones(())})
    assert gradients(model)
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_of_the_vocabulary_is_that_of_a_piece(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most six arrays of a piece's logits, so less than the logits of the batch; see `PIECE_ELEMENTS`."""
    vocabulary, length, piece = 20_000, 256, 16
    monkeypatch.setattr(head, "PIECE_ELEMENTS", piece * vocabulary)

    def peak(size: int) -> int:
        model = tiny_llama(vocab_size=size, layers=1)
        attach_students(model, STUDENT)
        start_lora(model, lora_settings(dropout=0.0))
        batch = RandomBatches(tokens=length, rows=1).train_batch(0)
        objective(loss)(model, batch)
        with live_tensor_memory() as memory:
            objective(loss)(model, batch)
        return memory.peak

    bound = 6 * 4 * piece * vocabulary
    assert peak(vocabulary) - peak(61) < bound < 4 * length * vocabulary

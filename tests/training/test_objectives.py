"""Objectives: transfer trains layer by layer with the memory of one layer; the next-token loss matches Transformers."""

from __future__ import annotations

import math

import pytest
import torch

from training_kit import RandomBatches, lora_settings, start_lora, tiny_llama, transfer_model
from trenchcoat.config import FeatureMapConfig, StudentConfig, TransferConfig, UserError
from trenchcoat.models.attach import attach_students, freeze_for_transfer, set_mode
from trenchcoat.models.hub import adapter_state
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.training.objectives import (
    first_nonfinite,
    initialise_from_text,
    next_token_loss,
    next_token_objective,
    transfer_objective,
)

BATCHES = RandomBatches()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_transfer_metrics_and_gradients() -> None:
    model = transfer_model(layers=3)
    batch = BATCHES.train_batch(0)
    training = transfer_objective(TransferConfig())(model, batch)
    with torch.no_grad():
        measured = transfer_objective(TransferConfig())(model, batch)
    assert training.keys() == {"loss", "tokens", "loss/layer_00", "loss/layer_01", "loss/layer_02"}
    assert training["tokens"] == float(batch["attention_mask"].sum())
    assert training["loss"] == pytest.approx(sum(training[f"loss/layer_0{i}"] for i in range(3)) / 3)
    assert training.items() <= measured.items()
    assert measured["mse/layer_01"] * 1000 == pytest.approx(measured["loss/layer_01"], rel=1e-5)
    assert 0 < measured["relative/layer_01"] < 10
    assert gradients(model).keys() == {name for name, _ in model.named_parameters() if ".student." in name}


def test_transfer_measures_without_leaving_gradients() -> None:
    model = transfer_model()
    with torch.no_grad():
        transfer_objective(TransferConfig())(model, BATCHES.train_batch(0))
    assert not gradients(model)


def test_gradients_add_up_over_micro_batches() -> None:
    model = transfer_model()
    objective = transfer_objective(TransferConfig())
    objective(model, BATCHES.train_batch(0))
    first = gradients(model)
    objective(model, BATCHES.train_batch(1))
    both = gradients(model)
    model.zero_grad()
    objective(model, BATCHES.train_batch(1))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(first[name] + gradient, both[name])


def test_the_normalized_loss_is_relative() -> None:
    model = transfer_model()
    with torch.no_grad():
        measured = transfer_objective(TransferConfig(normalize="layer"))(model, BATCHES.train_batch(0))
    assert measured["loss/layer_00"] == pytest.approx(1000 * measured["relative/layer_00"], rel=1e-4)


def test_cross_entropy_is_added_when_its_weight_is_not_zero() -> None:
    model = transfer_model()
    with torch.no_grad():
        measured = transfer_objective(TransferConfig(xent_weight=2.0))(model, BATCHES.train_batch(0))
    assert measured["xent/layer_01"] > 0
    expected = 1000 * measured["mse/layer_01"] + 2 * measured["xent/layer_01"]
    assert measured["loss/layer_01"] == pytest.approx(expected, rel=1e-4)


def test_transfer_does_not_depend_on_padding() -> None:
    """The loss of a padded row equals that of the row without padding; weights are real tokens."""
    model = transfer_model()
    batch = {name: tensor[1:] for name, tensor in BATCHES.train_batch(0).items()}
    alone = {name: tensor[:, :-3] for name, tensor in batch.items()}
    objective = transfer_objective(TransferConfig())
    padded, bare = objective(model, batch), objective(model, alone)
    assert padded == pytest.approx(bare, rel=1e-4)


def test_transfer_needs_layers_in_transfer_mode() -> None:
    model = transfer_model()
    set_mode(model, "teacher")
    with pytest.raises(UserError, match="transfer mode"):
        transfer_objective(TransferConfig())(model, BATCHES.train_batch(0))


def test_a_layer_that_is_not_reached_is_an_error() -> None:
    model = transfer_model()
    model.model.layers = model.model.layers[:1]
    stray = transfer_model().model.layers[1]
    model.add_module("stray", stray)
    with pytest.raises(RuntimeError, match=r"layers \[1\]"):
        transfer_objective(TransferConfig())(model, BATCHES.train_batch(0))


def test_the_head_is_not_run_in_transfer() -> None:
    model = transfer_model()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the vocabulary head ran"))
    transfer_objective(TransferConfig())(model, BATCHES.train_batch(0))


def test_landmarks_come_from_the_text_and_other_maps_are_unchanged() -> None:
    for init, moves in (("landmarks", True), ("kaiming", False)):
        model = tiny_llama()
        attach_students(model, StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=8, init=init)))
        set_mode(model, "transfer")
        before = adapter_state(model)
        before = {name: tensor.clone() for name, tensor in before.items()}
        initialise_from_text(model, BATCHES.train_batch(0))
        for name, tensor in adapter_state(model).items():
            assert torch.equal(tensor, before[name]) != (moves and name.endswith("weight")), name
        assert not gradients(model)


@pytest.mark.parametrize("xent", [0.0, 1.0])
def test_step_memory_does_not_grow_with_depth(xent: float) -> None:
    """Live bytes beyond parameters and the students' gradients are those of one layer at any depth."""

    def peak(layers: int) -> int:
        model = tiny_llama(layers=layers, hidden_size=64, head_dim=16)
        attach_students(model, StudentConfig(window=16, feature_map=FeatureMapConfig(feature_dim=16)))
        parameters = freeze_for_transfer(model)
        set_mode(model, "transfer")
        batch = RandomBatches(tokens=256).train_batch(0)
        objective = transfer_objective(TransferConfig(xent_weight=xent))
        objective(model, batch)
        with live_tensor_memory() as memory:
            objective(model, batch)
        assert all(p.grad is not None for p in parameters)
        return memory.peak

    shallow, deep = peak(4), peak(16)
    assert shallow > 100_000
    assert deep <= 1.1 * shallow


def test_next_token_loss_matches_transformers() -> None:
    model, batch = tiny_llama(), BATCHES.train_batch(0)
    batch["labels"][:, :5] = -100
    expected = model(**batch).loss
    with torch.no_grad():
        measured = next_token_objective()(model, batch)
    assert measured["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert measured["tokens"] == float((batch["labels"][:, 1:] != -100).sum())


def test_all_masked_labels_give_zero_loss() -> None:
    loss, count = next_token_loss(torch.randn(1, 4, 7), torch.full((1, 4), -100))
    assert (loss.item(), count) == (0.0, 0)


def test_next_token_trains_what_requires_gradients() -> None:
    model = transfer_model()
    start_lora(model, lora_settings(dropout=0.0, train_feature_maps=False))
    next_token_objective()(model, BATCHES.train_batch(0))
    assert gradients(model).keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert model.training
    with torch.no_grad():
        next_token_objective()(model, BATCHES.train_batch(0))
    assert not model.training


def test_the_first_nonfinite_module_is_named() -> None:
    model, batch = tiny_llama(layers=3), BATCHES.train_batch(0)
    objective = next_token_objective()
    with torch.no_grad():
        assert first_nonfinite(model, objective, batch) is None
        handle = model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * math.inf)
        assert first_nonfinite(model, objective, batch) == "model.layers.1.mlp"
        handle.remove()
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
        assert first_nonfinite(model, objective, batch) == "model.layers.2.mlp.up_proj.weight"

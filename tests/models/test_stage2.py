"""What stage 2 trains: LoRA on attention and MLP, the mixers alone, every weight; and how the base comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import save_tiny_model
from tiny_families import FAMILIES, make, tiny_model, tokens
from trenchcoat.config import LoraConfig, ModelConfig, StudentConfig, UserError
from trenchcoat.config.recipe_io import recipe_from_dict
from trenchcoat.models.attach import attach_students, students_of
from trenchcoat.models.families import attention_sites, linear_layers
from trenchcoat.models.hub import adapter_state, load, load_adapter_state, save_adapter
from trenchcoat.models.identity import base_tensors, fingerprint
from trenchcoat.models.loading import load_model
from trenchcoat.models.lora import add_lora, lora_parameters
from trenchcoat.models.shapes import shapes_of
from trenchcoat.models.stage2 import as_teacher, begin_stage_2, end_stage_2, freeze_for_stage_2
from trenchcoat.training.logits import own_teacher
from trenchcoat.training.objectives import stage_2_objective

MLP = ("q_proj", "gate_proj", "up_proj", "down_proj")
MIXTURES = {"mixtral", "gpt_oss"}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def started(train: str, model: Any = None, **settings: Any) -> tuple[Any, LoraConfig]:
    model, cfg = make() if model is None else model, LoraConfig(train=train, rank=2, **settings)
    begin_stage_2(model, cfg)
    freeze_for_stage_2(model, cfg)
    return model, cfg


def stepped(model: Any, cfg: LoraConfig, ids: Tensor) -> float:
    """One step of plain gradient descent; the loss before it."""
    loss = stage_2_objective(cfg, own_teacher(as_teacher))(model, {"input_ids": ids, "labels": ids})["loss"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.zero_grad()
    return loss


def test_each_choice_trains_what_it_names() -> None:
    own = {name for name, _ in make().named_parameters() if ".student." in name}
    base = set(base_tensors(make()))
    assert trained(started("mixer")[0]) == own
    assert trained(started("all")[0]) == own | base
    assert trained(started("all", train_feature_maps=False)[0]) == base
    model = started("lora")[0]
    assert trained(model) == own | {name for name, _ in model.named_parameters() if "lora_" in name}
    with pytest.raises(UserError, match="leaves nothing to train"):
        LoraConfig(train="mixer", train_feature_maps=False).check("lora")


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_the_mlp(family: str) -> None:
    model = tiny_model(family)
    cfg = LoraConfig(rank=3, targets=MLP)
    if family in MIXTURES:
        for refused in (lambda: add_lora(model, cfg), lambda: shapes_of(model.config).lora_layers(cfg)):
            with pytest.raises(UserError, match=r"'down_proj', which .*the experts of a mixture take no LoRA"):
                refused()
        return
    paths = add_lora(model, cfg)
    assert any(path.endswith("mlp.down_proj") for path in paths)
    names = {path.rpartition(".")[2] for path in paths}
    assert names in ({*MLP}, {"qkv_proj", "gate_up_proj", "down_proj"}, {"q_proj", "gate_up_proj", "down_proj"})
    assert shapes_of(model.config).lora_parameters(cfg) == sum(p.numel() for p in lora_parameters(model).values())


def test_linear_layers_are_those_of_one_layer() -> None:
    model = tiny_model()
    found = linear_layers(model, attention_sites(model)[1])
    assert list(found) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert found["up_proj"][0] == "model.layers.1.mlp.up_proj"
    assert found["up_proj"][1] is model.model.layers[1].mlp.up_proj


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_trained_in_float32_and_put_back(tied: bool, dtype: torch.dtype) -> None:
    """The teacher stays what it was while the weights move, and the model is as before at the end."""
    model = make(tie_word_embeddings=tied).to(dtype)
    for student in students_of(model).values():
        student.float()
    ids = tokens(2, 13)
    before = {name: p.detach().clone() for name, p in base_tensors(model).items()}
    mark = fingerprint(model)
    with torch.no_grad(), as_teacher(model):
        expected = model(input_ids=ids, use_cache=False).logits
    model, cfg = started("all", model)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    losses = [stepped(model, cfg, ids) for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(model.get_output_embeddings().weight, before["model.embed_tokens.weight"])
    with torch.no_grad(), as_teacher(model):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=0)
    assert fingerprint(model) == mark
    end_stage_2(model)
    assert all(torch.equal(p, before[name]) for name, p in base_tensors(model).items())
    assert not trained(model)
    assert fingerprint(model) == mark
    end_stage_2(model)  # nothing to do


def test_the_gradients_of_every_weight_are_those_of_a_dense_computation() -> None:
    """A tied head gets both of its gradients, with another model as the teacher."""
    model, cfg = started("all", make(tie_word_embeddings=True))
    ids = tokens(2, 13)
    with torch.no_grad(), as_teacher(model):
        log_p = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    with torch.no_grad():
        for parameter in base_tensors(model).values():
            parameter.mul_(1.05)
    log_q = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    stage_2_objective(cfg, own_teacher(as_teacher))(model, {"input_ids": ids, "labels": ids})
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() >= {"model.embed_tokens.weight", "model.norm.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


def test_an_adapter_of_every_weight_is_saved_and_loaded(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", seed=0)
    base = ModelConfig(path=str(tmp_path / "base"), device="cpu")
    model, _ = load_model(base)
    attach_students(model, StudentConfig(window=4))
    model, cfg = started("all", model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_adapter(model, tmp_path / "adapter", base=base, lora=cfg)
    found, _ = load(tmp_path / "adapter", device="cpu")
    assert adapter_state(found).keys() == {name for name, _ in found.named_parameters()}
    for name, tensor in adapter_state(found).items():
        assert torch.equal(tensor, adapter_state(model)[name]), name
    save_adapter(found, tmp_path / "again")
    again, _ = load(tmp_path / "again", device="cpu")
    assert all(torch.equal(t, adapter_state(found)[name]) for name, t in adapter_state(again).items())
    end_stage_2(model)
    with pytest.raises(UserError, match="does not belong to this model"):
        load_adapter_state(model, adapter_state(found))


def test_four_bit_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.train=all cannot train the 4-bit weights"):
        recipe_from_dict({"model": {"quantize": "nf4"}, "lora": {"train": "all"}})

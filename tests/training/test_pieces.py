"""Stage 2 on rows read in pieces: the loss is that of whole rows, and gradients end where a piece begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_families import tokens
from training_kit import VOCABULARY, lora_settings, start_lora, tiny_llama
from trenchcoat.config import FeatureMapConfig, LoraConfig, StudentConfig, UserError
from trenchcoat.models.attach import attach_students
from trenchcoat.models.cache import detach_cache, new_cache
from trenchcoat.models.lora import lora_parameters
from trenchcoat.models.stage2 import as_teacher
from trenchcoat.training.logits import own_teacher
from trenchcoat.training.objectives import Objective, stage_2_objective

STUDENTS = ("terrace", "sliding", "linear", "terrace_gated", "gdn", "kda", "lightning", "window_sinks")
LOSSES = {"kl": 1.0, "mix": 0.7, "ce": 0.0}
LENGTH = 23


def objective(loss: str, piece_len: int | None) -> Objective:
    return stage_2_objective(LoraConfig(loss=loss, kl_weight=0.7, piece_len=piece_len), own_teacher(as_teacher))


def student_model(name: str = "terrace", **changes: Any) -> nn.Module:
    """Three layers with a LoRA that is not zero: of layer 0 a group is kept, layer 2 is kept."""
    model = tiny_llama(layers=3)
    maps = (
        {} if name in ("window_sinks", "gdn", "kda", "lightning") else {"feature_map": FeatureMapConfig(feature_dim=8)}
    )
    window = {} if name == "linear" else {"window": 4}
    attach_students(model, StudentConfig(name=name, keep=("0.1",), keep_softmax=(2,), **window, **maps, **changes))
    start_lora(model, lora_settings(dropout=0.0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model.double()


def batch() -> dict[str, Tensor]:
    """The second row ends in padding, which is longer than a piece of 5."""
    ids = tokens(2, LENGTH) % VOCABULARY
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", STUDENTS)
def test_the_loss_is_that_of_whole_rows(name: str) -> None:
    model = student_model(name)
    with torch.no_grad():
        expected = objective("mix", None)(model, batch())
        for length in (2, 5, 9, LENGTH):
            assert objective("mix", length)(model, batch()) == pytest.approx(expected, rel=1e-6)
    learning = objective("mix", 5)(model, batch())
    assert learning == pytest.approx(expected, rel=1e-6)


def test_one_piece_is_the_whole_row() -> None:
    model = student_model()
    objective("kl", None)(model, batch())
    expected = gradients(model)
    model.zero_grad()
    objective("kl", LENGTH)(model, batch())
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


def pieces(model: Any, given: dict[str, Tensor], length: int) -> Iterator[Tensor]:
    """The logits of each piece, [b, n, V]; whatever came before was computed without gradients."""
    for start in range(0, LENGTH, length):
        cache = new_cache(model)
        mask = given["attention_mask"]
        if start:
            with torch.no_grad():
                model(input_ids=given["input_ids"][:, :start], attention_mask=mask[:, :start], past_key_values=cache)
        stop = start + length
        rest = {"input_ids": given["input_ids"][:, start:stop], "attention_mask": mask[:, :stop]}
        yield model(**rest, past_key_values=cache).logits


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["terrace", "terrace_gated", "gdn", "kda"])
def test_gradients_end_where_a_piece_begins(name: str, loss: str) -> None:
    """They equal those of a dense loss over the logits of each piece after a past that was computed without them."""
    model, given, length = student_model(name), batch(), 9
    kl_weight = LOSSES[loss]
    with torch.no_grad(), as_teacher(model):
        log_p = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False)
        log_p = log_p.logits.log_softmax(-1)
    log_q = torch.cat(list(pieces(model.train(), given, length)), 1).log_softmax(-1)
    real = given["attention_mask"] != 0
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[real].mean()
    targets = given["labels"][:, 1:].flatten()
    ce = nn.functional.cross_entropy(log_q[:, :-1].flatten(0, 1), targets, ignore_index=-100)
    expected = kl_weight * kl + (1 - kl_weight) * ce
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    found = objective(loss, length)(model, given)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for parameter, gradient in gradients(model).items():  # the delta rule is computed in float32
        rounding = float(wanted[parameter].abs().max()) * {"gdn": 2.0**-20, "kda": 2.0**-18}.get(name, 2.0**-30)
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-5, atol=rounding)
    model.zero_grad()
    objective(loss, None)(model, given)
    whole = gradients(model)
    assert any(not torch.allclose(wanted[name], whole[name], rtol=1e-3) for name in wanted)


def test_a_detached_cache_holds_the_same_numbers_without_their_graph() -> None:
    model: Any = student_model()
    cache, given = new_cache(model), batch()
    model.train()(input_ids=given["input_ids"], past_key_values=cache)
    held = [t for layer in cache.layers[:2] for t in layer.state.tensors().values()]
    held += [cache.layers[0].kept.keys, cache.layers[0].kept.values, cache.layers[2].keys, cache.layers[2].values]
    assert any(t.requires_grad for t in held)
    detach_cache(cache)
    after = [t for layer in cache.layers[:2] for t in layer.state.tensors().values()]
    after += [cache.layers[0].kept.keys, cache.layers[0].kept.values, cache.layers[2].keys, cache.layers[2].values]
    for old, new in zip(held, after, strict=True):
        assert torch.equal(old, new)
        assert not new.requires_grad


def test_pieces_and_recomputed_activations_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"lora\.piece_len=64 with lora\.gradient_checkpointing=true.*Remove"):
        LoraConfig(piece_len=64, gradient_checkpointing=True).check("lora")

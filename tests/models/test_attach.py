"""Attaching and removing students and LoRA; modes; what is trainable; layer-local learning; clear refusals."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_families import logits, tiny_model, tokens
from trenchcoat.config import FeatureMapConfig, LoraConfig, StudentConfig, UserError
from trenchcoat.models.attach import (
    attach_students,
    detach_students,
    freeze_for_transfer,
    mode_of,
    replace_students,
    set_far,
    set_mode,
    student_config,
    students_of,
    teacher_implementation,
)
from trenchcoat.models.hub import adapter_state, load_adapter_state
from trenchcoat.models.interface import LazyMask
from trenchcoat.models.lora import add_lora, freeze_for_lora, has_lora, merge_lora, merged_state, remove_lora
from trenchcoat.students import TransferRequest

SMALL = StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=6))
LORA = LoraConfig(rank=2, alpha=4.0, train_feature_maps=False)


def make(family: str = "llama", cfg: StudentConfig = SMALL, **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    attach_students(model, cfg)
    return model


def disturb(model: Any) -> None:
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# Attaching


def test_attach_and_detach_leave_the_model_as_it_was() -> None:
    model, ids = tiny_model(), tokens(2, 20)
    before, keys = logits(model, ids), list(model.state_dict())
    students = attach_students(model, SMALL)
    assert list(students) == [0, 1]
    assert list(students_of(model)) == [0, 1]
    assert model.model.layers[1].self_attn.student is students[1]
    assert mode_of(model) == "teacher"
    assert student_config(model) == SMALL
    assert teacher_implementation(model) == "sdpa"
    assert {p.dtype for s in students.values() for p in s.parameters()} == {torch.float32}
    set_mode(model, "student")
    detach_students(model)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())
    assert torch.equal(logits(model, ids), before)


def test_students_of_a_bfloat16_model_are_float32() -> None:
    model = tiny_model().to(torch.bfloat16)
    attach_students(model, SMALL)
    set_mode(model, "transfer")
    freeze_for_transfer(model)
    logits(model, tokens(2, 20))
    for student in students_of(model).values():
        assert all(p.dtype == torch.float32 and p.grad is not None for p in student.parameters())
    set_mode(model, "student")
    assert logits(model, tokens(2, 20)).dtype == torch.bfloat16


@pytest.mark.parametrize("kept", [(), ("0.1",)])
@pytest.mark.parametrize("mode", ["student", "transfer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_students_stay_float32_when_the_model_is_cast(dtype: torch.dtype, mode: Any, kept: tuple[str, ...]) -> None:
    cfg = StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=6), keep=kept)
    cast, made = tiny_model("llama"), tiny_model("llama").to(dtype)
    for model in (cast, made):
        torch.manual_seed(0)
        attach_students(model, cfg)
        set_mode(model, mode)
    cast.to(dtype)
    assert {p.dtype for student in students_of(cast).values() for p in student.parameters()} == {torch.float32}
    ids = tokens(2, 40)
    for model in (cast, made):
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        given = {"labels": ids} if mode == "student" else {}
        out = model(input_ids=ids, use_cache=False, **given)
        (out.loss if given else out.logits.float().mean()).backward()
    with torch.no_grad():
        scored, expected = (model(input_ids=ids, use_cache=False).logits for model in (cast, made))
    torch.testing.assert_close(scored, expected, rtol=0, atol=0)
    double = tiny_model("llama")
    attach_students(double, cfg)
    assert {p.dtype for p in double.double().parameters()} == {torch.float64}


def test_replacing_students_keeps_the_mode() -> None:
    model = make()
    set_mode(model, "student")
    fresh = replace_students(model, StudentConfig(name="window_sinks", window=4, sinks=2))
    assert mode_of(model) == "student"
    assert all(type(s).__name__ == "WindowSinksAttention" for s in fresh.values())
    ids = tokens(1, 30)
    far = logits(model, ids)
    set_far(model, False)
    assert torch.equal(logits(model, ids), far)


def test_the_far_part_can_be_switched_off() -> None:
    model, ids = make(), tokens(1, 30)
    set_mode(model, "student")
    both = logits(model, ids)
    set_far(model, False)
    window = logits(model, ids)
    torch.testing.assert_close(window[:, :8], both[:, :8], rtol=0, atol=5e-5)
    assert (window - both)[:, 8:].abs().max() > 1e-3
    set_far(model, True)
    assert torch.equal(logits(model, ids), both)


def test_a_deep_copy_is_independent() -> None:
    model, ids = make(), tokens(1, 20)
    set_mode(model, "student")
    before = logits(model, ids)
    twin = copy.deepcopy(model)
    set_mode(twin, "teacher")
    disturb(twin)
    assert torch.equal(logits(model, ids), before)
    assert mode_of(model) == "student"


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (StudentConfig(keep_softmax=(2,)), r"layer 2, but the model's layers are 0\.\.1"),
        (StudentConfig(keep_softmax=(-1,)), "layer -1"),
        (StudentConfig(keep_softmax=(0, 1)), "names all 2 layers"),
        (StudentConfig(window=0), "window is 0"),
        (StudentConfig(name="terrase"), "did you mean 'terrace'"),
        (StudentConfig(feature_map=FeatureMapConfig(name="relu2")), "relu2"),  # type: ignore[arg-type]
        (StudentConfig(feature_map=FeatureMapConfig(skip=True)), "skip"),
    ],
)
def test_settings_that_do_not_fit_change_nothing(cfg: StudentConfig, message: str) -> None:
    model = tiny_model()
    keys = list(model.state_dict())
    with pytest.raises(UserError, match=message):
        attach_students(model, cfg)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_attaching_twice_is_an_error() -> None:
    model = make()
    with pytest.raises(UserError, match="replace_students"):
        attach_students(model, SMALL)


# Modes


def test_modes_need_students_and_a_known_name() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="needs students"):
        set_mode(model, "student")
    with pytest.raises(UserError, match="no students"):
        student_config(model)
    attach_students(model, SMALL)
    with pytest.raises(UserError, match="'linear'"):
        set_mode(model, "linear")  # type: ignore[arg-type]


def test_changing_the_attention_implementation_is_an_error() -> None:
    model = make()
    set_mode(model, "student")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="changed to 'eager'"):
        logits(model, tokens(1, 5))


@pytest.mark.parametrize("mode", ["transfer", "student"])
def test_masks_that_students_do_not_support_are_errors(mode: Any) -> None:
    model, ids = make(), tokens(1, 8)
    set_mode(model, mode)
    restarting = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="packed sequences"):
        logits(model, ids, position_ids=restarting)
    square = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="2-D attention_mask"):
        logits(model, ids, attention_mask=square)


def test_a_mask_object_is_made_once_per_pattern() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    lazy = LazyMask({"attention_mask": mask, "q_length": 3})
    assert lazy.padding(3).tolist() == mask.bool().tolist()
    assert lazy.padding(2) is None


# Layer-local learning


def test_transfer_learns_in_every_layer_and_keeps_no_graph() -> None:
    model, ids = make(), tokens(2, 24)
    parameters = freeze_for_transfer(model)
    set_mode(model, "transfer")
    with torch.no_grad():
        out = model(ids, use_cache=False).logits
    assert out.grad_fn is None
    assert trainable(model) == {n for n, _ in model.named_parameters() if ".student." in n}
    assert len(parameters) == len(trainable(model))
    first = [p.grad.clone() for p in parameters]
    assert all(g.abs().max() > 0 for g in first)
    logits(model, ids)
    for parameter, gradient in zip(parameters, first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_a_request_without_backward_only_measures() -> None:
    model = make()
    freeze_for_transfer(model)
    set_mode(model, "transfer")
    for student in students_of(model).values():
        student.request = TransferRequest(backward=False)
    logits(model, tokens(2, 24))
    for student in students_of(model).values():
        assert {"loss", "mse", "target_power"} <= set(student.metrics)
        assert all(p.grad is None for p in student.parameters())


def test_gradients_are_those_of_a_joint_backward() -> None:
    """The same losses, kept as one graph over all layers and back-propagated together."""
    model, ids = make(), tokens(2, 24)
    parameters = freeze_for_transfer(model)
    set_mode(model, "transfer")
    recorded: list[tuple[Any, tuple[Tensor, ...], dict[str, Any]]] = []
    for student in students_of(model).values():
        student.request = TransferRequest(mse_weight=10.0)
        original = student.transfer

        def spy(*args: Tensor, _own: Any = student, _run: Any = original, **options: Any) -> None:
            recorded.append((_own, args, options))
            _run(*args, **options)

        student.transfer = spy
    logits(model, ids)
    local = [p.grad.clone() for p in parameters]
    joint = torch.zeros(())
    for student, (q, k, v, y), options in recorded:
        y_hat, _ = student(q, k, v, **options)
        joint = joint + 10.0 * (y - y_hat).square().mean()
    for gradient, other in zip(local, torch.autograd.grad(joint, parameters), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_transfer_with_a_filled_cache_is_an_error() -> None:
    model = make()
    past = model(tokens(1, 5), use_cache=True).past_key_values
    set_mode(model, "transfer")
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(1, 1), past_key_values=past)


# LoRA


def test_lora_is_added_merged_and_removed() -> None:
    model, ids = make(), tokens(2, 24)
    set_mode(model, "student")
    plain, keys = logits(model, ids), list(model.state_dict())
    paths = add_lora(model, LORA)
    assert paths == [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"]
    assert has_lora(model)
    assert torch.equal(logits(model, ids), plain)
    disturb(model)
    learned, state = logits(model, ids), merged_state(model)
    assert (learned - plain).abs().max() > 1e-3
    assert sorted(state) == sorted(keys)
    merge_lora(model)
    assert not has_lora(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(logits(model, ids), learned, rtol=0, atol=5e-5)


def test_lora_removed_is_forgotten() -> None:
    model, ids = tiny_model(), tokens(2, 24)
    before, keys = logits(model, ids), list(model.state_dict())
    add_lora(model, LORA)
    disturb(model)
    remove_lora(model)
    assert torch.equal(logits(model, ids), before)
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "peft_config")
    merge_lora(model)
    remove_lora(model)


def test_lora_of_a_bfloat16_model_is_float32() -> None:
    model = tiny_model().to(torch.bfloat16)
    attach_students(model, SMALL)
    add_lora(model, LORA)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    set_mode(model, "student")
    model(tokens(1, 20), labels=tokens(1, 20), use_cache=False).loss.backward()
    merge_lora(model)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_a_fused_projection_gets_the_lora_of_its_parts() -> None:
    model = make("phi3")
    assert add_lora(model, LORA)[:2] == [f"model.layers.0.self_attn.{n}" for n in ("o_proj", "qkv_proj")]


def test_lora_errors() -> None:
    model = make()
    with pytest.raises(UserError, match=r"'none_proj'.*q_proj"):
        add_lora(model, LoraConfig(targets=("none_proj",)))
    assert not has_lora(model)
    with pytest.raises(UserError, match="no LoRA"):
        freeze_for_lora(model, LORA)
    add_lora(model, LORA)
    with pytest.raises(UserError, match="a LoRA already"):
        add_lora(model, LORA)


def test_what_stage_two_trains() -> None:
    model = make()
    add_lora(model, LORA)
    assert all("lora_" in name for name in trainable(model))
    assert len(trainable(model)) == 16
    freeze_for_lora(model, LoraConfig(train_feature_maps=True))
    assert any(".student." in name for name in trainable(model))
    freeze_for_transfer(model)
    assert all(".student." in name for name in trainable(model))


@pytest.mark.parametrize(
    ("maps", "student"),
    [(False, "terrace"), *((True, name) for name in ("terrace", "terrace_gated", "gdn", "kda", "lightning"))],
)
def test_gradient_checkpointing_gives_the_same_gradients(maps: bool, student: str) -> None:
    ids, found = tokens(2, 24), []
    for checkpointing in (False, True):
        model = make(cfg=dataclasses.replace(SMALL, name=student))
        cfg = LoraConfig(rank=2, train_feature_maps=maps, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        add_lora(model, cfg)
        torch.manual_seed(0)
        disturb(model)
        set_mode(model, "student")
        model.train()
        assert model.is_gradient_checkpointing == checkpointing
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_gradients_with_a_cache_are_those_without() -> None:
    """A training step that forgot use_cache=False is slower, not wrong."""
    ids, found = tokens(2, 24), []
    for use_cache in (False, True):
        model = make()
        torch.manual_seed(0)
        add_lora(model, LORA)
        torch.manual_seed(0)
        disturb(model)
        set_mode(model, "student")
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)


# What was learned, by name


def test_adapter_names_are_canonical() -> None:
    model = make()
    add_lora(model, LORA)
    names = set(adapter_state(model))
    assert {
        "model.layers.0.self_attn.student.mix_H",
        "model.layers.1.self_attn.student.query_map.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    } <= names
    assert len(names) == 2 * 3 + 16


def test_adapters_load_strictly() -> None:
    model, plain = make(), make()
    add_lora(model, LORA)
    disturb(model)
    state = {name: t.clone() for name, t in adapter_state(model).items()}
    before = {name: t.clone() for name, t in adapter_state(plain).items()}
    with pytest.raises(UserError, match="add_lora"):
        load_adapter_state(plain, state)
    maps = {name: t for name, t in state.items() if ".student." in name}
    with pytest.raises(UserError, match=r"1 missing, e\.g\. model\.layers\.0\.self_attn\.student\.mix_H"):
        load_adapter_state(plain, {n: t for n, t in maps.items() if n != "model.layers.0.self_attn.student.mix_H"})
    wrong = {**maps, "model.layers.1.self_attn.student.mix_H": torch.zeros(3)}
    with pytest.raises(UserError, match=r"mix_H is \(3,\), the model's is \(4,\)"):
        load_adapter_state(plain, wrong)
    assert all(torch.equal(t, before[name]) for name, t in adapter_state(plain).items())
    load_adapter_state(plain, maps)
    assert all(torch.equal(t, maps[name]) for name, t in adapter_state(plain).items())


def test_lora_is_in_the_mode_of_its_model() -> None:
    model = tiny_model("llama")
    attach_students(model, StudentConfig(window=4))
    for training in (False, True):
        model.train(training)
        add_lora(model, LoraConfig(dropout=0.5))
        assert {module.training for module in model.modules()} == {training}
        remove_lora(model)

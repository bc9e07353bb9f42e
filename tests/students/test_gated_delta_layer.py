"""The layer of Qwen3.5 as a student: its definition token by token, Transformers' module, padding, copies, start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

import trenchcoat
from conftest import with_student
from tiny_families import logits, tiny_model, tokens
from trenchcoat.cli import app as cli
from trenchcoat.config import StudentConfig, TransferConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.models.attach import attach_students, detach_students, freeze_for_transfer, set_mode, students_of
from trenchcoat.models.lora import lora_targets
from trenchcoat.ops import recurrences
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.students import TransferRequest, build_student
from trenchcoat.students.gated_delta_layer import GatedDeltaLayer
from trenchcoat.training.gradients import rate_factors
from trenchcoat.training.objectives import initialise_from_text

NAME = "gated_delta_layer"
HEADS, KV, DIM, WIDTH = 4, 2, 6, 10
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""The delta rule is computed in float32, on states of order 1 that a few tens of tokens change."""


def layer(*, disturbed: float = 0.3) -> Any:
    student = build_student(StudentConfig(name=NAME), num_heads=HEADS, num_kv_heads=KV, head_dim=DIM, hidden_size=WIDTH)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(disturbed * torch.randn_like(p))
    return student


def run(student: Any, x: Tensor, **more: Any) -> tuple[Tensor, Any]:
    """(y [B, T, M], the state), with x in place of q, k and v."""
    one = x[:, None]
    y, state = student(one, one, one, scale=1.0, x_BTM=x, **more)
    return y[:, 0], state


def definition(student: GatedDeltaLayer, x: Tensor) -> Tensor:
    """y [B, T, M], each token by itself from the formulas of the file."""
    width = HEADS * DIM
    given = torch.cat((x.new_zeros(len(x), 3, 3 * width), x @ student.in_proj_qkv.weight.mT), 1)
    taps = student.conv1d.weight[:, 0]
    mixed = torch.stack([silu((given[:, t : t + 4] * taps.mT).sum(1)) for t in range(x.shape[1])], 1)
    q, k, v = (part.unflatten(2, (HEADS, DIM)).transpose(1, 2) for part in mixed.split(width, 2))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    forget = -student.A_log.exp() * softplus(x @ student.in_proj_a.weight.mT + student.dt_bias)
    write = (x @ student.in_proj_b.weight.mT).sigmoid()
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    start = x.new_zeros(len(x), HEADS, DIM, DIM)
    read, _ = recurrences.gated_delta(q, k, v, forget.transpose(1, 2), write.transpose(1, 2), real, start)
    read = read.transpose(1, 2)
    normed = student.norm.weight * read / (read.square().mean(-1, keepdim=True) + student.norm_eps).sqrt()
    return (normed.flatten(2) * silu(x @ student.in_proj_z.weight.mT)) @ student.out_proj.weight.mT


@pytest.mark.parametrize("length", [1, 3, 4, 5, 64, 65, 130])
@torch.no_grad()
def test_it_computes_its_definition_and_what_transformers_computes(length: int) -> None:
    student, x = layer(), torch.randn(2, length, WIDTH)
    wanted = definition(student, x)
    torch.testing.assert_close(run(student, x)[0], wanted, **CLOSE)
    config = Qwen3_5TextConfig(
        hidden_size=WIDTH, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS, linear_key_head_dim=DIM, linear_value_head_dim=DIM, rms_norm_eps=student.norm_eps,
    )  # fmt: skip
    theirs = Qwen3_5GatedDeltaNet(config, 0)
    theirs.load_state_dict(student.state_dict())  # same names, same shapes
    torch.testing.assert_close(theirs(x), wanted, **CLOSE)


def test_its_gradients_are_those_of_the_definition() -> None:
    student, x = layer(), torch.randn(2, 19, WIDTH)
    found = torch.autograd.grad(run(student, x)[0].square().sum(), list(student.parameters()))
    wanted = torch.autograd.grad(definition(student, x).square().sum(), list(student.parameters()))
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("splits", [(40,), (1,) * 40, (13, 1, 1, 5, 20)])
@torch.no_grad()
def test_padding_of_any_pattern_and_any_split_change_nothing(splits: tuple[int, ...]) -> None:
    """One row padded left, one right, one with gaps, one not at all: each is what its real tokens are alone."""
    student, x = layer(), torch.randn(4, 40, WIDTH)
    mask = torch.ones(4, 40, dtype=torch.bool)
    mask[0, :15], mask[1, 22:], mask[2] = False, False, torch.rand(40, generator=torch.Generator().manual_seed(1)) > 0.4
    state, parts, at = student.empty_state(4, dtype=torch.float32), [], 0
    for size in splits:
        span = slice(at, at + size)
        y, state = run(student, x[:, span], mask_BT=mask[:, span], state=state)
        parts.append(y)
        at += size
    found = torch.cat(parts, 1)
    assert not found[~mask].any()
    for row in range(4):
        alone, end = run(student, x[row : row + 1, mask[row]], state=student.empty_state(1, dtype=torch.float32))
        torch.testing.assert_close(found[row, mask[row]], alone[0], **CLOSE)
        for name, tensor in end.tensors().items():
            torch.testing.assert_close(state.tensors()[name][row : row + 1], tensor, **CLOSE)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_copies_are_by_head_with_the_weights_of_norms(family: str) -> None:
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.uniform_(0.5, 2.0)
    own, x = model.model.layers[1].self_attn, torch.randn(1, 5, 32)
    plain = {name: getattr(own, f"{name}_proj")(x) for name in "qkv"}
    for name in "qk" if family == "qwen3" else "":
        plain[name] = (plain[name].unflatten(2, (-1, 8)) * getattr(own, f"{name}_norm").weight).flatten(2)
    student: Any = attach_students(model, StudentConfig(name=NAME))[1]
    biases = student._biases if family == "qwen2" else 0.0
    q, k, v = (student.in_proj_qkv(x) + biases).split(32, 2)
    torch.testing.assert_close(q, plain["q"])
    for found, name in ((k, "k"), (v, "v")):
        torch.testing.assert_close(found, plain[name].unflatten(2, (2, 8)).repeat_interleave(2, 2).flatten(2))
    assert torch.equal(student.out_proj.weight, own.o_proj.weight)
    assert student.norm_eps == model.config.rms_norm_eps


def embedded_rows(rows: int, length: int) -> tuple[Any, Tensor]:
    """The embedded teacher and rows of its text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trenchcoat.models.embedded import stdlib_documents, teacher_dir

    tokenizer = AutoTokenizer.from_pretrained(teacher_dir())
    text = "".join(found for _, (_, found) in zip(range(6), stdlib_documents("train"), strict=False))
    ids = torch.tensor(tokenizer(text)["input_ids"][: rows * length]).view(rows, length)
    return AutoModelForCausalLM.from_pretrained(teacher_dir(), dtype=torch.float32).eval(), ids


def errors(model: Any, ids: Tensor) -> list[float]:
    """Of each layer: the squared error of its output relative to the teacher's mean square."""
    students = students_of(model)
    for student in students.values():
        student.request = TransferRequest(mse_weight=1.0, normalize="layer", backward=False)
    logits(model, ids)
    return [float(student.metrics["loss"]) for student in students.values()]


def test_the_start_from_text_is_far_better_than_the_copies() -> None:
    model, ids = embedded_rows(3, 160)
    attach_students(model, StudentConfig(name=NAME))
    set_mode(model, "transfer")
    copied, batch = errors(model, ids[2:]), ids[:2]
    initialise_from_text(model, {"input_ids": batch, "attention_mask": torch.ones_like(batch)})
    started = errors(model, ids[2:])
    assert all(start < 0.8 * copy for start, copy in zip(started, copied, strict=True)), (started, copied)
    for student in students_of(model).values():
        assert student.dt_bias.std() > 0  # half-lives by head


def test_biases_go_into_the_projections_on_text() -> None:
    model, ids = tiny_model("qwen2"), tokens(2, 40)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.fill_(3.0)
    student: Any = attach_students(model, StudentConfig(name=NAME))[0]
    set_mode(model, "transfer")
    seen: list[Tensor] = []
    before = student.in_proj_qkv.weight.clone()
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    initialise_from_text(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert student._biases is None
    keys = slice(32, 64)
    # sizes are fitted after the biases are in, one number a head
    scale = student.in_proj_qkv.weight[keys].norm() / before[keys].norm()
    assert scale > 0
    k = seen[0].flatten(0, 1) @ student.in_proj_qkv.weight[keys].mT
    plain = seen[0].flatten(0, 1) @ before[keys].mT + 3.0
    cosine = torch.nn.functional.cosine_similarity(k.flatten(), plain.flatten(), dim=0)
    assert cosine > 0.8


def test_training_stays_in_the_layer_and_copies_have_their_own_rate() -> None:
    model, ids = tiny_model("llama"), tokens(2, 21)
    students = attach_students(model, StudentConfig(name=NAME))
    freeze_for_transfer(model)
    set_mode(model, "transfer")
    for student in students.values():
        student.request = TransferRequest()
    logits(model, ids)
    learned = {id(p) for student in students.values() for p in student.parameters()}
    for p in model.parameters():
        assert (p.grad is not None) == (id(p) in learned)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = rate_factors(model, trainable, TransferConfig(lr=4e-3))
    assert {name.split(".student.")[1] for name in factors} == {"in_proj_qkv.weight", "out_proj.weight"}
    assert set(factors.values()) == {0.1}
    given = rate_factors(model, trainable, TransferConfig(lr=4e-3, copies_lr=1e-3))
    assert list(given.values()) == pytest.approx([0.25] * len(factors))


def test_the_loss_is_that_of_the_layers_output() -> None:
    model, ids = tiny_model("llama"), tokens(2, 21)
    own, student = model.model.layers[0].self_attn, attach_students(model, StudentConfig(name=NAME))[0]
    seen: list[tuple[Tensor, Tensor]] = []
    own.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    set_mode(model, "transfer")
    student.request = TransferRequest(mse_weight=3.0)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    logits(model, ids, attention_mask=mask)
    x, y = seen[0]
    with torch.no_grad():
        off = (run(student, x, mask_BT=mask.bool())[0] - y)[mask.bool()]
    assert float(student.metrics["loss"]) == pytest.approx(3.0 * float(off.square().mean()), rel=1e-5)


def test_detached_the_model_is_as_before() -> None:
    model, ids = tiny_model("llama"), tokens(1, 9)
    before, names = logits(model, ids), list(model.state_dict())
    attach_students(model, StudentConfig(name=NAME))
    set_mode(model, "student")
    assert not torch.equal(logits(model, ids), before)
    detach_students(model)
    assert torch.equal(logits(model, ids), before)
    assert list(model.state_dict()) == names
    assert "forward" not in vars(model.model.layers[0].self_attn)


def test_the_graph_that_the_plan_counts_is_the_one_that_is_held() -> None:
    heads, dim = 4, 32
    student = build_student(
        StudentConfig(name=NAME), num_heads=heads, num_kv_heads=2, head_dim=dim, hidden_size=heads * dim
    )
    x = torch.randn(1, 512, heads * dim)
    with live_tensor_memory() as memory:
        student.transfer(x[:, None], x[:, None], x[:, None], x[:, None], scale=1.0, x_BTM=x)
    weights = sum(p.numel() for p in student.parameters())
    held = memory.peak / 4 - weights  # gradients
    features = student.features * (heads + student.key_heads)
    assert held / 512 == pytest.approx(features + student.graph_numbers, rel=0.25)


def test_what_does_not_fit_is_refused() -> None:
    kept = StudentConfig(name=NAME, keep=("0.1",))
    with pytest.raises(UserError, match=r"takes the place of whole layers.*student\.keep=0\.1.*keep_softmax"):
        attach_students(tiny_model("llama"), kept)
    with pytest.raises(UserError, match=r"whole layers.*student\.keep=25%"):
        load_recipe("demo", [f"student.name={NAME}", "student.keep=25%"])
    with pytest.raises(UserError, match=r"no q_proj\.weight"):
        attach_students(tiny_model("phi3"), StudentConfig(name=NAME))
    biased = tiny_model("llama", attention_bias=True)
    with torch.no_grad():
        biased.model.layers[1].self_attn.o_proj.bias.fill_(1.0)
    with pytest.raises(UserError, match=r"o_proj\.bias of layer 1"):
        attach_students(biased, StudentConfig(name=NAME))
    model = tiny_model("llama")
    attach_students(model, StudentConfig(name=NAME, keep_softmax=(1,)))
    assert lora_targets(model, ("q_proj", "up_proj")) == [
        "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    ]  # fmt: skip
    detach_students(model)
    attach_students(model, StudentConfig(name=NAME))
    with pytest.raises(UserError, match=r"lora\.train=mixer or all"):
        lora_targets(model, ("q_proj",))


def test_both_stages_train_one(tiny_overrides: list[str]) -> None:
    folder = Path(tiny_overrides[-1].removeprefix("run.dir="))
    own = [*with_student(NAME, tiny_overrides), "student.keep_softmax=[0]", "transfer.lr=1e-3", "lora.train=mixer"]
    for stage in ("transfer", "finetune"):
        assert cli.main([stage, "demo", *own]) == 0
    model, _ = trenchcoat.load(folder / "adapter", device="cpu")
    assert all(isinstance(student, GatedDeltaLayer) for student in students_of(model).values())

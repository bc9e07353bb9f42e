"""Every student in every family: the teacher exact, and the contracts of the design (causality, prefill = decode,
padding invisible, saved = loaded = merged). Families that cannot work are refused, unchanged."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tiny_families import BASE, FAMILIES, logits, tiny_model, tokens
from trenchcoat.config import FeatureMapConfig, LoraConfig, StudentConfig
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students, freeze_for_transfer, set_mode, students_of
from trenchcoat.models.families import KNOWN_FAMILIES, TESTED_FAMILIES, UnsupportedFamilyError, attention_sites
from trenchcoat.models.hub import adapter_state, load_adapter_state
from trenchcoat.models.lora import add_lora, merge_lora
from trenchcoat.students import STUDENTS, student_class

WINDOW, LENGTH, PAD = 4, 37, 5
CLOSE = {"rtol": 0.0, "atol": 5e-5}
"""Against logits of order 1; what the tests would show when broken is of order 0.1 or more."""

KEPT = "terrace and kept groups"
"""Some key/value groups of both layers keep softmax attention, the other heads are terrace students."""

OF_INPUT = ("olmo2", "gpt_oss")
"""Families for students that read the layer's input: olmo2's is not normed, gpt_oss has learned sinks and a window; the
near part is that of the other students."""
OF_LAYER = ("qwen2", "qwen3", "olmo2")
"""Families for students that take the place of the layer, which start from its projections: with biases, with norms a
head, and with one norm for all heads."""

pairs = pytest.mark.parametrize(
    ("family", "student"),
    [
        (f, s)
        for f in FAMILIES
        for s in (*STUDENTS, KEPT)
        if s == KEPT
        or f in (OF_LAYER if student_class(s).replaces_layer else OF_INPUT if student_class(s).uses_input else FAMILIES)
    ],
)


def student_config(name: str) -> StudentConfig:
    if name == KEPT:
        return dataclasses.replace(student_config("terrace"), keep=("0.1", "1.0"))
    sinks = 0 if student_class(name).kind == "linear" else 2
    return StudentConfig(name=name, window=WINDOW, sinks=sinks, feature_map=FeatureMapConfig(feature_dim=6))


def disturb(model: Any, *, lora: bool = False) -> None:
    """Move what was learned away from its initial values, LoRA's zero B included."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapter_state(model).items():
            if lora or "lora_" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@cache
def swapped(family: str, student: str) -> Any:
    """A model in student mode whose students are not at their initial values. Not to be changed."""
    model = tiny_model(family)
    attach_students(model, student_config(student))
    disturb(model)
    set_mode(model, "student")
    return model


def left_padding(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :PAD] = 0
    return mask


@pairs
def test_the_teacher_is_exact(family: str, student: str) -> None:
    model, ids = tiny_model(family), tokens(2, LENGTH)
    masks = [None, left_padding(ids), left_padding(ids).flip(1)]
    plain = [logits(model, ids, attention_mask=mask) for mask in masks]
    students = attach_students(model, student_config(student))
    freeze_for_transfer(model)
    for mode in ("teacher", "transfer"):
        set_mode(model, mode)
        for mask, before in zip(masks, plain, strict=True):
            assert torch.equal(logits(model, ids, attention_mask=mask), before), mode
    for one in students.values():
        assert one.metrics["loss"] > 0
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in one.parameters())
    set_mode(model, "student")
    assert (logits(model, ids) - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_generates_as_before(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 11)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": left_padding(ids)}
    before = model.generate(ids, **options)
    attach_students(model, student_config("terrace"))
    assert torch.equal(model.generate(ids, **options), before)


@pairs
def test_causality(family: str, student: str) -> None:
    model, ids = swapped(family, student), tokens(2, LENGTH)
    whole = logits(model, ids)
    for length in (1, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 30):
        torch.testing.assert_close(logits(model, ids[:, :length]), whole[:, :length], **CLOSE)


@pairs
def test_prefill_and_decode_agree(family: str, student: str) -> None:
    model, ids = swapped(family, student), tokens(2, LENGTH)
    mask = left_padding(ids)
    whole = logits(model, ids, attention_mask=mask)
    for steps in ([1] * 12, [10, 1, 1, 3, 2, 20]):
        pieces = in_pieces(model, ids, steps, mask)
        seen = pieces.shape[1]
        torch.testing.assert_close(pieces[1], whole[1, :seen], **CLOSE)
        torch.testing.assert_close(pieces[0, PAD:], whole[0, PAD:seen], **CLOSE)
    torch.testing.assert_close(in_pieces(model, ids, [7, 1, 12, 17]), logits(model, ids), **CLOSE)


def in_pieces(model: Any, ids: Tensor, steps: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of the first sum(steps) columns, computed through the cache; without a mask, positions come from it."""
    parts, seen, past = [], 0, None
    for step in steps:
        seen += step
        padding = {} if mask is None else {"attention_mask": mask[:, :seen]}
        with torch.no_grad():
            out = model(input_ids=ids[:, seen - step : seen], past_key_values=past, use_cache=True, **padding)
        parts.append(out.logits)
        past = out.past_key_values
    return torch.cat(parts, 1)


@pairs
def test_padding_is_invisible(family: str, student: str) -> None:
    model, ids = swapped(family, student), tokens(2, LENGTH)
    mask = left_padding(ids)
    alone = logits(model, ids[:1, PAD:])[0]
    torch.testing.assert_close(logits(model, ids, attention_mask=mask)[0, PAD:], alone, **CLOSE)
    short = LENGTH - PAD
    right = logits(model, ids, attention_mask=mask.flip(1))[0, :short]
    torch.testing.assert_close(right, logits(model, ids[:1, :short])[0], **CLOSE)


@pairs
def test_saved_loaded_and_merged_agree(family: str, student: str, tmp_path: Path) -> None:
    ids, lora = tokens(2, LENGTH), LoraConfig(rank=2, alpha=4.0)
    if student != KEPT and student_class(student).replaces_layer:  # no projections are left to adapt
        lora = dataclasses.replace(lora, targets=("up_proj",))
    model = tiny_model(family)
    attach_students(model, student_config(student))
    add_lora(model, lora)
    disturb(model, lora=True)
    set_mode(model, "student")
    learned = logits(model, ids)

    twin = tiny_model(family)
    attach_students(twin, student_config(student))
    add_lora(twin, lora)
    load_adapter_state(twin, {name: t.clone() for name, t in adapter_state(model).items()})
    set_mode(twin, "student")
    assert torch.equal(logits(twin, ids), learned)

    hub.save_merged(model, tmp_path)
    assert torch.equal(logits(model, ids), learned), "saving changed the model"
    merge_lora(model)
    merged = logits(model, ids)
    torch.testing.assert_close(merged, learned, **CLOSE)
    own = FAMILIES[family][1].get("attn_implementation", BASE["attn_implementation"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=own)
    assert type(loaded).__name__.startswith("Linearized")
    assert torch.equal(logits(loaded, ids), merged)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("student", [name for name in STUDENTS if student_class(name).kind != "linear"])
def test_a_window_wider_than_the_text_is_softmax_attention(family: str, student: str) -> None:
    """Then nothing is far and the mix cancels: scale, soft-cap, learned sinks and heads are all the teacher's own."""
    settings = FAMILIES[family][1]
    wide = {"sliding_window": 2 * LENGTH} if "sliding_window" in settings else {}
    model, ids = tiny_model(family, **wide), tokens(2, LENGTH)
    softmax = logits(model, ids)
    attach_students(model, StudentConfig(name=student, window=LENGTH, feature_map=FeatureMapConfig(feature_dim=6)))
    set_mode(model, "student")
    torch.testing.assert_close(logits(model, ids), softmax, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_softmax_layers(family: str) -> None:
    """With one layer kept: prefill = decode and padding invisible hold through the mixed cache and the kept mask."""
    config = StudentConfig(window=WINDOW, keep_softmax=(0,), feature_map=FeatureMapConfig(feature_dim=6))
    model, ids = tiny_model(family), tokens(2, LENGTH)
    assert list(attach_students(model, config)) == [1]
    set_mode(model, "student")
    mask = left_padding(ids)
    whole = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(whole[0, PAD:], logits(model, ids[:1, PAD:])[0], **CLOSE)
    pieces = in_pieces(model, ids, [14, 1, 1, 14, 1], mask)
    torch.testing.assert_close(pieces[1], whole[1, :31], **CLOSE)
    torch.testing.assert_close(pieces[0, PAD:], whole[0, PAD:31], **CLOSE)


def test_the_last_layer_kept_uses_its_own_mask() -> None:
    """A kept sliding-window layer sees its window only: the same model without a window differs, and it matters."""
    ids = tokens(1, LENGTH)
    found = []
    for sliding in (3, None):
        model = tiny_model("mistral", sliding_window=sliding)
        attach_students(model, StudentConfig(window=64, keep_softmax=(1,)))
        set_mode(model, "student")
        found.append(logits(model, ids))
    assert (found[0] - found[1]).abs().max() > 1e-3


# Refusals

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 4}, "num_key_value_groups"),
    "gpt_neox": ("GPTNeoXForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                                        "intermediate_size": 32}, "num_key_value_groups"),
    "opt": ("OPTForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 32,
                               "word_embed_proj_dim": 32}, "num_key_value_groups"),
    "falcon": ("FalconForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, "interface"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                                              "num_key_value_heads": 4, "intermediate_size": 32, "n_routed_experts": 8,
                                              "moe_intermediate_size": 8, "q_lora_rank": 8, "kv_lora_rank": 8},
                    "latent"),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1}, "state-space"),
    "t5": ("T5ForConditionalGeneration", {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 32, "d_kv": 8},
           "encoder-decoder"),
    "bert": ("BertForMaskedLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                                 "intermediate_size": 32}, "self_attn"),
    "lfm2": ("Lfm2ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                 "num_key_value_heads": 2, "intermediate_size": 32,
                                 "layer_types": ["conv", "full_attention"]}, "conv"),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_families_are_refused_unchanged(family: str) -> None:
    name, settings, reason = REFUSED[family]
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(vocab_size=97, **settings))
    implementation, keys = model.config._attn_implementation, list(model.state_dict())
    with pytest.raises(UnsupportedFamilyError, match=reason) as caught:
        attach_students(model, StudentConfig(window=4))
    assert repr(family) in str(caught.value)
    assert model.config._attn_implementation == implementation
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_module_that_is_not_a_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match="not a Transformers model"):
        attention_sites(torch.nn.Linear(2, 2))


def test_an_attention_off_the_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    kind = type(attention_sites(model)[0].module)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(UnsupportedFamilyError, match="does not compute attention through"):
        attach_students(model, StudentConfig(window=4))


def test_the_tested_families_are_the_known_ones() -> None:
    assert set(FAMILIES) == set(TESTED_FAMILIES) <= set(KNOWN_FAMILIES)


def test_students_have_something_to_learn_but_the_baseline() -> None:
    for student in STUDENTS:
        model = swapped("llama", student)
        assert all(bool(list(s.parameters())) == s.has_far for s in students_of(model).values())

"""`student.kept_log_scale`: scores of kept heads times ln(t + a) / ln(a), in every way that a model is run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from operator_kit import budget, error
from tiny_families import GREEDY, WINDOW, decoded_together, logits, make, tiny_model, tokens
from trenchcoat.config import FeatureMapConfig, Recipe, StudentConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.generation.generate import Session
from trenchcoat.generation.statefile import function_identity
from trenchcoat.models import hub
from trenchcoat.models.attach import (
    attach_students,
    attention_through,
    detach_students,
    own_outputs,
    set_kept_log_scale,
    set_mode,
    students_of,
)
from trenchcoat.models.interface import own_attention
from trenchcoat.models.lolcats.settings import check_exportable
from trenchcoat.ops.compiled.build import compiler
from trenchcoat.runtime.runfolder import LORA, TRANSFER, stage_settings

LENGTH, PAD, BASE = 21, 5, 3.0
KEPT = ("0.1", 1)
"""A group, and a whole layer."""
FAMILIES = ("llama", "mistral", "gemma2", "cohere2", "gpt_oss")
"""Without and with sliding windows, soft caps and sink logits."""


def scaled(family: str = "llama", student: str = "terrace", keep: tuple[int | str, ...] = KEPT, **changes: Any) -> Any:
    model = make(family, student, keep, **changes)
    set_kept_log_scale(model, BASE)
    return model


def left_padded(rows: int = 2) -> tuple[Tensor, Tensor]:
    """(ids, mask) [rows, LENGTH], the first row with PAD columns of padding."""
    ids, mask = tokens(rows, LENGTH), torch.ones(rows, LENGTH, dtype=torch.int64)
    ids[0, :PAD], mask[0, :PAD] = 2, 0
    return ids, mask


def first_layer(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What the first layer hands to its output projection, [rows, tokens, heads, head dim]."""
    found: list[Tensor] = []
    attention = model.model.layers[0].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    logits(model, ids, attention_mask=mask)
    handle.remove()
    return found[0].unflatten(-1, (-1, attention.head_dim))


def by_definition(model: Any, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """The same from the q, k, v of a model without students, with scores times s_t, written out in float64; positions
    [B, T] float64."""
    found: list[Tensor] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **options: Any) -> Any:
        """Softmax over what the layer's own mask shows, written out."""
        if module.layer_idx == 0:
            keys, values = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            scale = options["scaling"] * torch.log(positions + BASE) / math.log(BASE)
            scores = q.double() @ keys.mT * scale[:, None, :, None]
            if options.get("softcap") is not None:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            ages = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
            window = options.get("sliding_window") or LENGTH
            seen = ((ages >= 0) & (ages < window))[None, None] & mask.bool()[:, None, None, :]
            weights = scores.masked_fill(~seen, -1e300).exp()
            total = weights.sum(-1, keepdim=True)
            if options.get("s_aux") is not None:
                total = total + options["s_aux"].double().exp()[:, None, None]
            found.append((weights @ values / total).transpose(1, 2))
        return own_attention(module, q, k, v, attention_mask, **options)

    with attention_through(model, attention):
        logits(model, ids, attention_mask=mask, position_ids=positions.long())
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [("0.1",), (0,)])
def test_scores_are_scaled_by_the_number_of_real_tokens_before_the_query(
    family: str, keep: tuple[int | str, ...]
) -> None:
    ids, mask = left_padded()
    positions = torch.tensor([[0] * PAD + list(range(LENGTH - PAD)), list(range(LENGTH))])
    dtype = torch.float32 if family == "gpt_oss" else torch.float64  # its experts have no float64
    wanted = by_definition(tiny_model(family).to(dtype), ids, mask, positions.double())
    model = make(family, "window_sinks", keep).to(dtype)
    plain = first_layer(model, ids, mask)
    set_kept_log_scale(model, BASE)
    found = first_layer(model, ids, mask)
    heads = slice(2, 4) if keep == ("0.1",) else slice(0, 4)
    real = mask.bool()
    close = 1e-12 if family in ("llama", "mistral") else 1e-5  # eager attention takes its softmax in float32
    torch.testing.assert_close(found[real][:, heads].double(), wanted[real][:, heads], atol=close, rtol=close)
    assert (found - plain)[real][:, heads].abs().max() > 1e-2
    assert torch.equal(found[real][:, : heads.start], plain[real][:, : heads.start])
    first = (0, PAD), (1, 0)
    assert all(torch.equal(found[at][heads], plain[at][heads]) for at in first)  # ln(0 + a) / ln(a) = 1


@pytest.mark.parametrize(
    ("family", "student"), [*((family, "terrace") for family in FAMILIES), ("llama", "terrace_gated"), ("llama", "gdn")]
)
def test_every_split_and_padding_give_what_the_whole_text_gives(family: str, student: str) -> None:
    model, (ids, mask) = scaled(family, student), left_padded()
    wanted = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(logits(model, ids[:1, PAD:])[0], wanted[0, PAD:], atol=1e-4, rtol=0)
    for pieces in ([1] * LENGTH, [9, 3, 9], [2 * WINDOW] + [1] * (LENGTH - 2 * WINDOW)):
        for padded in (True, False):
            past, found, stop = DynamicCache(config=model.config), [], 0
            for piece in pieces:
                start, stop = stop, stop + piece
                options = {"attention_mask": mask[:, :stop]} if padded else {}
                found.append(logits(model, ids[:, start:stop], past_key_values=past, use_cache=True, **options))
            whole = torch.cat(found, 1)
            one = slice(None) if padded else slice(1, None)  # without the mask, the row without padding
            kept = mask.bool()[one]
            torch.testing.assert_close(whole[one][kept], wanted[one][kept], atol=1e-4, rtol=0)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("student", ["terrace", "terrace_gated"])
def test_one_call_of_the_kernels_decodes_scaled_heads(student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together = decoded_together(monkeypatch)
    ids, found = tokens(2, 61), {}
    for name, dtype, impl in (
        ("exact", torch.float64, "chunkwise"), ("chunkwise", torch.float32, "chunkwise"),
        ("compiled", torch.float32, "auto"),
    ):  # fmt: skip
        model = tiny_model().to(dtype)
        maps = FeatureMapConfig(feature_dim=6)
        attach_students(
            model, StudentConfig(name=student, window=WINDOW, feature_map=maps, impl=impl, keep=("0.1", "1.0"))
        )
        set_mode(model, "student")
        set_kept_log_scale(model, BASE)
        together.clear()
        past, pieces = DynamicCache(config=model.config), []
        for start, stop in ((0, 9), *((t, t + 1) for t in range(9, 61))):
            pieces.append(logits(model, ids[:, start:stop], past_key_values=past, use_cache=True))
        assert sum(together) == (2 * 52 if name == "compiled" else 0)
        found[name] = torch.cat(pieces, 1)
    assert error(found["compiled"], found["exact"]) <= budget(error(found["chunkwise"], found["exact"]), terms=61 * 12)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
)
def test_generation_agrees_with_no_cache(options: dict[str, Any]) -> None:
    model, (ids, mask) = scaled(), left_padded()
    if "prompt_lookup_num_tokens" in options:  # one row at a time
        ids, mask = ids[1:].repeat(1, 2), mask[1:].repeat(1, 2)
    plain = {"max_new_tokens": 12, "attention_mask": mask, "disable_compile": True, **GREEDY}
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    wanted = model.generate(ids, use_cache=False, **plain, **beams)
    assert torch.equal(model.generate(ids, **plain, **options), wanted)


def test_a_saved_state_continues(tmp_path: Path) -> None:
    model, ids = scaled(), tokens(1, LENGTH)
    session = Session.new(model)
    session.read(ids[0].tolist())
    session.save(tmp_path / "state.safetensors")
    session = Session.load(tmp_path / "state.safetensors", model)
    torch.testing.assert_close(session.next_logits(), logits(model, ids)[0, -1], atol=1e-4, rtol=0)


def test_without_it_nothing_changes() -> None:
    """Neither in other modes, nor once it is taken back; a state saved before this setting fits as it did."""
    model, ids = make(keep=KEPT), tokens(2, LENGTH)
    before, teacher, identity = logits(model, ids), logits(tiny_model(), ids), function_identity(model)
    set_kept_log_scale(model, BASE)
    assert not torch.equal(logits(model, ids), before)
    assert function_identity(model) != identity
    with own_outputs(model):
        assert torch.equal(logits(model, ids), teacher)
    for mode in ("teacher", "transfer"):
        set_mode(model, mode)
        assert torch.equal(logits(model, ids), teacher)
    set_mode(model, "student")
    set_kept_log_scale(model, None)
    assert torch.equal(logits(model, ids), before)
    assert function_identity(model) == identity
    set_kept_log_scale(model, BASE)
    detach_students(model)
    assert torch.equal(logits(model, ids), teacher)


def test_gradients_reach_scaled_queries() -> None:
    model, ids = scaled(), tokens(1, LENGTH)
    model(ids).logits[:, -1].square().sum().backward()
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.weight.grad[-16:].abs().min(1).values.max() > 0  # heads of the kept group 1


def test_folders_hold_it(tmp_path: Path) -> None:
    model, ids = scaled(), tokens(2, LENGTH)
    wanted = logits(model, ids)
    hub.save_merged(model, tmp_path / "merged")
    model.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "merged", tmp_path / "saved"):
        assert json.loads((folder / "config.json").read_text())["trenchcoat"]["student"]["kept_log_scale"] == BASE
        opened = AutoModelForCausalLM.from_pretrained(folder)
        assert students_of(opened)[0].cfg.kept_log_scale == BASE
        torch.testing.assert_close(logits(opened, ids), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", ["1", "0.5", "-3", "inf", "yes"])
def test_a_base_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"student\.kept_log_scale"):
        load_recipe("demo", [f"student.kept_log_scale={value}"])


def test_a_base_that_is_none_is_refused_in_memory() -> None:
    model = make(keep=KEPT)
    with pytest.raises(UserError, match=r"student\.kept_log_scale must be above 1"):
        set_kept_log_scale(model, 1.0)
    assert students_of(model)[0].cfg.kept_log_scale is None


def test_a_finished_transfer_can_go_on_with_another() -> None:
    """Attention transfer does not read it; stage 2 trains with it."""
    plain = Recipe()
    other = dataclasses.replace(plain, student=dataclasses.replace(plain.student, kept_log_scale=600.0))
    assert stage_settings(plain, TRANSFER) == stage_settings(other, TRANSFER)
    assert stage_settings(plain, LORA) != stage_settings(other, LORA)


def test_lolcats_format_is_refused() -> None:
    with pytest.raises(UserError, match=r"no scale by position \(student\.kept_log_scale=600\)"):
        check_exportable(StudentConfig(keep_softmax=(1,), kept_log_scale=600.0), "llama")


def test_a_layer_without_a_mask_says_so() -> None:
    attention = scaled().model.layers[1].self_attn
    hidden, angles = torch.zeros(1, 3, 32), (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="gives its layers no mask"):
        attention(hidden_states=hidden, position_embeddings=angles, attention_mask=None)

"""Rotary frequencies that depend on the length of the text: said in words, and prompts are read whole."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from tiny_families import make, tokens
from trenchcoat.generation import generate
from trenchcoat.generation.generate import Session
from trenchcoat.models.attach import detach_students
from trenchcoat.models.families import decoder_of
from trenchcoat.models.rotary import LengthDependence, length_dependence, warn_of_pieces

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4, 8, 16],
    "original_max_position_embeddings": 40, "factor": 8.0,
}  # fmt: skip
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def student(rope: dict[str, Any], **more: Any) -> Any:
    """A tiny Llama with students and this rotary embedding, in student mode."""
    return make("llama", rope_parameters=rope, max_position_embeddings=40, **more).eval()


def read(model: Any, ids: torch.Tensor, piece: int) -> torch.Tensor:
    """The last token's logits, read in pieces."""
    past = None
    for part in ids.split(piece, 1):
        with torch.no_grad():
            out = model(input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
    last: torch.Tensor = out.logits[:, -1]
    return last


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC])
def test_pieces_across_the_limit_are_warned_of_once(rope: dict[str, Any]) -> None:
    model = student(rope)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(read(model, tokens(1, 40), 16), read(model, tokens(1, 40), 40), atol=1e-5)
        read(model, tokens(1, 60), 60)
    with pytest.warns(UserWarning, match=r"texts of more than 40 tokens use .*Keep a text within 40 tokens") as found:
        read(model, tokens(1, 60), 16)
    assert len(found) == 1
    detach_students(model)
    assert not any(hook is warn_of_pieces for hook in decoder_of(model)._forward_pre_hooks.values())


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC])
def test_prompts_beyond_the_limit_are_read_whole(rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 16)
    model, ids = student(rope), tokens(1, 60)
    config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = model.generate(ids, generation_config=config).tolist()
        assert generate._generate(model, ids, torch.ones_like(ids), config, None) == whole
        session = Session.new(model)
        session.read(ids[0].tolist())
    reads: list[int] = []
    decoder_of(model).register_forward_pre_hook(
        lambda _, args, kw: reads.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    Session.new(model).read(ids[0, :39].tolist())
    assert reads == [16, 16, 6]  # within the limit, in chunks


def test_what_depends_on_the_length() -> None:
    nested = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert length_dependence(LlamaConfig()) is None
    config = LlamaConfig(max_position_embeddings=320)
    config.rope_parameters = nested
    assert length_dependence(config) == LengthDependence("dynamic", 320)
    config.rope_parameters = LONGROPE
    assert length_dependence(config) == LengthDependence("longrope", 40)
    longrope, dynamic = LengthDependence("longrope", 40), LengthDependence("dynamic", 40)
    assert [longrope.changes(*x) for x in ((0, 60), (20, 40), (20, 41), (40, 41), (41, 60))] == [0, 0, 1, 1, 0]
    assert [dynamic.changes(*x) for x in ((0, 60), (20, 40), (20, 41), (41, 60))] == [0, 0, 1, 1]

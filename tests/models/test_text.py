"""Text that a tokenizer refuses, and tokens that a model has no embedding for, are met before the model is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import byte_tokenizer, tiny_llama_config
from trenchcoat.config import ModelConfig, StudentConfig, UserError
from trenchcoat.generation.conversation import Conversation
from trenchcoat.generation.generate import Sampling, Session, generate_rows, generate_text
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.loading import load_model
from trenchcoat.models.text import clean_text, known_embeddings, tokenize


@pytest.fixture
def longer(tmp_path: Path) -> tuple[Any, Any]:
    """A model of 259 tokens with a tokenizer of 261, as it is loaded: `[PAD]` and `<|tool|>` were added."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|tool|>"])
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return load_model(ModelConfig(path=str(tmp_path), device="cpu"))


@pytest.mark.parametrize(
    ("text", "clean"),
    [("plain", "plain"), ("é\ud83d!", "é\ufffd!"), ("\ude00\ud83d", "\ufffd\ufffd"), ("\U0001f600", "\U0001f600")],
)
def test_half_a_pair_is_replaced(text: str, clean: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert clean_text(text) == clean
    assert tokenizer.decode(tokenize(tokenizer, text)["input_ids"]) == clean
    assert tokenize(tokenizer, [text, "b"])["input_ids"] == tokenizer([clean, "b"])["input_ids"]


def test_what_a_tokenizer_raises_is_a_sentence() -> None:
    words = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenize(tokenizer, "a b")["input_ids"] == [0, 1]
    with pytest.raises(UserError, match=r"the tokenizer refuses the text: .*Missing \[UNK\]"):
        tokenize(tokenizer, "a c")


def test_prompts_of_different_length_with_a_pad_token_beyond_the_embeddings(longer: tuple[Any, Any]) -> None:
    model, tokenizer = longer
    prompts = ["short", "a longer prompt"]
    sampling = Sampling(max_new_tokens=4, more={"eos_token_id": None})
    together = generate_text(model, tokenizer, prompts, sampling)
    alone = [generate_text(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    assert [one.text for one in together] == [one.text for one in alone]
    usual = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = 300  # neither of the two is inside
    assert sampling.config(model, tokenizer).pad_token_id == 0
    model.generation_config = usual


def test_a_token_without_embedding_is_named_in_a_prompt_and_in_a_chat(longer: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = longer
    assert known_embeddings(tokenizer) == known_embeddings(copy.deepcopy(tokenizer)) == 259
    assert known_embeddings(byte_tokenizer()) is None
    message = r"prompt 'a <\|tool\|>': token '<\|tool\|>' has id 260, .*embeddings for 259 tokens"
    with pytest.raises(UserError, match=message):
        generate_text(model, tokenizer, ["fine", "a <|tool|>"], Sampling(max_new_tokens=1))
    attach_students(model, StudentConfig(window=4))
    set_mode(model, "student")
    with pytest.raises(UserError, match="has id 260"):
        Conversation(model, tokenizer, Sampling(max_new_tokens=1)).ask("a <|tool|>", print)
    with pytest.raises(UserError, match="has id 260"):
        list(generate_rows(model, tokenizer, ["<|tool|>"], Sampling(max_new_tokens=1), end=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


def test_a_prompt_with_half_a_pair_is_continued(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = LlamaForCausalLM(tiny_llama_config()).eval()
    attach_students(model, StudentConfig(window=4))
    set_mode(model, "student")
    (row,) = generate_rows(model, tokenizer, ["caf\udce9"], Sampling(max_new_tokens=2))
    assert row["prompt"] == "caf\ufffd"
    assert Conversation(model, tokenizer, Sampling(max_new_tokens=2)).ask("caf\udce9", lambda text: None).tokens > 0
    assert torch.is_tensor(Session.new(model).model.lm_head.weight)

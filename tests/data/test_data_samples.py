"""Templates and labels: which part of a row counts, read back as text from the tokens that count."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data.formats import segments
from trenchcoat.data.samples import BadSample, encode, opening_tokens

SHARED = Path(__file__).parents[3] / "shared"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant, please') }}{% endif %}{% endfor %}"
)
THINKING = (  # as several families do: only the last answer carries an (empty) thought
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}[thought]{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "end"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": " n "},
]


class Tokens:
    """Encodes one row and reads its tokens back."""

    def __init__(self, tokenizer: Any, row: dict[str, Any], **fields: Any) -> None:
        cfg = DataConfig(**{"bos": "always", **fields})
        [(self.ids, self.counted)] = encode(tokenizer, [segments(row, cfg, tokenizer)], bos=cfg.bos, eos=cfg.eos)
        self.all = tokenizer.decode(self.ids.tolist())
        self.labels = tokenizer.decode(self.ids[self.counted].tolist())


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The byte tokenizer with the chat template given."""

    def make(template: str) -> Any:
        tokenizer.chat_template = template
        return tokenizer

    yield make
    tokenizer.chat_template = None


def test_the_two_alpaca_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    with_input = Tokens(tokenizer, {"instruction": "Add {these}.", "input": "1 {x} 2", "output": "3"})
    assert with_input.all == (
        "<bos>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n1 {x} 2\n\n### Response:\n3<eos>"
    )
    assert with_input.labels == "3<eos>"
    for row in ({"instruction": "Hi.", "output": "Yo é"}, {"instruction": "Hi.", "input": None, "output": "Yo é"}):
        without = Tokens(tokenizer, row)
        assert without.all == (
            "<bos>Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nHi.\n\n### Response:\nYo é<eos>"
        )
        assert without.labels == "Yo é<eos>"
    assert Tokens(tokenizer, {"instruction": "Hi.", "output": "Yo"}, mask_prompt=False).counted.all()


def test_texts_begin_as_the_tokenizer_itself_begins_them(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"text": "The cat sat."}
    assert Tokens(tokenizer, row, bos="auto").ids[:-1].tolist() == tokenizer(row["text"])["input_ids"]
    for template, opening in (("<bos> $A", [0]), ("<pad> <bos> $A <eos>", [2, 0])):  # as GLM's, which has two
        framing = copy.deepcopy(tokenizer)
        marks = [("<bos>", 0), ("<eos>", 1), ("<pad>", 2)]
        framing.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=marks)
        found = Tokens(framing, row, bos="auto")
        assert found.ids[: len(opening)].tolist() == opening
        assert found.ids.tolist() == [*framing(row["text"])["input_ids"], *([] if "<eos>" in template else [1])]
        assert Tokens(framing, {"text": "<bos>a"}, bos="auto").all.count("<bos>") == 1 + ("<pad>" in template)
        assert Tokens(framing, row, bos="never").all == "The cat sat.<eos>"
        framing.chat_template = CHATML
        assert Tokens(framing, {"messages": TURNS}, bos="auto").all.startswith("<|im_start|>user")
        assert opening_tokens(framing) == opening


def test_a_format_asked_for_wins_over_the_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"instruction": "Hi.", "output": "Yo", "text": "whole", "messages": TURNS}
    assert Tokens(tokenizer, row).labels == "Yo<eos>"
    assert Tokens(tokenizer, row, format="text").all == "<bos>whole<eos>"
    tokenizer.chat_template = CHATML
    assert Tokens(tokenizer, row, format="chat").labels.startswith("end<|im_end|>")
    tokenizer.chat_template = None
    with pytest.raises(BadSample, match="expected a column 'instruction'; found the columns text"):
        segments({"text": "a"}, DataConfig(format="alpaca"), tokenizer)


@pytest.mark.parametrize(
    ("template", "text", "labels"),
    [
        (
            CHATML,
            "<bos><|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\nend<|im_end|>\n"
            "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nn<|im_end|>\n<eos>",
            "end<|im_end|>\nn<|im_end|>\n<eos>",
        ),
        (BRACKETS, "<bos>[INST] assistant [/INST] end<eos>[INST] and? [/INST]  n <eos>", "end<eos>n <eos>"),
        (
            THINKING,
            "<bos><user>assistant<end><assistant>end<end><user>and?<end><assistant>[thought] n <end><eos>",
            "end<end>n <end><eos>",
        ),
    ],
)
def test_only_assistant_turns_count(chat: Any, template: str, text: str, labels: str) -> None:
    tokens = Tokens(chat(template), {"messages": TURNS})
    assert (tokens.all, tokens.labels) == (text, labels)
    assert Tokens(chat(template), {"messages": TURNS}, mask_prompt=False).counted.all()


def test_a_last_user_turn_does_not_count(chat: Any) -> None:
    tokens = Tokens(chat(CHATML), {"messages": TURNS[:3]})
    assert tokens.labels == "end<|im_end|>\n"
    assert tokens.all.endswith("and?<|im_end|>\n<eos>")


def test_other_names_of_roles_and_columns_and_an_early_assistant(chat: Any) -> None:
    row = {
        "conversations": [
            {"from": "gpt", "value": "skipped"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    }
    tokens = Tokens(chat(CHATML), row)
    assert tokens.labels == "a<|im_end|>\n<eos>"
    assert "skipped" not in tokens.all
    system = [{"role": "system", "content": "be brief"}, *TURNS]
    assert "be brief" in Tokens(chat(CHATML), {"messages": system}).all


def test_long_llm_rows(chat: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    assert Tokens(tokenizer, {"text": "a book", "conversations": TURNS}).labels == "<bos>a book<eos>"  # no template
    wanted = Tokens(chat(BRACKETS), {"conversations": TURNS})
    assert wanted.labels == "end<eos>n <eos>"
    for first in ({"role": "system", "content": "be brief"}, {"role": "assistant", "content": "hello"}):
        for text in ({}, {"text": None}):
            found = Tokens(chat(BRACKETS), {**text, "conversations": [first, *TURNS]})
            assert (found.all, found.labels) == (wanted.all, wanted.labels)
    kept = {"conversations": [{"from": "system", "value": "be brief"}, *TURNS]}
    assert "be brief" in Tokens(chat(CHATML), kept).all
    with pytest.raises(BadSample, match="found the columns meta"):
        segments({"meta": 1, "text": None, "conversations": None}, DataConfig(), tokenizer)
    with pytest.raises(BadSample, match="no assistant turn"):
        segments({"conversations": []}, DataConfig(), tokenizer)


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"messages": TURNS[:1]}, "no assistant turn", "no assistant turn"),
        ({"messages": "text"}, "missing column", "expected a list of turns"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "content": ""}]}, "empty content", "'content' is empty"),
        ({"messages": [*TURNS[:1], {"role": "assistant"}]}, "missing column", "found the columns role"),
        ({"messages": [{"role": "system", "content": "s"}, *TURNS]}, "chat template", "refuses .* only user"),
    ],
)
def test_bad_conversations(chat: Any, row: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(BadSample, match=message) as raised:
        segments(row, DataConfig(), chat(BRACKETS))
    assert raised.value.reason == reason


def test_a_template_that_changes_the_answer(chat: Any) -> None:
    with pytest.raises(BadSample, match="does not reproduce the text of turn 2"):
        segments(
            {"messages": TURNS[:2]}, DataConfig(), chat("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
        )


def test_no_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="the tokenizer has no chat template: take the model's instruct version"):
        segments({"messages": TURNS}, DataConfig(on_bad_row="skip"), tokenizer)


class SlowTokenizer:
    """The byte tokenizer without offsets, BOS and EOS."""

    is_fast = False
    bos_token_id = eos_token_id = None

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.fast = fast

    def __call__(self, text: str, **options: Any) -> Any:
        return self.fast(text, **options)

    def decode(self, ids: list[int]) -> str:
        return str(self.fast.decode(ids))


def test_a_tokenizer_without_offsets_bos_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"instruction": "Hi.", "output": "Yo é"}
    slow, fast = Tokens(SlowTokenizer(tokenizer), row), Tokens(tokenizer, row)
    assert slow.ids.tolist() == fast.ids[1:-1].tolist()
    assert slow.counted.tolist() == fast.counted[1:-1].tolist()


@pytest.mark.skipif(not (SHARED / "models/stories260K").is_dir(), reason="no shared stories260K model")
def test_a_sentencepiece_style_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    tokens = Tokens(tokenizer, {"instruction": "Tell me.", "output": "Once upon a time"})
    assert tokens.labels == "Once upon a time</s>"
    assert tokens.ids[0] == 1
    assert tokens.all.endswith("### Response:\nOnce upon a time</s>")

"""Conversations reach the chat template whole, and what counts is what the model would write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trenchcoat.config import DataConfig
from trenchcoat.data import chat
from trenchcoat.data.formats import segments
from trenchcoat.data.samples import BadSample

TOOLS = (  # as ChatML models with tools: the tools in front, calls after the text, earlier thoughts removed
    "{% if tools %}[tools: {{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if '</think>' in m.content and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments.city }})]{% endfor %}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerFast) -> Iterator[Any]:
    """``read(row, **DataConfig fields)`` -> (whole text, the text that counts) under the template above."""
    tokenizer.chat_template = TOOLS
    chat._say.cache_clear()

    def run(row: dict[str, Any], **fields: Any) -> tuple[str, str]:
        found = segments(row, DataConfig(**fields), tokenizer)
        return "".join(text for text, _ in found), "|".join(text for text, counted in found if counted)

    yield run
    tokenizer.chat_template = None


def test_tool_calls_and_tools_reach_the_template(read: Any) -> None:
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "name": "weather"},
        {"role": "assistant", "content": "Rain."},
    ]
    for tools in ([WEATHER], json.dumps([WEATHER])):
        whole, counted = read({"messages": turns, "tools": tools})
        assert whole.startswith('[tools: [{"type": "function"')
        assert "<assistant>[weather(Oslo)]<end>\n<tool>rain<end>" in whole
        assert counted == "[weather(Oslo)]<end>\n|Rain.<end>\n"
    with pytest.raises(BadSample, match="column 'tools' holds text that is not JSON"):
        read({"messages": turns, "tools": "{"})


def test_roles_of_sharegpt(read: Any) -> None:
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})},
        {"from": "observation", "value": "rain"},
        {"from": "chatgpt", "value": "Rain."},
        {"from": "human", "value": "Sure?"},
        {"from": "model", "value": "Yes."},
    ]
    whole, counted = read({"conversations": turns})
    assert whole.startswith("<system>Be kind.<end>\n<user>weather?<end>\n<assistant>[weather(Oslo)]<end>\n<tool>rain")
    assert counted == "[weather(Oslo)]<end>\n|Rain.<end>\n|Yes.<end>\n"
    turns[2]["value"] = "I call it by words"
    assert read({"conversations": turns})[1].startswith("I call it by words<end>")


def test_an_unknown_role_is_named_once(read: Any, recwarn: pytest.WarningsRecorder) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "c"}]}
    for _ in range(2):
        assert read(row) == ("<user>a<end>\n<narrator>b<end>\n<assistant>c<end>\n", "c<end>\n")
    assert [str(one.message)[:45] for one in recwarn] == ["a conversation has the role 'narrator', which"]


def test_the_columns_system_and_history(read: Any) -> None:
    row = {"system": "Be kind.", "history": [["a", "b"]], "messages": [
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]}  # fmt: skip
    expected = "<system>Be kind.<end>\n<user>a<end>\n<assistant>b<end>\n<user>c<end>\n<assistant>d<end>\n"
    assert read(row) == (expected, "b<end>\n|d<end>\n")
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read({**row, "history": earlier})[0] == expected
    own = [{"role": "system", "content": "Mine."}, *row["messages"]]
    assert read({**row, "messages": own, "history": None})[0].startswith("<system>Mine.<end>\n<user>c")
    alpaca = {"instruction": "c", "output": "d", "system": "Be kind.", "history": [["a", "b"]]}
    whole, counted = read(alpaca)
    assert whole.startswith("Be kind.\n\nBelow is an instruction")
    assert whole.count("### Response:\n") == 2
    assert counted == "b|d"
    with pytest.raises(BadSample, match=r"'history' should hold a list of \[question, answer\] pairs"):
        read({**alpaca, "history": ["a"]})


def test_reasoning_is_trained_on_where_the_template_keeps_it(read: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    assert read({"messages": turns}) == ("<user>a<end>\n<assistant><think>hm</think>b<end>\n",
                                         "<think>hm</think>b<end>\n")  # fmt: skip


@pytest.mark.parametrize("more", [[], [{"role": "user", "content": "thanks"}]])
def test_rewritten_answers_leave_the_last_one_and_say_so(read: Any, more: list[dict[str, str]]) -> None:
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "<think>y</think>d"},
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="rewrites earlier answers .* only the last answer"):
        whole, counted = read({"messages": [*turns, *more]})
    assert whole == "<user>a<end>\n<assistant>b<end>\n<user>c<end>\n<assistant><think>y</think>d<end>\n"
    assert counted == "<think>y</think>d<end>\n"


def test_text_in_parts_and_turns_without_any(read: Any) -> None:
    asked = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert read({"messages": [asked, {"role": "assistant", "content": "c"}]})[0].startswith("<user>ab<end>")
    with pytest.raises(BadSample, match="an assistant's turn has neither text nor tool calls"):
        read({"messages": [asked, {"role": "assistant", "content": None}]})
    picture = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(BadSample, match="holds a part that is not text"):
        read({"messages": [picture, {"role": "assistant", "content": "c"}]})
    with pytest.raises(BadSample, match="the chat template fails on the conversation"):
        read({"messages": [asked, {"role": "tool", "content": 7}, {"role": "assistant", "content": "c"}]})

"""What a request may contain: every field with its bounds, everything else refused by name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from trenchcoat.serving.refusals import Refused, quoted
from trenchcoat.serving.requests import CHAT, COMPLETION, MAX_CHOICES, Request, read_request

HI = [{"role": "user", "content": "hi"}]


def read(**fields: Any) -> Request:
    chat = "messages" in fields
    return read_request(fields if chat else {"prompt": "x", **fields}, chat=chat)


def refusal(**fields: Any) -> str:
    with pytest.raises(Refused) as caught:
        read(**fields)
    assert caught.value.status == 400
    assert len(caught.value.message) < 400, "a message quotes a value of any size"
    json.dumps(caught.value.json()).encode()
    return caught.value.message


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "field",
    [
        "generation_config",
        "chat_template_kwargs",
        "chat_template",
        "num_beams",
        "documents",
        "windw",
        "prefix",
        "\ud83d",
    ],
)
def test_fields_that_are_not_known_are_refused(field: str, chat: bool) -> None:
    for value in ({}, "{}", True, {"num_beams": 300}, {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}):
        fields: dict[str, Any] = {"messages": HI} if chat else {}
        assert "is not a field that this server knows" in refusal(**fields, **{field: value})


@pytest.mark.parametrize("name", sorted(COMPLETION.keys() | CHAT.keys()))
def test_every_field_takes_null_and_no_field_takes_everything(name: str) -> None:
    """Values of the wrong kind are refused with a short message, or belong to a field that changes nothing."""
    fields: dict[str, Any] = {"messages": HI} if name in CHAT and name not in COMPLETION else {}
    if name not in ("messages", "prompt"):
        assert read(**fields, **{name: None}) == read(**fields)
    values = [3.5, "x", [[["x"]]], {"a": {"b": "c"}}, True, float("nan"), 10**400, ["x"] * 100_000, "y" * 10**6]
    refused = 0
    for value in values:
        try:
            read_request(
                {"prompt": "x", **fields, name: value} if name in COMPLETION else fields | {name: value},
                chat=name not in COMPLETION,
            )
        except Refused as error:
            refused += len(error.message) < 400
    ignored = name in ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
    assert refused >= 5 or ignored or name == "parallel_tool_calls"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 2.1}, "temperature is 2.1; expected a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": 2**63}, "seed is"),
        ({"n": 0}, "n is 0"),
        ({"n": 10**9}, "n is 1000000000"),
        ({"n": 2, "prompt": ["a"] * 20}, f"40 texts; this server writes at most {MAX_CHOICES}"),
        ({"best_of": 2}, "best_of=2 is not available"),
        ({"suffix": "x"}, "suffix='x' is not available"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"echo": 1}, "echo is 1; expected true or false"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop": ["x"] * 17}, "stop has 17 strings; expected at most 16"),
        ({"stop": ["x"] * 10_000}, "stop has 10000 strings"),
        ({"stop": "y" * 257}, "of 1 to 256 characters"),
        ({"stop": ["a", ""]}, "of 1 to 256 characters"),
        ({"logit_bias": {"x": 1}}, "logit_bias names 'x'"),
        ({"logit_bias": {"²": 1}}, "logit_bias names '²'"),
        ({"logit_bias": {"5": 101}}, "logit_bias of 5 is 101"),
        ({"logit_bias": {str(token): 1 for token in range(2000)}}, "an object of 2000 fields"),
        ({"prompt": []}, "prompt is []"),
        ({"prompt": [1, "a"]}, "expected a string, token ids"),
        ({"prompt": [[1], []]}, "expected a string, token ids"),
        ({"prompt": [True]}, "expected a string, token ids"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage is 1"),
        ({"stream_options": {"x": 1}}, "expected an object with include_usage"),
        ({"messages": []}, "at least one message"),
        ({"messages": HI * 5000}, "messages has 5000"),
        ({"messages": ["hi"]}, "messages[0] is 'hi'"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role is None"),
        ({"messages": HI, "response_format": {"type": "json_object"}}, "is not available"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice='required' is not available"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "expected a function with a name"),
        ({"messages": HI, "functions": [{"name": "f"}]}, "is not available"),
        ({"messages": HI, "top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"messages": HI, "logprobs": 3}, "logprobs is 3; expected true or false"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_out_of_bounds(fields: dict[str, Any], said: str) -> None:
    assert said in refusal(**fields)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            {"type": "image_url", "image_url": {"url": "data:,"}},
            "a part of type 'image_url'; this server reads text only",
        ),
        ({"type": "input_audio", "input_audio": {}}, "a part of type 'input_audio'"),
        ({"type": "text"}, "a part whose text is None"),
        ("hi", "a part of type 'hi'"),
        ({}, "a part of type None"),
    ],
    ids=str,
)
def test_parts_that_cannot_be_read_are_refused(part: Any, said: str) -> None:
    content = [{"type": "text", "text": "look"}, part]
    assert said in refusal(messages=[{"role": "user", "content": content}])


def test_fields_of_a_message_that_cannot_be_read_are_refused() -> None:
    assert "messages[0] has 'audio'" in refusal(messages=[{"role": "user", "content": "x", "audio": {"id": "a"}}])
    sent_back = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}
    assert read(messages=[*HI, sent_back]).messages[1] == {"role": "assistant", "content": "x"}


def test_messages_reach_the_template_whole() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    function = {"name": "f", "arguments": {"a": 1}}
    assert read(messages=messages).messages == (
        {"role": "user", "content": "one two", "name": "Ada"},
        {"role": "assistant", "content": "", "tool_calls": [call | {"function": function}], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    )
    assert "arguments that are not JSON" in refusal(
        messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    )


def test_what_common_clients_send_is_accepted() -> None:
    chat = read(
        messages=HI, model="m", response_format={"type": "text"}, logit_bias={"5": -100, "6": 1.5}, n=2, seed=-1,
        stream_options={"include_usage": True, "include_obfuscation": False}, stream=True, logprobs=True,
        top_logprobs=2,
        stop="x", max_completion_tokens=7, max_tokens=9, user="u", metadata={"a": "b"}, store=False, tools=[],
        tool_choice="auto", parallel_tool_calls=True, presence_penalty=0, frequency_penalty=-2, modalities=["text"],
        functions=None, service_tier="auto", top_k=-1, min_p=0, repetition_penalty=1,
    )  # fmt: skip
    assert (chat.logit_bias, chat.stop, chat.max_tokens, chat.logprobs) == ({5: -100.0, 6: 1.5}, ("x",), 7, 2)
    assert (chat.include_usage, chat.stream, chat.n, chat.chat) == (True, True, 2, True)
    assert read(messages=HI, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none").tools == ()
    plain = read(prompt=[[1, 2], [3]], echo=True, max_tokens=0, logprobs=0, best_of=1, suffix="")
    assert (plain.prompts, plain.max_tokens, plain.logprobs, plain.chat) == (([1, 2], [3]), 0, 0, False)
    assert read(prompt=[1, 2]).prompts == ([1, 2],)
    assert read(prompt="a").prompts == ("a",)


def test_values_of_any_size_are_quoted_in_few_characters_and_no_time() -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    began = time.monotonic()
    for value in (deep, ["x" * 10**6] * 5, {"k" * 10**6: 1}, 10**5000, "x" * 10**7, list(range(10**6)), {"a": deep}):
        assert len(quoted(value)) <= 63
    assert time.monotonic() - began < 1

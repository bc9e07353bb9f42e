"""What `serving/tool_calls.py` expects of the internals of Transformers' server, and what is made of an answer.

If a release of Transformers changes one of them, this test fails and names it.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.cli.serving import utils

from conftest import byte_tokenizer
from trenchcoat.serving.tool_calls import AnswerParser


def test_functions_take_what_we_pass() -> None:
    assert list(inspect.signature(utils.build_response_parser).parameters) == [
        "processor",
        "model",
        "input_ids",
        "tools",
    ]
    assert list(inspect.signature(utils.get_response_template).parameters) == ["processor", "model"]
    assert list(inspect.signature(utils.response_events_to_chunks).parameters) == ["events"]
    call = utils.ToolCall(name="f", arguments="{}")
    assert (call.name, call.arguments) == ("f", "{}")
    assert issubclass(utils.ReasoningText, str)


def parsed(kind: str, *texts: str, prompt: str = "ab") -> dict[str, str] | None:
    """The text of each kind of part of an answer."""
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=kind))
    tokenizer: Any = byte_tokenizer()
    parser = AnswerParser.of(model, tokenizer, tokenizer(prompt)["input_ids"], None)
    if parser is None:
        return None
    found: dict[str, str] = {}
    for part in [part for text in texts for part in parser.push(text)] + parser.flush():
        found[f"{part.kind} {part.name}".strip()] = found.get(f"{part.kind} {part.name}".strip(), "") + part.text
    return found


CALL = '<tool_call>{"name": "look", "arguments": {"place": "pocket"}}</tool_call>'


def test_answers_of_models_without_a_parser_are_text() -> None:
    assert parsed("llama", "x") is None


@pytest.mark.parametrize("prompt", ["user: hi\nassistant:", "<|im_start|>assistant\n"])
def test_tool_calls_and_reasoning_are_found_and_nothing_of_the_prompt(prompt: str) -> None:
    found = parsed("qwen3", "<think>h", "m</think>", "let me ", "see", CALL, "<|im_end|>", prompt=prompt)
    assert found == {"reasoning": "hm", "content": "let me see", "tool look": '{"place": "pocket"}'}


def test_reasoning_that_the_prompt_begins_is_reasoning() -> None:
    found = parsed("qwen3", "hm</think>", "x<|im_end|>", prompt="<|im_start|>assistant\n<think>\n")
    assert found == {"reasoning": "\nhm", "content": "x"}


def test_an_answer_that_ends_within_a_call_is_no_error() -> None:
    assert parsed("qwen3", "a ", '<tool_call>{"name": ') == {"content": "a"}


def test_the_server_needs_nothing_but_uvicorn() -> None:
    """Transformers' own server has more dependencies, which the extra `serve` leaves out."""
    absent = "import sys; sys.modules.update(dict.fromkeys(('fastapi', 'starlette', 'openai')))"
    imports = "import trenchcoat.serving.web, trenchcoat.serving.process"
    done = subprocess.run([sys.executable, "-c", f"{absent}; {imports}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

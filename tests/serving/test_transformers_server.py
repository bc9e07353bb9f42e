"""What `serving/transformers_server.py` expects of the internals of Transformers' server.

If a release of Transformers changes one of these, this test fails and names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from transformers import StoppingCriteria
from transformers.cli.serving import chat_completion, completion, server, utils
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState

from trenchcoat.serving import transformers_server as ours

_GENERATE = ["self", "model", "processor", "inputs", "gen_config", "request_id"]


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (ModelManager.process_model_name, ["model_id"]),
        (ModelManager.get_gen_models, ["cache_dir"]),
        (GenerateManager.generate_streaming, [*_GENERATE, "response_parser"]),
        (GenerateManager.generate_non_streaming, _GENERATE),
        (GenerateManager.submit, ["self", "fn", "args", "kwargs"]),
        (GenerationState.get_manager, ["self", "model_id", "use_cb"]),
        (completion.CompletionHandler.handle_request, ["self", "body", "request_id"]),
        (chat_completion.ChatCompletionHandler.handle_request, ["self", "body", "request_id"]),
        (BaseHandler._build_generation_config, ["self", "body", "model_generation_config", "use_cb"]),
        (utils._StreamError, ["msg"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_functions_take_what_we_pass(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_the_server_takes_handlers_that_we_know() -> None:
    """5.23 added systemone_handler."""
    known = ["chat_handler", "completion_handler", "response_handler", "transcription_handler", "systemone_handler"]
    names = ours.handler_names()
    assert names in (known, known[:-1])
    parameters = list(inspect.signature(server.build_server).parameters)
    assert parameters == ["model_manager", *names, "generation_state", "enable_cors"]


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (ours.SingleModelManager, ModelManager),
        (ours.Generator, GenerateManager),
        (ours.SharedGenerator, GenerationState),
        (ours.Completions, completion.CompletionHandler),
        (ours.Chat, chat_completion.ChatCompletionHandler),
        (ours.Cancellation, StoppingCriteria),
    ],
    ids=lambda value: value.__name__,
)
def test_what_we_override_exists(own: type, theirs: type) -> None:
    """Every overridden method exists in the library, and is a coroutine if the library's is."""
    assert issubclass(own, theirs)
    added = {"wait", "check", "_cancellable", "_measured"}
    for name, method in inspect.getmembers(own, inspect.isfunction):
        if method.__module__ != ours.__name__ or name in added or name == "__init__":
            continue
        inherited = getattr(theirs, name)
        assert inspect.iscoroutinefunction(method) == inspect.iscoroutinefunction(inherited), name


def test_a_model_manager_without_a_timeout_loads_nothing() -> None:
    manager = ModelManager(model_timeout=-1)
    assert manager.force_model is None
    assert callable(manager.shutdown)
    assert {"model_id", "gguf_file"} & set(inspect.signature(manager.load_model_and_processor).parameters)


def test_generations_of_one_thread_run_in_order() -> None:
    seen: list[int] = []
    generator = GenerateManager()
    futures = [generator.submit(seen.append, number) for number in range(5)]
    futures[-1].result(timeout=10)
    assert seen == list(range(5))


def test_handlers_name_what_they_do_not_support() -> None:
    for handler in (completion.CompletionHandler, chat_completion.ChatCompletionHandler):
        assert {"n", "logprobs"} & handler._unused_fields
        assert issubclass(handler, BaseHandler)
    assert "best_of" in completion.CompletionHandler._unused_fields


def test_errors_of_a_stream_hold_their_message() -> None:
    assert utils._StreamError('a "quoted" message').msg == 'a "quoted" message'
    assert ours._EscapedErrors._escaped(utils._StreamError('a "b"')).msg == r"a \"b\""
    assert ours._EscapedErrors._escaped("text") == "text"


def test_the_routes_that_are_kept_exist() -> None:
    handlers: dict[str, Any] = dict.fromkeys(ours.handler_names())
    app = server.build_server(ModelManager(model_timeout=-1), generation_state=GenerationState(), **handlers)
    assert set(ours.ROUTES) <= {getattr(route, "path", None) for route in app.router.routes}

"""Everything that depends on the internals of Transformers' server (`transformers.cli.serving`), in one file.

They are not a public interface: `tests/serving/test_transformers_server.py` states what we expect of each, so that a
new release of Transformers breaks that test and this file, and nothing else. Imported only when serving: it needs the
extra `serve`.
"""

from __future__ import annotations

import inspect
import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import jinja2
import torch
from fastapi import FastAPI, HTTPException
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from trenchcoat.serving.requests import CLIENT_GONE, check_body, refuse

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
"""The routes that are kept. The library's others are for other kinds of models, or load and unload models."""


class SingleModelManager(ModelManager):
    """The library's model manager with a single model under one name."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__(model_timeout=-1)
        self.force_model = name
        self.pair = (model, tokenizer)
        self.created = int(time.time())

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(model, tokenizer) for any name: requests for other models have been refused before."""
        return self.pair

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: there are no revisions."""
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The entry of `/v1/models`."""
        return [{"id": self.force_model, "object": "model", "owned_by": "trenchcoat", "created": self.created}]


class Cancellation(StoppingCriteria):
    """Cancels a generation whose client has disconnected or whose server is stopping."""

    def __init__(self, stopping: threading.Event, client_gone: threading.Event | None) -> None:
        self.stopping, self.client_gone = stopping, client_gone

    def check(self) -> None:
        """Raise if the generation should end."""
        if self.stopping.is_set():
            raise HTTPException(status_code=503, detail="the server is stopping")
        if self.client_gone is not None and self.client_gone.is_set():
            raise HTTPException(status_code=499, detail="the client is gone")

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Called after every token; returns bool [rows], all False."""
        self.check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _CancellableModel:
    """A model whose `generate` checks for cancellation before it starts and after every token."""

    def __init__(self, model: Any, cancellation: Cancellation) -> None:
        self._model, self._cancellation = model, cancellation

    def generate(self, **kwargs: Any) -> Any:
        """As the model's."""
        self._cancellation.check()
        return self._model.generate(**kwargs, stopping_criteria=StoppingCriteriaList([self._cancellation]))


class _EscapedErrors:
    """A stream's queue that escapes error messages for JSON, since the library puts them in quotes unescaped."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    async def get(self) -> Any:
        """Wait for the next item."""
        return self._escaped(await self._queue.get())

    def get_nowait(self) -> Any:
        """The next item; raises if there is none yet."""
        return self._escaped(self._queue.get_nowait())

    @staticmethod
    def _escaped(piece: Any) -> Any:
        return _StreamError(json.dumps(piece.msg)[1:-1]) if isinstance(piece, _StreamError) else piece


class Generator(GenerateManager):
    """The library's generation thread, with a limit on prompt length and with cancellation."""

    def __init__(self, context: int | None, stopping: threading.Event) -> None:
        super().__init__()
        self.context, self.stopping = context, stopping

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[Any, Any]:
        """As the library's; a 400 for a prompt that is empty or too long."""
        plain, model = self._measured(inputs, gen_config), self._cancellable(model)
        queue, streamer = super().generate_streaming(model, processor, plain, gen_config, request_id, response_parser)
        return _EscapedErrors(queue), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """As the library's; a 400 for a prompt that is empty or too long."""
        plain, model = self._measured(inputs, gen_config), self._cancellable(model)
        return await super().generate_non_streaming(model, processor, plain, gen_config, request_id)

    def _cancellable(self, model: Any) -> _CancellableModel:
        return _CancellableModel(model, Cancellation(self.stopping, CLIENT_GONE.get()))

    def _measured(self, inputs: Mapping[str, Tensor], gen_config: Any) -> dict[str, Tensor]:
        """Token ids and mask; limits `max_new_tokens` to the rest of the context."""
        tokens = inputs["input_ids"].shape[-1]
        if tokens == 0:
            raise refuse("the prompt has no token; give a text")
        if self.context is not None:
            if tokens >= self.context:
                raise refuse(f"the prompt has {tokens} tokens; this server takes fewer than {self.context}")
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, self.context - tokens)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def wait(self, seconds: float) -> None:
        """Wait until the generation thread is idle."""
        try:
            self.submit(lambda: None).result(timeout=seconds)
        except TimeoutError:
            logging.getLogger("uvicorn.error").warning("a generation was still running after %.0f s", seconds)


class SharedGenerator(GenerationState):
    """One generator for every route."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generator:
        """That generator."""
        return self.generator


class _CheckedHandler:
    """Mixin for both of the library's handlers: invalid requests get a 400 instead of a 500."""

    _unused_fields: set[str]
    model_manager: SingleModelManager

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The library's answer; a 400 for a request that cannot be answered."""
        check_body(body, self._unused_fields)
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except KeyError as error:
            raise refuse(f"the request lacks {error}") from error
        except (ValueError, TypeError, AttributeError, jinja2.TemplateError) as error:
            raise refuse(f"this request cannot be answered: {' '.join(str(error).split())[:300]}") from error

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the library's, but a temperature or top_p turns sampling on even if the model's own config is greedy."""
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if (temperature is not None and temperature > 0) or (temperature is None and top_p not in (None, 1, 1.0)):
            config.do_sample = True
        return config


class Completions(_CheckedHandler, CompletionHandler):
    """`/v1/completions`."""


class Chat(_CheckedHandler, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """A 400 where the tokenizer has no chat template."""
        if getattr(self.model_manager.pair[1], "chat_template", None) is None:
            raise refuse(
                "this model's tokenizer has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE"
            )
        return await super().handle_request(body, request_id)


def handler_names() -> list[str]:
    """The kinds of requests that the library's server has handlers for; new releases add some."""
    return [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]


def build_app(model: Any, tokenizer: Any, name: str, generator: Generator) -> FastAPI:
    """The library's application for one model, without the routes that are not in ``ROUTES``."""
    state, manager = SharedGenerator(generator), SingleModelManager(model, tokenizer, name)
    handlers: dict[str, Any] = dict.fromkeys(handler_names())
    handlers.update(chat_handler=Chat(manager, state), completion_handler=Completions(manager, state))
    app = build_server(manager, generation_state=state, **handlers)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    return app

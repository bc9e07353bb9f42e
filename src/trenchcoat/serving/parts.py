"""The parts of Transformers' server with what linearized models and careful clients need; see the package.

Imported only when serving: it needs the extra `serve`. Written against transformers 5.23.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import jinja2
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError
from transformers.utils import logging as library_logging

from trenchcoat.config import UserError

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
"""What is served. The library's other routes are for other kinds of models, or load and unload models."""

_GONE: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("gone", default=None)
"""Set when the client of the request at hand has hung up."""

_HARMLESS = {"user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls"}
"""Fields without effect here whose absence of effect misleads nobody."""

_MEANS_NOTHING: dict[str, tuple[Any, ...]] = {"n": (1,), "best_of": (1,), "presence_penalty": (0,)}
"""Values that ask for what happens anyway; None, False and an empty list always do."""

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "frequency_penalty": (-0.99, 2.0),
    "max_tokens": (1, float("inf")),
    "max_completion_tokens": (1, float("inf")),
}
_WHOLE = ("max_tokens", "max_completion_tokens", "seed")


def refuse(message: str) -> HTTPException:
    """The client's mistake."""
    return HTTPException(status_code=400, detail=message)


def check_body(body: Mapping[str, Any], unsupported: set[str]) -> None:
    """Raise a 400 naming the first field that asks for what is not there, or whose value is impossible."""
    for name in sorted(body.keys() & (unsupported - _HARMLESS)):
        value = body[name]
        if value is not None and value is not False and value != [] and value not in _MEANS_NOTHING.get(name, ()):
            raise refuse(f"{name}={value!r} is not available on this server; leave it out")
    for name, (low, high) in _RANGES.items():
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise refuse(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")
    for name in _WHOLE:
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise refuse(f"{name} is {value!r}; expected a whole number")
    stop = body.get("stop")
    if stop is not None and not (isinstance(stop, str) or _is_strings(stop)):
        raise refuse(f"stop is {stop!r}; expected a text or a list of texts")


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


class OneModel(ModelManager):
    """The library's store of models, holding the one that is served, under one name."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__(model_timeout=-1)
        self.force_model = name
        self.pair = (model, tokenizer)
        self.created = int(time.time())

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(model, tokenizer), whatever is asked for: another name was refused before."""
        return self.pair

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name itself: there are no revisions."""
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The entry of `/v1/models`."""
        return [{"id": self.force_model, "object": "model", "owned_by": "trenchcoat", "created": self.created}]


class Halt(StoppingCriteria):
    """Ends a generation from outside: its client is gone, or the server has waited long enough."""

    def __init__(self, stopping: threading.Event, gone: threading.Event | None) -> None:
        self.stopping, self.gone = stopping, gone

    def check(self) -> None:
        """Raise when it is time to end."""
        if self.stopping.is_set():
            raise HTTPException(status_code=503, detail="the server is stopping")
        if self.gone is not None and self.gone.is_set():
            raise HTTPException(status_code=499, detail="the client is gone")

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """After every token; bool [rows], all False."""
        self.check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Watched:
    """A model whose `generate` begins only when nobody has called it off while it waited."""

    def __init__(self, model: Any, halt: Halt) -> None:
        self._model, self._halt = model, halt

    def generate(self, **kwargs: Any) -> Any:
        self._halt.check()
        return self._model.generate(**kwargs, stopping_criteria=StoppingCriteriaList([self._halt]))


class _Pieces:
    """A stream's queue whose errors may stand between quotes in JSON, where the library puts them as they are."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    async def get(self) -> Any:
        return self._quotable(await self._queue.get())

    def get_nowait(self) -> Any:
        return self._quotable(self._queue.get_nowait())

    @staticmethod
    def _quotable(piece: Any) -> Any:
        return _StreamError(json.dumps(piece.msg)[1:-1]) if isinstance(piece, _StreamError) else piece


class Generator(GenerateManager):
    """The library's one generating thread; prompts are measured first, and what runs can be called off."""

    def __init__(self, context: int | None, stopping: threading.Event) -> None:
        super().__init__()
        self.context, self.stopping = context, stopping

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[Any, Any]:
        """As the library's; a 400 for a prompt that is empty or too long."""
        plain, watched = self._measured(inputs, gen_config), self._watched(model)
        queue, streamer = super().generate_streaming(watched, processor, plain, gen_config, request_id, response_parser)
        return _Pieces(queue), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """As the library's; a 400 for a prompt that is empty or too long."""
        plain = self._measured(inputs, gen_config)
        return await super().generate_non_streaming(self._watched(model), processor, plain, gen_config, request_id)

    def _watched(self, model: Any) -> _Watched:
        return _Watched(model, Halt(self.stopping, _GONE.get()))

    def _measured(self, inputs: Mapping[str, Tensor], gen_config: Any) -> dict[str, Tensor]:
        """Token ids and mask; `max_new_tokens` comes down to what the context leaves."""
        tokens = inputs["input_ids"].shape[-1]
        if tokens == 0:
            raise refuse("the prompt has no token; give a text")
        if self.context is not None:
            if tokens >= self.context:
                raise refuse(f"the prompt has {tokens} tokens; this server takes fewer than {self.context}")
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, self.context - tokens)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def wait(self, seconds: float) -> None:
        """Until the generating thread has nothing left to do."""
        try:
            self.submit(lambda: None).result(timeout=seconds)
        except TimeoutError:
            logging.getLogger("uvicorn.error").warning("a generation was still running after %.0f s", seconds)


class State(GenerationState):
    """One generator for every route."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generator:
        """The one there is."""
        return self.generator


class _Careful:
    """What both handlers do around the library's: mistakes in a request are the client's, not the server's."""

    _unused_fields: set[str]
    model_manager: OneModel

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The library's answer; a 400 in words for a request that cannot be answered."""
        check_body(body, self._unused_fields)
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except KeyError as error:
            raise refuse(f"the request lacks {error}") from error
        except (ValueError, TypeError, AttributeError, jinja2.TemplateError) as error:
            raise refuse(f"this request cannot be answered: {' '.join(str(error).split())[:300]}") from error

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The library's; a temperature or top_p asks for sampling, also where the model's own settings are greedy."""
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if (temperature is not None and temperature > 0) or (temperature is None and top_p not in (None, 1, 1.0)):
            config.do_sample = True
        return config


class Completions(_Careful, CompletionHandler):
    """`/v1/completions`."""


class Chat(_Careful, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """A 400 where the tokenizer has no chat template."""
        if getattr(self.model_manager.pair[1], "chat_template", None) is None:
            raise refuse(
                "this model's tokenizer has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE"
            )
        return await super().handle_request(body, request_id)


class Attentive:
    """ASGI middleware: notices a client that hangs up, at once and on every route, and tells the generation.

    A request's body is read whole; from then on the only further message there can be is the hang-up.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        gone, hung_up = threading.Event(), asyncio.Event()
        _GONE.set(gone)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            hung_up.set()

        async def replay() -> Any:
            if messages:
                return messages.pop(0)
            await hung_up.wait()
            return {"type": "http.disconnect"}

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, replay, send)
        finally:
            watcher.cancel()


class Server(uvicorn.Server):
    """uvicorn, stopping in two steps: no new requests at once, an end to the running ones after a grace period."""

    def __init__(self, config: uvicorn.Config, generator: Generator, grace: float) -> None:
        super().__init__(config)
        self.generator, self.grace = generator, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: as above. Second: end the running requests now. Third: leave everything."""
        if self.generator.stopping.is_set():
            self.force_exit = True
        elif self.should_exit:
            self.generator.stopping.set()
        else:
            self.should_exit = True
            timer = threading.Timer(self.grace, self.generator.stopping.set)
            timer.daemon = True
            timer.start()

    def run_until_signal(self) -> None:
        """Serve; returns when a signal has ended it. Raises UserError when the address cannot be had."""
        try:
            self.run()
        except SystemExit as error:  # uvicorn's way to say that it could not start
            place = f"{self.config.host}:{self.config.port}"
            raise UserError(f"cannot listen on {place}: in use, or not this machine's; choose other ones") from error
        finally:
            self.generator.stopping.set()
            self.generator.wait(10.0)


def _answer_errors_as_clients_expect(app: FastAPI) -> None:
    """Errors in the OpenAI form, whose message is what the client packages show."""

    def answer(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    @app.exception_handler(AnyHTTPException)
    async def told(request: Request, error: AnyHTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        words = "; ".join(str(item.get("msg")) for item in error.errors())
        return answer(400, f"the body is no JSON object that can be read: {words}")


def build(model: Any, tokenizer: Any, *, name: str, context: int | None, cfg: Any) -> Server:
    """The server, not yet listening. Raises UserError for an unknown log level."""
    levels = list(library_logging.log_levels)
    if cfg.log_level not in levels:
        raise UserError(f"--log-level is {cfg.log_level!r}; known: {', '.join(levels)}")
    library_logging.set_verbosity(library_logging.log_levels[cfg.log_level])
    generator = Generator(context, threading.Event())
    state, store = State(generator), OneModel(model, tokenizer, name)
    absent: Any = None
    app = build_server(
        store,
        Chat(store, state),
        completion_handler=Completions(store, state),
        response_handler=absent,
        transcription_handler=absent,
        systemone_handler=absent,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    _answer_errors_as_clients_expect(app)
    config = uvicorn.Config(
        Attentive(app),
        host=cfg.host,
        port=cfg.port,
        log_level="warning" if cfg.log_level == "warn" else cfg.log_level,
        timeout_graceful_shutdown=int(cfg.grace) + 30,
    )
    return Server(config, generator, cfg.grace)

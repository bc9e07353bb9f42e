"""An OpenAI-compatible server for one linearized model: the embedded default, for one user, or vLLM's.

`requests` reads requests, `engine` runs the model, `answers` writes answers, `web` is the HTTP layer, `process` the
server process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trenchcoat.config import UserError
from trenchcoat.models import hub
from trenchcoat.models.attach import set_mode, student_config
from trenchcoat.models.lora import remove_lora
from trenchcoat.serving import vllm_server

if TYPE_CHECKING:
    from trenchcoat.serving.process import Server
    from trenchcoat.serving.web import Limits

LOG_LEVELS = ("debug", "info", "warning", "error")
KEY_VARIABLE = "TRENCHCOAT_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a model is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    """Model name in requests; None: the folder's."""
    context: int | None = None
    """Tokens of a prompt and its answer together; None: the base model's `max_position_embeddings`."""
    grace: float = 30.0
    """Seconds that running requests get after the first Ctrl-C or SIGTERM."""
    chat_template: str | None = None
    """File with a chat template (Jinja), for tokenizers without one."""
    device: str = "auto"
    dtype: str = "auto"
    base: str | None = None
    """Path of an adapter's base model, if it has moved."""
    log_level: str = "info"
    """info: one line for each request, without its text."""
    api_key: str | None = None
    """Key that clients have to send; None: the environment's TRENCHCOAT_API_KEY, if it is set."""
    queue: int = 32
    """Requests that may wait for the one that runs."""
    max_body: float = 4.0
    """MiB of a request."""
    body_seconds: float = 30.0
    """Time for a request to arrive."""
    allow_host: tuple[str, ...] = ()
    """Names that clients may give in `Host`, besides addresses and names without a dot."""
    engine: str = "embedded"
    """`vllm`, `embedded` (this package's server) or `auto`: vLLM where it is installed and can serve the model."""
    softmax: bool = False
    """Serve the model with its own softmax attention, without LoRA, to compare with."""
    vllm_option: tuple[str, ...] = ()
    """Further arguments of vLLM's server, such as `--tensor-parallel-size=2`."""

    def key(self) -> str | None:
        """The key that clients have to send; None for none."""
        return self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE)


def serve(path: Path, cfg: ServeSettings, say: Callable[[str], None]) -> None:
    """Serve the linearized model in `path` until a signal stops it; `say` receives a line for the terminal.

    Raises UserError if the extra is not installed, the model cannot be loaded, or a setting is invalid.
    """
    name = cfg.name if cfg.name is not None else path.resolve().name
    _check(cfg, name)
    template = _template(cfg.chat_template)
    if vllm_server.wants_vllm(path, cfg, say):
        vllm_server.run(path, cfg, say)
    if importlib.util.find_spec("uvicorn") is None:
        raise UserError("serving needs uvicorn: pip install uvicorn")
    model, tokenizer = hub.load(path, device=cfg.device, dtype=cfg.dtype, base=cfg.base)
    if cfg.softmax:
        remove_lora(model)
        set_mode(model, "teacher")
    context = cfg.context or getattr(model.config, "max_position_embeddings", None)
    if template is not None:
        tokenizer.chat_template = template
    server = _build(model, tokenizer, name, context, cfg)
    student = student_config(model)
    attention = "its own softmax" if cfg.softmax else f"{student.name} attention, {student.impl}"
    chat = "" if tokenizer.chat_template is not None else "; no chat template: completions only"
    say(
        f"serving {name} ({attention}) at http://{cfg.host}:{cfg.port}/v1, one request at a time, "
        f"{context or 'unlimited'} tokens each{chat}. Ctrl-C stops it"
    )
    server.run_until_signal()


def _check(cfg: ServeSettings, name: str) -> None:
    """Raise UserError naming the first setting that is invalid."""
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise UserError(f"--name is {name!r}; expected letters, digits, - _ . and at most one /")
    if cfg.grace < 0:
        raise UserError(f"--grace is {cfg.grace}; expected seconds, 0 or more")
    if cfg.context is not None and cfg.context < 2:
        raise UserError(f"--context is {cfg.context}; expected at least 2 tokens")
    if cfg.queue < 0:
        raise UserError(f"--queue is {cfg.queue}; expected a number of requests, 0 or more")
    if not 0 < cfg.max_body <= 1024:
        raise UserError(f"--max-body is {cfg.max_body}; expected MiB, above 0 and at most 1024")
    if not cfg.body_seconds > 0:
        raise UserError(f"--body-seconds is {cfg.body_seconds}; expected seconds, above 0")
    if cfg.log_level not in LOG_LEVELS:
        raise UserError(f"--log-level is {cfg.log_level!r}; known: {', '.join(LOG_LEVELS)}")
    key = cfg.key()
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UserError("the API key is empty or has characters other than visible ASCII; choose another")


def _build(model: Any, tokenizer: Any, name: str, context: int | None, cfg: ServeSettings) -> Server:
    """The server, not yet listening."""
    from trenchcoat.serving.engine import Engine
    from trenchcoat.serving.process import Server, server_config
    from trenchcoat.serving.web import App

    engine = Engine(model, tokenizer, context, threading.Event())
    app = App(engine, name, _limits(cfg))
    config = server_config(app, cfg.host, cfg.port, log_level=cfg.log_level, grace=cfg.grace)
    return Server(config, engine, cfg.grace)


def _limits(cfg: ServeSettings) -> Limits:
    """What is accepted: on loopback, requests under this machine's own names only."""
    from trenchcoat.serving.web import Limits

    local = cfg.host == "localhost" or cfg.host.startswith("127.") or cfg.host == "::1"
    return Limits(
        body=int(cfg.max_body * 2**20),
        body_seconds=cfg.body_seconds,
        queue=cfg.queue,
        api_key=cfg.key(),
        hosts=tuple(host.lower() for host in cfg.allow_host) if local or cfg.allow_host else None,
    )


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {file} cannot be read as text: {error}") from error

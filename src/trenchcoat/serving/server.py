"""An OpenAI-compatible server for one linearized model, built from the parts of `transformers serve`.

Differences: the model comes from an adapter, run or merged folder, invalid requests are reported to the client, prompts
have a limit, and a request ends when its client disconnects or the server stops. `requests` validates requests,
`transformers_server` adapts the library's classes, `web` is the HTTP layer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from trenchcoat.config import UserError
from trenchcoat.models import hub
from trenchcoat.models.attach import student_config

if TYPE_CHECKING:
    from trenchcoat.serving.web import Server


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
    log_level: str = "warning"


def serve(path: Path, cfg: ServeSettings, say: Callable[[str], None]) -> None:
    """Serve the linearized model in `path` until a signal stops it; `say` receives a line for the terminal.

    Raises UserError if the extra is not installed, the model cannot be loaded, or a setting is invalid.
    """
    if not is_serve_available():
        raise UserError("serving needs fastapi, uvicorn and openai: pip install 'trenchcoat[serve]'")
    name = cfg.name if cfg.name is not None else path.resolve().name
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise UserError(f"--name is {name!r}; expected letters, digits, - _ . and at most one /")
    if cfg.grace < 0:
        raise UserError(f"--grace is {cfg.grace}; expected seconds, 0 or more")
    if cfg.context is not None and cfg.context < 2:
        raise UserError(f"--context is {cfg.context}; expected at least 2 tokens")
    template = _template(cfg.chat_template)
    model, tokenizer = hub.load(path, device=cfg.device, dtype=cfg.dtype, base=cfg.base)
    context = cfg.context or getattr(model.config, "max_position_embeddings", None)
    if not tokenizer.is_fast:
        raise UserError(f"{path} has a slow tokenizer; streaming needs a fast one (tokenizer.json)")
    if template is not None:
        tokenizer.chat_template = template
    server = _build(model, tokenizer, name, context, cfg)
    student = student_config(model)
    chat = "" if tokenizer.chat_template is not None else "; no chat template: completions only"
    say(
        f"serving {name} ({student.name} attention, {student.impl}) at http://{cfg.host}:{cfg.port}/v1, one request at "
        f"a time, {context or 'unlimited'} tokens each{chat}. Ctrl-C stops it"
    )
    server.run_until_signal()


def _build(model: Any, tokenizer: Any, name: str, context: int | None, cfg: ServeSettings) -> Server:
    """The server, not yet listening."""
    import uvicorn

    from trenchcoat.serving.transformers_server import Generator, build_app
    from trenchcoat.serving.web import DisconnectWatcher, Server, answer_errors_in_openai_form

    if cfg.log_level not in logging.log_levels:
        raise UserError(f"--log-level is {cfg.log_level!r}; known: {', '.join(logging.log_levels)}")
    logging.set_verbosity(logging.log_levels[cfg.log_level])
    generator = Generator(context, threading.Event())
    app = build_app(model, tokenizer, name, generator)
    answer_errors_in_openai_form(app)
    config = uvicorn.Config(
        DisconnectWatcher(app),
        host=cfg.host,
        port=cfg.port,
        log_level="warning" if cfg.log_level == "warn" else cfg.log_level,
        timeout_graceful_shutdown=int(cfg.grace) + 30,
    )
    return Server(config, generator, cfg.grace)


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {file} cannot be read as text: {error}") from error

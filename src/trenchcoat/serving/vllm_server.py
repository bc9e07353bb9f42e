"""`trenchcoat serve` with vLLM: whether it can serve a folder, and its command line for our settings.

vLLM takes this process's place, so that signals reach it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trenchcoat.config import UserError
from trenchcoat.models.loading import ADAPTER_META
from trenchcoat.runtime.files import read_json
from trenchcoat.serving.vllm_plugin.families import MODELS

if TYPE_CHECKING:
    from trenchcoat.serving.server import ServeSettings

ENGINES = ("auto", "vllm", "embedded")

_SERVER = "vllm.entrypoints.openai.api_server"
_KEY = "VLLM_API_KEY"
_OURS_ALONE = ("device", "queue", "max_body", "body_seconds", "allow_host", "base", "softmax")
"""Settings that vLLM's server has no counterpart of."""


def wants_vllm(path: Path, cfg: ServeSettings, say: Callable[[str], None]) -> bool:
    """Whether vLLM is to serve `path`; `say` is told why not, where `cfg.engine` leaves the choice.

    UserError if `cfg.engine` is `vllm` and it cannot.
    """
    if cfg.engine not in ENGINES:
        raise UserError(f"--engine is {cfg.engine!r}; known: {', '.join(ENGINES)}")
    reason = why_not(path, cfg) if cfg.engine != "embedded" else None
    if reason is not None and cfg.engine == "vllm":
        raise UserError(f"--engine vllm: {reason}")
    if cfg.vllm_option and (reason is not None or cfg.engine == "embedded"):
        raise UserError(f"--vllm-option is for vLLM, which does not serve this: {reason or '--engine is embedded'}")
    if reason is not None:
        say(f"the embedded server, one request at a time; not vLLM: {reason}")
    return cfg.engine != "embedded" and reason is None


def run(path: Path, cfg: ServeSettings, say: Callable[[str], None]) -> NoReturn:
    """Become vLLM's server for `path`."""
    command = command_line(path, cfg)
    say(f"vLLM serves {cfg.name or path.resolve().name} at http://{cfg.host}:{cfg.port}/v1")
    environment = dict(os.environ)
    key = cfg.key()
    if key is not None:
        environment[_KEY] = key
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)


def command_line(path: Path, cfg: ServeSettings) -> list[str]:
    """The command of vLLM's server; the API key is not in it, since others can see command lines."""
    options: dict[str, object] = {
        "--model": path,
        "--served-model-name": cfg.name or path.resolve().name,
        "--host": cfg.host,
        "--port": cfg.port,
        "--dtype": cfg.dtype,
        "--max-model-len": cfg.context,
        "--chat-template": cfg.chat_template,
        "--shutdown-timeout": int(cfg.grace),
        "--uvicorn-log-level": cfg.log_level,
    }
    given = [str(part) for item in options.items() if item[1] is not None for part in item]
    return [sys.executable, "-m", _SERVER, *given, *cfg.vllm_option]


def why_not(path: Path, cfg: ServeSettings) -> str | None:
    """What keeps vLLM from serving `path` with these settings; None for nothing."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # the latter: any folder of this name
        return "it is not installed (see docs/SERVE.md: in an environment of its own)"
    if any((folder / ADAPTER_META).is_file() for folder in (path, path / "adapter")):
        return f"{path} is an adapter or a run; `trenchcoat export {path} --merge --out DIR` makes the folder it needs"
    content = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    names = content.get("architectures") if isinstance(content, dict) else None
    if not set(names or ()) & set(MODELS):
        return f"it has classes for {', '.join(MODELS)} only, {path} is {', '.join(names or ['no merged folder'])}"
    settings = (content.get("trenchcoat") or {}).get("student") or {}
    if settings.get("kept_log_scale") is not None:
        return f"its attention has no scale by position (student.kept_log_scale={settings['kept_log_scale']:g})"
    default = type(cfg)()
    changed = [name for name in _OURS_ALONE if getattr(cfg, name) != getattr(default, name)]
    return f"it has no --{changed[0].replace('_', '-')}; leave it out" if changed else None

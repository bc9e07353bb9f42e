"""Reading a pretrained model's folder or hub repository: its config, and whether it can be a base.

Everything that loads a base (whole, sharded, in 4 bits, by blocks, or its config alone) asks here, so all agree on
what the teacher is. Python code that a model brings is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import find_adapter_config_file

from trenchcoat.config import ModelConfig, UserError
from trenchcoat.models.transformers_internals import wants_own_code
from trenchcoat.runtime.weightfiles import SINGLE, weight_names

LOAD_ERRORS = (
    OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError,
    AssertionError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What Transformers raises for folders that it cannot load (RecursionError is a RuntimeError)."""

SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
"""The files of a model beside its weights: config, tokenizer, chat template."""

_OWN_CODE = (
    "it needs Python code of its own (`auto_map`), and trenchcoat never runs a model's own code: give a model of a "
    "family that Transformers has, or a version of this one that is converted to such a family"
)


def reason(error: BaseException, source: Path | str | None = None, limit: int = 300) -> str:
    """Why a model, config or tokenizer could not be loaded, in a line; ``source``: the folder, or perhaps a hub id."""
    if wants_own_code(error):
        return _OWN_CODE
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    if source is None or Path(source).is_dir():
        return text
    if "connect" in text or isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        text = "as a hub id it is not in the local cache, and the hub cannot be reached"
    return f"there is no such folder in {Path.cwd()}; {text}"


def named(path: Path | str, revision: str | None) -> str:
    """A base model in messages: its path as a setting, and its revision if it has one."""
    return f"model.path={str(path)!r}" + ("" if revision is None else f" (revision {revision})")


def read_config(source: Path | str, revision: str | None = None, **options: Any) -> Any:
    """The Transformers config of a folder or hub id; ``UserError`` when it cannot be read or needs code of its own."""
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **options)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot read the config of {str(source)!r}: {reason(error, source)}") from error


def base_config(cfg: ModelConfig, source: Path | str) -> Any:
    """The config of the base model of ``cfg`` in ``source``.

    Raises ``UserError`` when it cannot be read, and for what would be another teacher depending on who loads it: a PEFT
    adapter beside the model, and weights that are stored quantized.
    """
    try:
        config = read_config(source, cfg.revision)
    except UserError as error:
        raise UserError(
            f"cannot load {named(cfg.path, cfg.revision)}: {error}. Expected a hub id, a local folder in Hugging Face "
            "format, or `embedded`"
        ) from error
    adapter = find_adapter_config_file(str(source), revision=cfg.revision)
    if adapter is not None:
        raise UserError(
            f"model.path={cfg.path!r} has a PEFT adapter (adapter_config.json) beside the model: merge it into the "
            "weights (peft: merge_and_unload, then save_pretrained) and give that folder, or move its files away"
        )
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise UserError(
            f"model.path={cfg.path!r} is stored quantized ({getattr(method, 'value', method) or 'quantization_config'} "
            "in its config.json): give the model in 16 or 32 bits (from_pretrained, dequantize, save_pretrained); "
            "model.quantize=nf4 then keeps it in 4 bits"
        )
    return config


def base_folder(source: str, revision: str | None) -> Path:
    """The local folder of a model (a folder or hub id), fetched from the hub if needed: of its weights, only the files
    that are read."""
    if Path(source).is_dir():
        return Path(source)

    def fetch(patterns: list[str]) -> Path:
        """The snapshot's folder, with the files of these names."""
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch([*SMALL_FILES, SINGLE])
        names = weight_names(folder) or ()
        return folder if all((folder / name).is_file() for name in names) else fetch([*SMALL_FILES, *names])
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"cannot fetch {named(source, revision)}: {reason(error, source)}") from error

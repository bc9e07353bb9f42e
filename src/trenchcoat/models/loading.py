"""The pretrained model of a run: whole in one process, sharded over several, or in 4 bits.

When sharded, the model is built on the meta device and split into FSDP units, and every process reads its shard of each
tensor from the safetensors files: no process holds the whole model, and no host holds it twice.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trenchcoat.config import ModelConfig, ParallelConfig, UserError
from trenchcoat.config.errors import refusals
from trenchcoat.models.basefolder import (
    LOAD_ERRORS,
    SMALL_FILES,
    base_config,
    base_folder,
    named,
    read_config,
    reason,
)
from trenchcoat.models.embedded import teacher_dir
from trenchcoat.models.families import decoder_of
from trenchcoat.models.gguf import gguf_folder, is_gguf
from trenchcoat.models.identity import remember_fingerprint
from trenchcoat.models.offload import require_whole
from trenchcoat.models.shapes import meta_model
from trenchcoat.models.text import embeddings_of, remember_embeddings
from trenchcoat.runtime import distributed
from trenchcoat.runtime.files import sha256
from trenchcoat.runtime.sharding import fill_from_files, shard_base, to_device
from trenchcoat.runtime.weightfiles import tensor_files, weight_names

ADAPTER_META = "trenchcoat.json"
"""The file that marks a folder as an adapter, not a model."""


def load_base(cfg: ModelConfig, parallel: ParallelConfig) -> tuple[nn.Module, Any]:
    """The frozen model in evaluation mode, and its tokenizer; a collective with several processes.

    Raises ``UserError`` as :func:`load_model` does, and for what cannot be sharded.
    """
    if cfg.quantize == "nf4":
        return _load_quantized(cfg, parallel)
    if distributed.size() == 1 or parallel.shard == "none":
        return load_model(cfg)
    return _load_spread(cfg, parallel)


def _load_spread(cfg: ModelConfig, parallel: ParallelConfig) -> tuple[nn.Module, Any]:
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    source = model_source(cfg)
    folder = distributed.in_turns_per_node(lambda: base_folder(source, cfg.revision))
    attention = None if cfg.attention == "auto" else cfg.attention
    config = base_config(cfg, folder)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except LOAD_ERRORS as error:
        raise UserError(f"cannot build model.path={cfg.path!r}: {reason(error)}") from error
    model.tie_weights()  # on the meta device, tied weights were separate parameters
    model.eval().requires_grad_(False)
    shard_base(model, list(decoder_of(model).layers), parallel)
    to_device(model, torch.device("cpu") if parallel.cpu_offload else device)
    fill_from_files(model, folder)
    own = folder / "generation_config.json"
    with refusals(lambda error: f"{own} cannot be read: {reason(error)}", LOAD_ERRORS):
        if own.is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, load_tokenizer(cfg, str(folder), embeddings_of(model))


def _load_quantized(cfg: ModelConfig, parallel: ParallelConfig) -> tuple[nn.Module, Any]:
    """QLoRA's frozen base: 4-bit NormalFloat with double quantization, computing in bfloat16."""
    if distributed.size() > 1 and parallel.shard != "none":
        raise UserError(
            "model.quantize=nf4 cannot be sharded by FSDP2: its 4-bit tensors lose their scales when split. Set "
            "parallel.shard=none (a 4-bit copy on each process), or model.quantize=none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantize=nf4 needs bitsandbytes: pip install bitsandbytes, or set it to none")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return load_model(cfg, quantization_config=settings)


def _identify_quantized(model: nn.Module, cfg: ModelConfig) -> None:
    """Give a model that was quantized when it was loaded the identity of its files."""
    folder = base_folder(model_source(cfg), cfg.revision)
    try:
        remember_fingerprint(model, meta_model(base_config(cfg, folder)), folder)
    except KeyError as error:
        raise UserError(
            f"model.quantize=nf4: {folder} has no tensor {error}: the family's tensors are renamed when it is loaded, "
            "so the identity of its weights cannot be read. Set model.quantize=none"
        ) from error
    _keep_backward(model)


def _keep_backward(model: nn.Module) -> None:
    """Disable bitsandbytes' kernel for CPUs with AVX512-BF16, which has no backward.

    A 4-bit layer called once without gradients repacks its weight for that kernel permanently: after the first
    evaluation, whatever is trained below it would silently get wrong gradients.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU when there is one; an impossible device is a ``UserError``."""
    if distributed.size() > 1:
        return distributed.device()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device={name!r} is not a device; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"model.device={name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA device(s)")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UserError(f"model.dtype={name!r} is not known; expected auto, {', '.join(known)}")
    return known[name]


def model_source(cfg: ModelConfig) -> str:
    """Folder or hub id of a model (for a `.gguf` file, the folder made from it); ``UserError`` for anything else."""
    if cfg.path == "embedded":
        try:
            return str(teacher_dir())
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    local = Path(cfg.path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            hint = f"; it is an adapter: use trenchcoat.load({cfg.path!r})" if (local / ADAPTER_META).is_file() else ""
            raise UserError(f"model.path={cfg.path!r} is not a Hugging Face model folder (no config.json){hint}")
        return str(local)
    if is_gguf(local):
        return str(gguf_folder(local.resolve()))
    require_hub_id(cfg.path, f"model.path={cfg.path!r}")
    return cfg.path


def require_hub_id(path: str, name: str) -> None:
    """Raise ``UserError`` for the ``path`` of a folder that is not there and cannot be a hub id; ``name`` begins it."""
    if Path(path).exists():
        raise UserError(f"{name}: it is a file; give the folder that holds config.json")
    if path.startswith((".", "/")) or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", path):
        raise UserError(f"{name}: no such folder. Give a local folder, a hub id, or `embedded`")


def base_content(cfg: ModelConfig) -> str:
    """SHA-256 of the files that a base model is read from: its config, tokenizer and weights. ``UserError`` when it
    cannot be found."""
    folder = base_folder(model_source(cfg), cfg.revision)
    small = [path for pattern in SMALL_FILES for path in folder.glob(pattern)]
    weights = [folder / name for name in weight_names(folder) or ()] or [*folder.glob("pytorch_model*.bin")]
    found = hashlib.sha256()
    for path in sorted({*small, *weights}):
        stat = path.stat()
        found.update(f"{path.name} {_content(path, stat.st_size, stat.st_mtime_ns)}".encode())
    return found.hexdigest()


@functools.cache
def _content(path: Path, size: int, changed: int) -> str:
    """Checksum of a file, computed once in a process unless its size or time of change differ."""
    return sha256(path)


def stored_dtype(source: str, revision: str | None = None) -> str:
    """The dtype that most weights of a model (a folder or hub id) have in its files: `float32`, ... ."""
    folder = base_folder(source, revision)
    names = {"BF16": "bfloat16", "F16": "float16"}
    if not list(folder.glob("*.safetensors")):
        named = str(read_config(folder).dtype).removeprefix("torch.")
        return named if named in names.values() else "float32"
    numbers: Counter[str] = Counter()
    for path in set(tensor_files(folder).values()):
        with safe_open(str(path), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored = opened.get_slice(name)
                numbers[stored.get_dtype()] += math.prod(stored.get_shape())
    return names.get(numbers.most_common(1)[0][0], "float32") if numbers else "float32"


def placement(device: str, device_map: Any, quantization_config: Any) -> dict[str, Any]:
    """Options of `from_pretrained` for where the weights go; empty where the model is moved to `device` afterwards.

    Raises ``UserError`` for a device with a device map.
    """
    if device_map is not None and device != "auto":
        raise UserError(f"device={device!r} and device_map={device_map!r} both say where the weights go: give one")
    options: dict[str, Any] = {}
    if device_map is not None:
        options["device_map"] = device_map
    if quantization_config is not None:
        options = {"quantization_config": quantization_config, "device_map": {"": resolve_device(device)}, **options}
    return options


def load_model(cfg: ModelConfig, quantization_config: Any = None, device_map: Any = None) -> tuple[nn.Module, Any]:
    """Load the whole pretrained model (evaluation mode, nothing trainable) and its tokenizer.

    ``quantization_config`` and ``device_map`` are those of Transformers' `from_pretrained`. Raises ``UserError`` for an
    unknown path or id, a folder that is not a causal language model, a missing tokenizer, an attention implementation
    that cannot run here, or an impossible device.
    """
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    source = model_source(cfg)
    attention = None if cfg.attention == "auto" else cfg.attention
    base_config(cfg, source)
    options: dict[str, Any] = {
        "revision": cfg.revision, "dtype": dtype, "attn_implementation": attention, "trust_remote_code": False,
    }  # fmt: skip
    options |= placement(cfg.device, device_map, quantization_config)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except LOAD_ERRORS as error:
        raise UserError(
            f"cannot load {named(cfg.path, cfg.revision)} with model.attention={cfg.attention}: "
            f"{reason(error, source)}. Expected a hub id, a local folder in Hugging Face format, or `embedded`"
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model.path={cfg.path!r} lacks {len(missing)} weights ({missing[0]}, ...), so it would "
            "run with random ones; give a complete causal language model"
        )
    tokenizer = load_tokenizer(cfg, source, embeddings_of(model))
    if quantization_config is not None:
        _identify_quantized(model, cfg)
    if "device_map" not in options:
        model = model.to(device)
    require_whole(model)
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(cfg: ModelConfig, source: str, embeddings: int) -> Any:
    """The tokenizer of a model with so many ``embeddings``; raises ``UserError`` when there is none."""
    what = f"model.path={cfg.path!r} has no tokenizer that can be loaded"
    with refusals(lambda error: f"{what}: {reason(error)}", LOAD_ERRORS):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=cfg.revision, trust_remote_code=False)
        tokenizer("a")
    remember_embeddings(tokenizer, embeddings)
    return tokenizer

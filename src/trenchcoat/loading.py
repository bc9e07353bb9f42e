"""The pretrained model of a run: whole in one process, spread over several, or in 4 bits.

Spread over processes, the model is built without memory, cut into FSDP units, and every process reads its own part of
each tensor out of the safetensors files: no process, and no host, ever holds it twice or whole.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from trenchcoat import checkpoint, distributed
from trenchcoat.config import ModelConfig, ParallelConfig, UserError
from trenchcoat.families import decoder_of
from trenchcoat.identity import bear_fingerprint
from trenchcoat.shapes import meta_model
from trenchcoat.sharding import fill_from_files, shard_base, to_device

_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
"""What is fetched of a hub model."""


def load_base(cfg: ModelConfig, parallel: ParallelConfig) -> tuple[nn.Module, Any]:
    """The frozen model in evaluation mode, and its tokenizer; a collective with several processes.

    Raises ``UserError`` as :func:`trenchcoat.checkpoint.load_model` does, and for what cannot be spread.
    """
    if cfg.quantize == "nf4":
        return _load_quantized(cfg, parallel)
    if distributed.size() == 1 or parallel.shard == "none":
        return checkpoint.load_model(cfg)
    return _load_spread(cfg, parallel)


def _load_spread(cfg: ModelConfig, parallel: ParallelConfig) -> tuple[nn.Module, Any]:
    device = checkpoint.resolve_device(cfg.device)
    dtype = checkpoint.resolve_dtype(cfg.dtype, device)
    source = checkpoint.model_source(cfg)
    folder = distributed.in_turns_per_node(lambda: base_folder(source, cfg.revision))
    attention = None if cfg.attention == "auto" else cfg.attention
    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"cannot build model.path={cfg.path!r}: {' '.join(str(error).split())[:300]}") from error
    model.tie_weights()  # without memory, every name had got a parameter of its own
    model.eval().requires_grad_(False)
    shard_base(model, list(decoder_of(model).layers), parallel)
    to_device(model, torch.device("cpu") if parallel.cpu_offload else device)
    fill_from_files(model, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, checkpoint.load_tokenizer(cfg, str(folder))


def base_folder(source: str, revision: str | None) -> Path:
    """The local folder of a model (of :func:`trenchcoat.checkpoint.model_source`), fetched from the hub if need be."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"cannot fetch model.path={source!r} (revision {revision}): {' '.join(str(error).split())[:300]}"
        ) from error


def _load_quantized(cfg: ModelConfig, parallel: ParallelConfig) -> tuple[nn.Module, Any]:
    """QLoRA's frozen base: 4-bit NormalFloat with double quantization, computing in bfloat16."""
    if distributed.size() > 1 and parallel.shard != "none":
        raise UserError(
            "model.quantize=nf4 cannot be spread by FSDP2: its 4-bit tensors lose their scales when they are cut. Set "
            "parallel.shard=none (a 4-bit copy on each process), or model.quantize=none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantize=nf4 needs bitsandbytes: pip install 'trenchcoat[quant]', or set it to none")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model, tokenizer = checkpoint.load_model(cfg, quantization_config=settings)
    folder = base_folder(checkpoint.model_source(cfg), cfg.revision)
    try:
        bear_fingerprint(model, meta_model(AutoConfig.from_pretrained(folder)), folder)
    except KeyError as error:
        raise UserError(
            f"model.quantize=nf4: {folder} has no tensor {error}: the family's tensors are renamed when it is loaded, "
            "so the identity of its weights cannot be read. Set model.quantize=none"
        ) from error
    _keep_backward(model)
    return model, tokenizer


def _keep_backward(model: nn.Module) -> None:
    """Keep bitsandbytes from its kernel for CPUs with AVX512-BF16, which has no backward.

    A 4-bit layer once called without gradients repacks its weight for that kernel, for good: whatever is trained below
    it would get wrong gradients in silence after the first evaluation.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False

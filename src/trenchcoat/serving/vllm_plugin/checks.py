"""Options of vLLM that linearized models do not support: each is refused by name when vLLM starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from trenchcoat.config import UserError
from trenchcoat.models.auto import student_settings
from trenchcoat.students import student_class

_STATE_DTYPES = ("auto", "float32", "bfloat16")


def check_model(config: Any, known: Iterable[str]) -> None:
    """UserError for a model whose architecture is not among the `known` ones, that has a LoRA which is not merged, or
    students in place of whole layers, or kept groups with a scale by position."""
    names = [str(name) for name in config.architectures or ()]
    if not set(names) & set(known):
        raise UserError(
            f"models of type {config.model_type} ({', '.join(names)}) have no class for vLLM; there are "
            f"{', '.join(known)}. Serve this one with `trenchcoat serve --engine embedded`"
        )
    own = getattr(config, "trenchcoat", None) or {}
    student = student_settings(own.get("student", {}))
    if student_class(student.name).replaces_layer:
        raise UserError(
            f"student.name={student.name} takes the place of whole layers, projections included: write what vLLM "
            "serves without this package with `trenchcoat export FOLDER --native`, or use `trenchcoat serve --engine "
            "embedded`"
        )
    if student.kept_log_scale is not None:
        raise UserError(
            f"student.kept_log_scale={student.kept_log_scale:g}: vLLM's own attention computes kept groups and layers, "
            "and has no scale by position. Use `trenchcoat serve --engine embedded`"
        )
    if own.get("lora") is not None:
        raise UserError("the folder's LoRA is not merged: write a merged one with `trenchcoat export FOLDER --merge`")


def check_options(vllm_config: Any) -> None:
    """UserError for the first option that could not be honoured, with what to do instead."""
    for reason in _refused(vllm_config):
        raise UserError(f"linearized models in vLLM: {reason}")


def settle_state_dtype(vllm_config: Any) -> None:
    """Write the dtype of states into one option, since vLLM resets --mamba-ssm-cache-dtype on some CPUs."""
    cache = vllm_config.cache_config
    if cache.mamba_ssm_cache_dtype == "bfloat16":
        cache.mamba_cache_dtype = "bfloat16"


def state_dtype(vllm_config: Any) -> torch.dtype:
    """The students' `state_dtype`: float32 (keys and values: the model's dtype) or bfloat16."""
    return torch.bfloat16 if vllm_config.cache_config.mamba_cache_dtype == "bfloat16" else torch.float32


def _refused(vllm_config: Any) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    own = getattr(vllm_config.model_config.hf_config, "trenchcoat", None) or {}
    student = student_settings(own.get("student", {})).name
    if parallel.tensor_parallel_size > 1 and not student_class(student).heads_apart:
        yield f"student.name={student} has parameters of all heads together; leave out --tensor-parallel-size"
    if vllm_config.speculative_config is not None:
        yield "rejected drafts could not be taken back out of the state; leave out --speculative-config"
    if vllm_config.lora_config is not None:
        yield "adapters are merged by `trenchcoat export --merge`; leave out --enable-lora"
    if vllm_config.model_config.quantization is not None:
        yield f"--quantization {vllm_config.model_config.quantization} has not been run; leave it out"
    if vllm_config.kv_transfer_config is not None:
        yield "states cannot be moved by KV connectors; leave out --kv-transfer-config and --kv-offloading-size"
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, option, 1) > 1:
            yield f"a state is not divided by tokens; leave out --{option.replace('_', '-')}"
    yield from _refused_dtypes(vllm_config)


def _refused_dtypes(vllm_config: Any) -> Iterator[str]:
    cache, dtype = vllm_config.cache_config, vllm_config.model_config.dtype
    if cache.cache_dtype not in ("auto", str(dtype).removeprefix("torch.")):
        yield f"--kv-cache-dtype {cache.cache_dtype} has not been run; states follow --mamba-cache-dtype"
    whole, far = cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
    for option, value in (("--mamba-cache-dtype", whole), ("--mamba-ssm-cache-dtype", far)):
        if value not in _STATE_DTYPES:
            yield f"{option} {value} is not available; expected one of {', '.join(_STATE_DTYPES)}"
    if whole == "float32" and dtype != torch.float32:
        yield f"--mamba-cache-dtype float32 needs --dtype float32 (it is {dtype}); sums are float32 in any case"
    if far == "bfloat16" and dtype == torch.float32 and whole != "bfloat16":
        yield "--mamba-ssm-cache-dtype bfloat16 needs --mamba-cache-dtype bfloat16, or --dtype bfloat16"
    if (whole, far) == ("bfloat16", "float32"):
        yield "--mamba-cache-dtype bfloat16 rounds the sums too; leave out --mamba-ssm-cache-dtype float32"

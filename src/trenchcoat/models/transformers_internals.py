"""The undocumented parts of Transformers that this package uses, each in one function.

A release that changes one of these breaks this file and `tests/models/test_transformers_internals.py`, which states
what each is expected to be. Only the name of the module that :mod:`trenchcoat.models.auto` waits for is defined there:
it is needed before Transformers is imported.

Shape legend: B rows, T tokens, K keys.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Which attention a model runs


def attention_name(config: Any) -> str | None:
    """The attention implementation that a config names."""
    name: str | None = config._attn_implementation
    return name


def choose_attention(config: Any, name: str | None) -> None:
    """Have the layers of a config call the attention registered as `name`; the public setter would check `name`."""
    config._attn_implementation_internal = name


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an attention function and its mask function known under `name`."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that `self_attn` calls for the implementation `name`; `eager` is the modelling file's own."""
    home = sys.modules[module.__class__.__module__]
    functions = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    found: Callable[..., Any] = functions.get_interface(name, getattr(home, "eager_attention_forward", None))
    return found


@functools.cache
def calls_attention_interface(forward: Callable[..., Any]) -> bool:
    """Whether a `self_attn.forward` looks its attention function up by name; OSError when its source is not there."""
    source = inspect.getsource(inspect.unwrap(forward))
    return "get_interface(" in source or "ALL_ATTENTION_FUNCTIONS" in source


def score_options(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The soft cap of the scores and the sink logits, from the keywords of a call of the attention function."""
    return {"softcap": keywords.get("softcap"), "sink_logit": keywords.get("s_aux")}


class _SomeHeads:
    """A layer's attention module as seen by an attention function that runs only some of its heads."""

    def __init__(self, module: nn.Module, sinks: Tensor) -> None:
        self._module, self.sinks = module, sinks

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The module's own class, by which its attention function is found."""
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def of_heads(
    module: nn.Module, keywords: Mapping[str, Any], chosen: Callable[[Tensor, int], Tensor]
) -> tuple[Any, dict[str, Any]]:
    """(module, keywords) of a call for some of the heads, picked by ``chosen(tensor, dim)``: sink logits, one a head,
    are found among both."""
    given = dict(keywords)
    if isinstance(given.get("s_aux"), Tensor):
        given["s_aux"] = chosen(given["s_aux"], 0)
    sinks = getattr(module, "sinks", None)
    return (_SomeHeads(module, chosen(sinks, 0)) if isinstance(sinks, Tensor) else module), given


def has_position_bias(keywords: Mapping[str, Any]) -> bool:
    """Whether a layer passes a bias to add to the scores."""
    return keywords.get("position_bias") is not None


# Arguments of a mask function


def kept_request(request: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a mask function, copied for later use (a static cache changes its offset in place)."""
    offset = request.get("q_offset")
    return {**request, "q_offset": offset.clone()} if isinstance(offset, Tensor) else request


def more_than_causal(request: Mapping[str, Any]) -> bool:
    """Whether there are packed sequences, or a custom mask of the model."""
    return not request.get("allow_is_causal_skip", True) and int(request["q_length"]) > 1


def padding_mask(request: Mapping[str, Any]) -> Any:
    """The 2-D mask [B, T] that the caller gave; None for none."""
    return request.get("attention_mask")


def first_query(request: Mapping[str, Any]) -> int:
    """Columns before the first query."""
    return int(request.get("q_offset", 0))


def make_mask(implementation: str, request: Mapping[str, Any]) -> Any:
    """The mask that `implementation` expects."""
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**request)


def cached_request(
    request: Mapping[str, Any], length: int, offset: int, query_offset: int, real_BK: Tensor | None
) -> dict[str, Any]:
    """The request of a mask for ``length`` keys after the first ``offset`` columns, with the padding of all columns."""
    sizes = {"kv_length": length, "kv_offset": offset, "q_offset": query_offset}
    return {**request, **sizes, "attention_mask": real_BK}


def mask_rows(request: Mapping[str, Any], start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the whole mask: bool [B, 1, stop - start, K]."""
    first = request.get("q_offset", 0)
    rows = {"q_length": stop - start, "q_offset": first + start, "allow_is_causal_skip": False}
    made: Tensor = make_mask("sdpa", {**request, **rows})
    return made


# Reading a model's folder


def checkpoint_activations(model: Any) -> None:
    """Compute activations again in the backward pass; 5.17 has only the method's old name, of which 5.23 warns."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def wants_own_code(error: BaseException) -> bool:
    """Whether loading stopped because the folder brings Python code, which only `trust_remote_code=True` would run."""
    return "trust_remote_code" in str(error)


# Caches


class FixedSizeLayer(CacheLayerMixin):
    """The flags of a cache layer that cannot grow, be cropped, be compiled or be preallocated."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False


def cache_layer(cache: Cache, index: int) -> Any:
    """Layer `index` of a cache; a cache that creates its layers lazily creates them up to that index."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


_RECORDS = "trenchcoat_records_past"


def records_past(cache: Cache) -> bool:
    """Whether tokens may be taken back from a cache: `activate_past_recording` was called."""
    return bool(getattr(cache, _RECORDS, False))


def remember_recording() -> None:
    """Have every cache remember that call, which Transformers passes on to the layers that exist by then alone: those
    of students come later."""
    activate = Cache.activate_past_recording

    @functools.wraps(activate)
    def remembering(self: Cache) -> None:
        """Transformers' own, and the mark."""
        activate(self)
        setattr(self, _RECORDS, True)

    Cache.activate_past_recording = remembering


def is_filled(layer: Any) -> bool:
    """Whether a cache layer holds tokens."""
    return bool(layer.is_initialized) and int(layer.get_seq_length()) > 0


def allocated_length(layer: Any) -> int | None:
    """Tokens that a static layer has room for; None for one that grows."""
    length: int | None = getattr(layer, "max_cache_len", None)
    return length


def window_of(layer: Any) -> int | None:
    """Tokens that a softmax layer with a window of its own holds at most; None for one that holds all."""
    window = getattr(layer, "sliding_window", None)
    return int(window) - 1 if getattr(layer, "is_sliding", False) and window else None


def keys_and_values(layer: Any) -> list[Tensor]:
    """The tensors of a softmax layer."""
    return [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]


def detach_keys_and_values(layer: Any) -> None:
    """Cut the tensors of a softmax layer off the computation that made them."""
    for name in ("keys", "values"):
        held = getattr(layer, name, None)
        if isinstance(held, Tensor):
            setattr(layer, name, held.detach())


def restore_keys_and_values(layer: Any, keys: Tensor, values: Tensor, tokens: int) -> None:
    """Fill an empty softmax layer with what :func:`keys_and_values` gave after ``tokens`` columns."""
    layer.update(keys, values)
    if getattr(layer, "is_sliding", False) and hasattr(layer, "cumulative_length"):
        layer.cumulative_length = tokens


# Model classes


def causal_lm_class(config: type) -> type | None:
    """The causal language model of a config class, if there is one."""
    found: type | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)
    return found


def causal_lm_names() -> Mapping[str, str]:
    """Family -> name of its causal language model's class, without importing any."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def replace_saving(save: Callable[..., Any], push: Callable[..., Any], ours: Callable[[nn.Module], bool]) -> None:
    """Have the models for which ``ours`` is true saved by ``save(model, write, directory, ...)``, where ``write`` is
    Transformers' own `save_pretrained`, and uploaded by ``push(model, name, ...)``."""
    write, upload = PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub

    @functools.wraps(write)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `save_pretrained`, or ``save``."""
        if not ours(self):
            return write(self, save_directory, *args, **kwargs)
        given = inspect.signature(write).bind(self, save_directory, *args, **kwargs)
        options = {**given.arguments, **given.arguments.get("kwargs", {})}
        return save(self, write, **{name: options[name] for name in options.keys() - {"self", "kwargs"}})

    @functools.wraps(upload)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `push_to_hub`, or ``push``."""
        return (push if ours(self) else upload)(self, *args, **kwargs)

    patched: Any = PreTrainedModel
    patched.save_pretrained, patched.push_to_hub = save_pretrained, push_to_hub


def was_loaded(parameter: nn.Parameter) -> bool:
    """Whether a parameter was loaded from a checkpoint."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def copy_conversion(family: str, other: str) -> None:
    """Convert checkpoints of `other` as those of `family` are (experts are stored in another layout than they are
    computed in)."""
    mapping = get_checkpoint_conversion_mapping(family)
    if mapping is not None and get_checkpoint_conversion_mapping(other) is None:
        register_checkpoint_conversion_mapping(other, mapping)

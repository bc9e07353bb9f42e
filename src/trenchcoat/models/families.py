"""Which model families can be linearized, and where their attention is.

The entry point is Transformers' attention interface: a layer's `self_attn` passes q, k, v (after RoPE and norms) to a
function chosen by name. A family that computes attention otherwise is refused here, with the reason, before anything
about the model is changed. The checks read the model's structure; `KNOWN_FAMILIES` is what is tested or was tried.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trenchcoat.config import UserError
from trenchcoat.models.transformers_internals import calls_attention_interface

TESTED_FAMILIES: tuple[str, ...] = tuple(
    "cohere2 gemma2 gpt_oss granite llama mistral mixtral olmo2 phi3 qwen2 qwen3 smollm3".split()
)
"""Families with which every student is tested, on small models with random weights, whenever the tests run."""

_TRIED_ONCE = """
    apertus arcee bitnet cohere ernie4_5 exaone4 gemma gemma3_text gemma4_text glm glm4 granitemoe helium
    hunyuan_v1_dense llama4_text ministral nemotron olmo3 olmoe phi qwen3_moe seed_oss stablelm starcoder2
"""
KNOWN_FAMILIES: tuple[str, ...] = tuple(sorted([*TESTED_FAMILIES, *_TRIED_ONCE.split()]))
"""Transformers' `model_type` of the families known to work; merged checkpoints of these load through `AutoModel`."""

ATTENTION_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Values of `config.layer_types` that are softmax attention."""

_NO_GROUPS = (
    "its attention module carries no `num_key_value_groups`: it is not of the grouped-query `self_attn` kind that "
    "trenchcoat plugs into"
)
_STATE_SPACE = "its layers are state-space or recurrent and have no softmax attention to replace"
_LATENT = "its multi-head latent attention compresses keys and values into one latent, and reads the cache itself"
REASONS: dict[str, str] = {
    "gpt2": _NO_GROUPS,
    "gpt_neo": _NO_GROUPS,
    "gpt_neox": _NO_GROUPS,
    "gpt_bigcode": _NO_GROUPS,
    "gptj": _NO_GROUPS,
    "opt": _NO_GROUPS,
    "bloom": "its scores carry ALiBi position biases and are not computed through Transformers' attention interface",
    "mpt": "its scores carry ALiBi position biases and are not computed through Transformers' attention interface",
    "falcon": "its attention is not computed through Transformers' attention interface",
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "falcon_mamba": _STATE_SPACE,
    "rwkv": _STATE_SPACE,
    "recurrent_gemma": _STATE_SPACE,
    "xlstm": _STATE_SPACE,
}
"""Families refused by name. Others are refused by their structure."""


_TRAINED = {
    "llama": "SmolLM2-135M-Instruct and the embedded teacher were converted and scored (docs/RESULTS.md)",
}
"""Families of which trained weights were converted here."""


def tried_how(family: str) -> str:
    """What a family of `KNOWN_FAMILIES` was tried on."""
    tested = family in TESTED_FAMILIES
    found = "tested with every student on small random weights" if tested else "tried once on small random weights"
    return f"{found}; {_TRAINED[family]}" if family in _TRAINED else found


class UnsupportedFamilyError(UserError):
    """The model's family cannot be linearized; the message says why."""


_MLP = ("gate_proj", "up_proj", "down_proj")
_FUSED = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
"""A family's fused linear layer, and what others have in its place."""
_OTHER_NAMES = {"o_proj": ("dense",), "up_proj": ("fc1", "c_fc"), "down_proj": ("fc2", "c_proj")}
"""The usual name of a linear layer, and what the same layer is called in other families (phi, starcoder2)."""


@dataclass(frozen=True)
class AttentionSite:
    """One layer's attention: where it is and how it is shaped."""

    index: int
    """Layer index, from 0."""
    name: str
    """Module path inside the model, e.g. `model.layers.0.self_attn`."""
    module: Any
    """The `self_attn` module."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    """Width of the layer's input."""


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """Every layer's attention, in order; raises :class:`UnsupportedFamilyError` for an unsupported model."""
    reason = _config_reason(model)
    if reason is None:
        found = list(_self_attentions(model))
        reason = _structure_reason(found)
    if reason is not None:
        raise UnsupportedFamilyError(
            f"cannot linearize a model of family {_family(model)!r} ({type(model).__name__}): {reason}. "
            f"Families known to work: {', '.join(KNOWN_FAMILIES)}"
        )
    return [_site(name, module) for name, module in found]


def decoder_of(model: Any) -> Any:
    """The module that holds the list of layers: the model without its head."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else getattr(model, "base_model", model)
    return decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)


def linear_layers(model: nn.Module, site: AttentionSite) -> dict[str, tuple[str, nn.Linear]]:
    """(path, module) of the linear layers of a layer's attention, then of its MLP, by name.

    A mixture of experts has none: its experts' weights are one tensor.
    """
    above = site.name.rpartition(".")[0]
    mlp = getattr(model.get_submodule(above), "mlp", None)
    blocks = [(site.name, site.module)]
    if isinstance(mlp, nn.Module) and not hasattr(mlp, "experts"):
        blocks.append((f"{above}.mlp", mlp))
    return {
        name: (f"{path}.{name}", child)
        for path, block in blocks
        for name, child in block.named_children()
        if isinstance(child, nn.Linear)
    }


def choose_lora_targets(targets: Iterable[str], linear: Iterable[str], where: str) -> list[str]:
    """Those of a layer's ``linear`` layers that ``lora.targets`` selects, in their order.

    In families with a fused `qkv_proj` or `gate_up_proj`, LoRA goes there; `o_proj` is phi's `dense`, and so on.
    UserError for a target that does not exist; ``where`` names the layer in the message.
    """
    known, wanted = list(linear), set(targets)
    for usual, others in _OTHER_NAMES.items():
        own = next((name for name in others if name in known), None)
        if usual in wanted and usual not in known and own is not None:
            wanted = (wanted - {usual}) | {own}
    for fused, parts in _FUSED.items():
        if fused in known and wanted & parts:
            wanted = (wanted - parts) | {fused}
    missing = sorted(wanted - set(known))
    if missing:
        experts = "; the experts of a mixture take no LoRA" if missing[0] in _MLP else ""
        raise UserError(
            f"lora.targets names {missing[0]!r}, which {where} does not have; its linear layers are "
            f"{', '.join(known)}{experts}"
        )
    return [name for name in known if name in wanted]


def _family(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _config_reason(model: nn.Module) -> str | None:
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return "it is not a Transformers model (it has no config with a `model_type`)"
    if config.model_type in REASONS:
        return REASONS[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders with causal self-attention can be linearized"
    if getattr(config, "sub_configs", None) and config.get_text_config() is not config:
        return "it is multimodal; load its text model alone"
    if getattr(config, "kv_lora_rank", None):
        return _LATENT
    if getattr(config, "num_kv_shared_layers", 0):
        return "several layers share one layer's keys and values"
    if getattr(config, "is_causal", True) is False:
        return "its attention is bidirectional"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYER_TYPES)
    if other:
        return f"some of its layers are not softmax attention ({', '.join(other)})"
    return None


def _self_attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of `self_attn` in each of the decoder's layers, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    for layer in getattr(decoder_of(model), "layers", None) or ():
        attention = getattr(layer, "self_attn", None)
        yield names.get(id(attention), ""), attention


def _structure_reason(found: list[tuple[str, Any]]) -> str | None:
    if not found:
        return "it has no list of decoder layers (`layers`) with a `self_attn`"
    for index, (_, module) in enumerate(found):
        if module is None:
            return f"its layer {index} has no `self_attn`"
        missing = [a for a in ("layer_idx", "config", "num_key_value_groups", "head_dim") if not hasattr(module, a)]
        if missing:
            return f"the attention of its layer {index} ({type(module).__name__}) has no `{missing[0]}`"
        if getattr(module, "is_causal", True) is False:
            return f"the attention of its layer {index} is not causal"
    for kind in {type(module) for _, module in found}:
        reason = _forward_reason(kind)
        if reason is not None:
            return reason
    return None


def _forward_reason(kind: Any) -> str | None:
    forward = kind.forward
    signature = inspect.signature(forward)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        return f"{kind.__name__}.forward accepts no extra keywords, so the cache cannot be passed on"
    try:
        usable = calls_attention_interface(forward)
    except (OSError, TypeError):
        return f"the source of {kind.__name__}.forward cannot be read to check that it uses the attention interface"
    if not usable:
        return f"{kind.__name__} does not compute attention through Transformers' attention interface"
    return None


def _site(name: str, module: Any) -> AttentionSite:
    heads = int(module.config.num_attention_heads)
    return AttentionSite(
        index=int(module.layer_idx),
        name=name,
        module=module,
        num_heads=heads,
        num_kv_heads=heads // int(module.num_key_value_groups),
        head_dim=int(module.head_dim),
        hidden_size=int(module.config.hidden_size),
    )

"""Linearized models as models of a class that other programs know: Qwen3.5's, which Transformers and vLLM ship.

A folder of that class opens without this package, and without code of its own. The student `gated_delta_layer` is the
linear layer of Qwen3.5; the rest of a base model maps onto its softmax layers exactly:

* **Output gate.** Qwen3.5 multiplies the attention's output by a sigmoid, here of 0: 1/2. The output projection is
  doubled.
* **Norms** multiply by 1 + w. Those before a layer's projections are multiplied into the projections, and w is 0. With
  a head that is the embedding, the final norm stays: w - 1.
* **q and k norms.** Qwen3 has them. In Llama, Mistral and Qwen2, heads are made wider, by constants that come from
  biases: of D' dimensions, n = D' / 16 are c = 2^22 and the rest is 0. The root mean square of a head is then c / 4 =
  2^20, to a relative error of |q|^2 / (2 n c^2), which is below the precision of float32 up to |q| = 10^6; the norm's
  weight is 2^20 for the dimensions of q and 0 for the constants, so q is what it was. v is 0 there. The cache of a
  softmax layer grows by D' / D.
* **RoPE** turns the first D dimensions (`partial_rotary_factor`). The scores' scale, 1 / sqrt(D') instead of 1 /
  sqrt(D), is made up for in q.

Shape legend: H query heads, G key/value heads, D head dim, M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trenchcoat.config import StudentConfig, UserError
from trenchcoat.models import auto
from trenchcoat.models.attach import student_config, students_of
from trenchcoat.models.card import base_facts, write_native_card
from trenchcoat.models.families import AttentionSite, attention_sites
from trenchcoat.models.licence import copy_licences
from trenchcoat.models.lora import merged_state
from trenchcoat.runtime.files import atomic_directory

STUDENT = "gated_delta_layer"
"""The student that is a layer of the class."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Base models whose other parts map onto the class."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that vLLM's kernels know."""
ROOT = 2.0**20
"""Root mean square of a widened head."""

Tensors = dict[str, Tensor]


def save_native(model: Any, directory: Path | str, tokenizer: Any = None, *, report: str = "") -> None:
    """Write a folder of :func:`native_model`, with the base model's licences and a model card; `report` is added to it.

    It is written atomically, and replaces a folder of that name. Raises UserError as :func:`native_model` does.
    """
    native = native_model(model)
    base = base_facts(model, online=True)
    with atomic_directory(Path(directory)) as partial:
        native.save_pretrained(partial)
        copy_licences(model, partial, online=True)
        write_native_card(partial, native.config, base, report=report)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def native_model(model: Any) -> Any:
    """A `Qwen3_5ForCausalLM` that computes what `model` does in mode `student`, LoRA merged; in `model`'s dtype.

    Raises UserError, naming the setting or tensor, for a model that this class cannot hold: another student or family,
    no kept layer, another activation, sliding windows or RoPE in kept layers, biases in the MLP or
    behind the output projection, float16 where heads are widened.
    """
    student, sites = student_config(model), attention_sites(model)
    _check_settings(model, student, sites)
    state = {name: tensor.detach().float() for name, tensor in merged_state(model).items()}
    _check_tensors(state)
    config = _config(model, sites)
    if model.dtype == torch.float16 and config.head_dim != sites[0].head_dim:
        raise UserError(
            "heads are widened by constants of 2^22, too large for float16: use --dtype bfloat16 or float32"
        )
    made: Any = _class()
    with torch.device("meta"):
        native = made(config)
    tensors = _tensors(model, sites, state, config)
    dtype = model.dtype
    result = native.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, strict=False, assign=True)
    native.tie_weights()
    lost = [name for name, parameter in native.named_parameters() if parameter.is_meta]
    if lost or result.unexpected_keys:
        raise UserError(
            f"this version of transformers has other tensors in Qwen3_5ForCausalLM than expected: "
            f"{', '.join([*lost, *result.unexpected_keys][:3])}; use one that trenchcoat supports"
        )
    native.model.rotary_emb = type(native.model.rotary_emb)(config)  # its frequencies were not computed on meta
    native.config.dtype = dtype
    if getattr(model, "generation_config", None) is not None:
        native.generation_config = model.generation_config
    return native.eval()


def _class() -> Callable[[Any], Any]:
    try:
        from transformers import Qwen3_5ForCausalLM
    except ImportError as error:
        raise UserError("export --native needs a transformers that has Qwen3.5: upgrade it") from error
    found: Callable[[Any], Any] = Qwen3_5ForCausalLM
    return found


# What cannot be held


def _check_settings(model: Any, student: StudentConfig, sites: list[AttentionSite]) -> None:
    config, family = model.config, str(model.config.model_type).removeprefix(auto.PREFIX)
    if student.name != STUDENT:
        raise UserError(
            f"student.name={student.name} is no layer of a class that other programs know; linearize with "
            f"student.name={STUDENT} to export with --native"
        )
    if student.kept_log_scale is not None:
        raise UserError(f"student.kept_log_scale={student.kept_log_scale:g}: Qwen3.5 has no scale by position")
    if family not in FAMILIES:
        raise UserError(
            f"a {family} model has parts that Qwen3.5 lacks; --native writes models of {', '.join(FAMILIES)}"
        )
    if config.hidden_act != "silu":
        raise UserError(f"hidden_act of the base model is {config.hidden_act!r}, which Qwen3.5 lacks: it has silu")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError("--native cannot write quantized weights: load the model without quantization")
    kept = [site for site in sites if site.index not in students_of(model)]
    if not kept:
        raise UserError(
            "no layer keeps softmax attention, and Transformers cannot generate with a Qwen3.5 that has none: its "
            "cache counts tokens there. Keep at least one: student.keep_softmax=[0]"
        )
    _check_kept(config, family, kept)


def _check_kept(config: Any, family: str, kept: list[AttentionSite]) -> None:
    types = getattr(config, "layer_types", None)
    for site in kept:
        sliding = types[site.index] == "sliding_attention" if types else getattr(config, "sliding_window", None)
        if sliding:
            raise UserError(
                f"layer {site.index} is kept and has a sliding window (sliding_window={config.sliding_window}), which "
                "Qwen3.5 lacks: keep other layers, or none"
            )
        if abs(site.module.scaling * site.head_dim**0.5 - 1.0) > 1e-6:
            raise UserError(
                f"the scale of the scores of layer {site.index} is not 1 / sqrt(head_dim): {site.module.scaling}"
            )
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES or "partial_rotary_factor" in config.rope_parameters:
        raise UserError(
            f"kept layers have RoPE of type {rope!r}; --native writes {', '.join(ROPE_TYPES)}, of whole heads"
        )
    if family != "qwen3":
        _widened(kept[0].head_dim)


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    """The class has no bias in its MLP or behind the output projection."""
    for name, tensor in state.items():
        if (
            name.endswith(("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias", "o_proj.bias"))
            and tensor.any()
        ):
            raise UserError(f"{name} is not 0, and Qwen3.5 has no bias there")


def _widened(dim: int) -> int:
    """D' for heads of `dim` without q and k norms."""
    wider = next((width for width in WIDTHS if width - width // 16 >= dim), None)
    if wider is None:
        raise UserError(
            f"the model has heads of {dim} without q and k norms, and there are no wider ones for the constants that "
            f"undo those of Qwen3.5 (at most {WIDTHS[-1]})"
        )
    return wider


# Settings and tensors


def _config(model: Any, sites: list[AttentionSite]) -> Any:
    from transformers import Qwen3_5TextConfig

    base, first, students = model.config, sites[0], students_of(model)
    normed, rope = _has_norms(model), dict(base.rope_parameters)
    dim = first.head_dim if normed else _widened(first.head_dim)
    factor = first.head_dim / dim
    rope["partial_rotary_factor"] = factor if int(dim * factor) == first.head_dim else (first.head_dim + 0.5) / dim
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
        "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    biases = dim != first.head_dim or any("_proj.bias" in name and ".self_attn." in name for name in _kept_names(model))
    return Qwen3_5TextConfig(
        **{name: getattr(base, name) for name in same},
        head_dim=dim,
        rope_parameters=rope,
        layer_types=["linear_attention" if site.index in students else "full_attention" for site in sites],
        attention_bias=biases,
        qkv_bias=biases,  # vLLM's name for it
        mamba_ssm_dtype="float32",  # of the memory, in vLLM
        linear_conv_kernel_dim=4,
        linear_key_head_dim=first.head_dim,
        linear_value_head_dim=first.head_dim,
        linear_num_key_heads=first.num_heads,
        linear_num_value_heads=first.num_heads,
    )


def _has_norms(model: Any) -> bool:
    return hasattr(attention_sites(model)[0].module, "q_norm")


def _kept_names(model: Any) -> list[str]:
    """Names of the parameters of kept layers' attention."""
    students = students_of(model)
    return [
        f"{site.name}.{name}"
        for site in attention_sites(model)
        if site.index not in students
        for name, _ in site.module.named_parameters()
    ]


def _tensors(model: Any, sites: list[AttentionSite], state: Mapping[str, Tensor], config: Any) -> Tensors:
    """The class's tensors, in float32."""
    students = students_of(model)
    tensors: Tensors = {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}
    final = state["model.norm.weight"]
    if config.tie_word_embeddings:
        tensors["model.norm.weight"] = final - 1.0
    else:
        tensors["model.norm.weight"] = torch.zeros_like(final)
        tensors["lm_head.weight"] = state["lm_head.weight"] * final
    for site in sites:
        layer, at = f"model.layers.{site.index}.", f"{site.name}."
        before, after = state[f"{layer}input_layernorm.weight"], state[f"{layer}post_attention_layernorm.weight"]
        own = {name.removeprefix(at): tensor for name, tensor in state.items() if name.startswith(at)}
        if site.index in students:
            linear = {name.removeprefix("student."): t for name, t in own.items() if name.startswith("student.")}
            found = {
                f"linear_attn.{name}": t * before if name.startswith("in_proj") else t for name, t in linear.items()
            }
        else:
            found = {f"self_attn.{name}": t for name, t in _attention(own, site, before, config).items()}
        for name in ("gate_proj", "up_proj"):
            found[f"mlp.{name}.weight"] = state[f"{layer}mlp.{name}.weight"] * after
        found["mlp.down_proj.weight"] = state[f"{layer}mlp.down_proj.weight"]
        found |= {f"{name}_layernorm.weight": torch.zeros_like(before) for name in ("input", "post_attention")}
        tensors |= {f"{layer}{name}": tensor for name, tensor in found.items()}
    return tensors


def _attention(own: Mapping[str, Tensor], site: AttentionSite, before: Tensor, config: Any) -> Tensors:
    """A kept layer: q with its gate, k, v, o and the norms, from `self_attn` after a norm of weight `before`."""
    dim, wide = site.head_dim, config.head_dim
    heads = {"q": site.num_heads, "k": site.num_kv_heads, "v": site.num_kv_heads}
    constant = torch.zeros(wide)
    if wide != dim:
        constant[-(wide // 16) :] = 4.0 * ROOT
    found: Tensors = {}
    for name, number in heads.items():
        scale = (wide / dim) ** 0.5 if name == "q" else 1.0
        weight = _padded(scale * own[f"{name}_proj.weight"] * before, number, dim, wide)
        given = own.get(f"{name}_proj.bias", torch.zeros(number * dim))
        bias = _padded(scale * given, number, dim, wide) + (0.0 if name == "v" else constant)
        if name == "q":  # each head's query, then its gate
            weight, bias = (torch.cat((part, torch.zeros_like(part)), 1) for part in (weight, bias))
        found[f"{name}_proj.weight"] = weight.flatten(0, 1)
        if config.attention_bias:
            found[f"{name}_proj.bias"] = bias.flatten()
    output = own["o_proj.weight"]
    columns = _padded(2.0 * output.mT, site.num_heads, dim, wide).flatten(0, 1)
    found["o_proj.weight"] = columns.mT.contiguous()
    if config.attention_bias:
        found["o_proj.bias"] = torch.zeros(len(output))
    for name in ("q_norm.weight", "k_norm.weight"):
        if wide == dim:
            found[name] = own[name] - 1.0
        else:
            found[name] = torch.cat((torch.full((dim,), ROOT - 1.0), torch.full((wide - dim,), -1.0)))
    return found


def _padded(rows: Tensor, heads: int, dim: int, wide: int) -> Tensor:
    """[heads, wide, ...]: the rows of each head, and zeros."""
    split = rows.unflatten(0, (heads, dim))
    return torch.cat((split, split.new_zeros(heads, wide - dim, *split.shape[2:])), 1)

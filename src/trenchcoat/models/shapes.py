"""Sizes of a model without its weights: how many parameters a layer has, how many heads, how large the vocabulary.

They are read from the model that Transformers builds from a config on the meta device, so every supported family counts
right. Configs of the Llama 3 family and of Mistral 7B ship with this package (public facts, in the format of a hub
`config.json`), so planning a run needs neither weights nor a network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trenchcoat.config import LoraConfig, UserError
from trenchcoat.config.errors import refusals
from trenchcoat.config.paths import expanded
from trenchcoat.models.basefolder import LOAD_ERRORS, read_config, reason
from trenchcoat.models.embedded import TEACHER_DIR
from trenchcoat.models.families import attention_sites, choose_lora_targets, decoder_of, linear_layers
from trenchcoat.models.gguf import gguf_config, is_gguf
from trenchcoat.models.transformers_internals import choose_attention

SHIPPED_FOLDER = Path(__file__).parent / "shipped_configs"

SHIPPED: dict[str, str] = {
    "meta-llama/llama-3.1-8b": "llama3_1_8b",
    "meta-llama/meta-llama-3.1-8b": "llama3_1_8b",
    "meta-llama/llama-3.1-70b": "llama3_1_70b",
    "meta-llama/meta-llama-3.1-70b": "llama3_1_70b",
    "meta-llama/llama-3.1-405b": "llama3_1_405b",
    "meta-llama/meta-llama-3.1-405b": "llama3_1_405b",
    "meta-llama/meta-llama-3-8b": "llama3_8b",
    "mistralai/mistral-7b-v0.1": "mistral_7b",
    "huggingfacetb/smollm2-135m": "smollm2_135m",
}
"""Hub id in lower case, without `-instruct`, -> name of the shipped config."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder. Parameters are counted, not bytes; a layer's are the largest layer's."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    """Columns of the widest linear layer of the MLP (of the chosen experts together, in a mixture)."""
    vocab: int
    layer_parameters: int
    """Parameters of one layer, every expert included."""
    used_parameters: int
    """Entries of one layer's matrices that a token uses: the active experts only."""
    embedding_parameters: int
    head_parameters: int
    """0 when the head shares the embedding."""
    other_parameters: int
    """Final norm and the like."""
    projections: tuple[tuple[str, int, int], ...]
    """(name, inputs, outputs) of the linear layers of `self_attn`."""
    mlp_layers: tuple[tuple[str, int, int], ...] = ()
    """The same of the MLP; none in a mixture of experts."""

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        body = self.layers * self.layer_parameters + self.embedding_parameters
        return body + self.head_parameters + self.other_parameters

    @property
    def tied(self) -> bool:
        """The vocabulary head is the embedding."""
        return self.head_parameters == 0

    def lora_layers(self, cfg: LoraConfig) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one layer that `cfg.targets` gives a LoRA.

        In families with fused layers, LoRA goes there, as in `lora.add_lora`; none unless `cfg.train` is `lora`.
        UserError for a target that the model does not have.
        """
        known = {name: (inputs, outputs) for name, inputs, outputs in (*self.projections, *self.mlp_layers)}
        chosen = choose_lora_targets(cfg.targets, known, "the model")
        return [known[name] for name in chosen] if cfg.train == "lora" else []

    def lora_parameters(self, cfg: LoraConfig) -> int:
        """Parameters of LoRA in the whole model."""
        return self.layers * sum(cfg.rank * (inputs + outputs) for inputs, outputs in self.lora_layers(cfg))


def shapes_of(config: Any) -> Shapes:
    """Sizes of the model of a Transformers config; UserError (`UnsupportedFamilyError`) for an unsupported one."""
    model = meta_model(config)
    sites = attention_sites(model)
    first, layers = sites[0], list(decoder_of(model).layers)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    head_parameters = 0 if head is None or head.weight is embedding else sum(p.numel() for p in head.parameters())
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    largest = max(layers, key=lambda layer: sum(p.numel() for p in layer.parameters()))
    share = _expert_share(config)
    linear = linear_layers(model, first)
    sizes = {n: (n, m.in_features, m.out_features) for n, (path, m) in linear.items()}
    own = [name for name, (path, _) in linear.items() if path.startswith(f"{first.name}.")]
    return Shapes(
        family=str(config.model_type),
        layers=len(layers),
        hidden=embedding.shape[1],
        heads=first.num_heads,
        kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        mlp_width=_mlp_width(config),
        vocab=embedding.shape[0],
        layer_parameters=sum(p.numel() for p in largest.parameters()),
        used_parameters=round(
            sum(
                p.numel() * (share if ".experts." in name else 1.0)
                for name, p in largest.named_parameters()
                if p.ndim >= 2
            )
        ),
        embedding_parameters=embedding.numel(),
        head_parameters=head_parameters,
        other_parameters=sum(p.numel() for p in model.parameters()) - in_layers - embedding.numel() - head_parameters,
        projections=tuple(sizes[name] for name in own),
        mlp_layers=tuple(found for name, found in sizes.items() if name not in own),
    )


def positions_of(config: Any) -> int | None:
    """The longest text, in tokens, that the model of a Transformers config has positions for; None if it has no limit
    that is known."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    grows = float(rope.get("factor") or 1.0) if rope.get("rope_type") == "dynamic" else 1.0
    return None if limit is None else int(limit * grows)


def meta_model(config: Any) -> Any:
    """The causal language model of a config on the meta device: real modules, no memory."""
    config = copy.deepcopy(config)
    what = f"a {config.model_type} model cannot be built from the config of {config.name_or_path or 'this model'!r}"
    with refusals(lambda error: f"{what}: {reason(error)}", LOAD_ERRORS), torch.device("meta"):
        choose_attention(config, None)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _experts(config: Any) -> tuple[int, int]:
    """(experts, active experts per token); (1, 1) without a mixture."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 1)
    return count, min(count, int(getattr(config, "num_experts_per_tok", None) or 1))


def _expert_share(config: Any) -> float:
    count, chosen = _experts(config)
    return chosen / count


def _mlp_width(config: Any) -> int:
    width = int(getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 0) or 0)
    return width * _experts(config)[1]


def find_config(path: str, revision: str | None = None) -> Any:
    """The Transformers config of `model.path`: `embedded`, a local folder, a `.gguf` file, or a hub id.

    A hub id is looked for in the local cache, then among the shipped configs, and only then on the hub. Raises
    ``UserError`` when it is found nowhere.
    """
    local = TEACHER_DIR if path == "embedded" else Path(expanded(path))
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"model.path={path!r} has no config.json; give a model folder in Hugging Face format")
        return read_config(local)
    if is_gguf(local):
        return gguf_config(local.resolve())
    if path.startswith((".", "/")):
        raise UserError(f"model.path={path!r}: no such folder. Give a local folder, a hub id, or `embedded`")
    try:
        return read_config(path, revision, local_files_only=True)
    except UserError:
        shipped = SHIPPED.get(path.lower().removesuffix("-instruct"))
    if shipped is not None:
        return read_config(SHIPPED_FOLDER / f"{shipped}.json")
    try:
        return read_config(path, revision)
    except UserError as error:
        raise UserError(
            f"model.path={path!r}: its config.json is neither in the local cache nor among the shipped ones "
            f"({', '.join(sorted(set(SHIPPED.values())))}), and it could not be fetched from the hub; a folder with "
            f"only the model's config.json is enough to plan with ({error})"
        ) from error

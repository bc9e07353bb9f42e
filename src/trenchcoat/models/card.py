"""What a complete folder says about itself: its model card, and the module that opens it in a stranger's process.

The module holds no code of a model: it imports the classes from the installed package, or says how to install it.
`trenchcoat.load` and `import trenchcoat` do without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from trenchcoat.config.package import INSTALL
from trenchcoat.models import auto
from trenchcoat.models.licence import CARD, base_source, card_licence, hub_licence, licence_files
from trenchcoat.runtime.files import write_text
from trenchcoat.students import student_class

_MEASURED = "## What was measured"
MODULE = "modeling_trenchcoat"
"""Name of the module that `auto_map` names."""

_CODE = '''"""Opens this folder with `trust_remote_code=True`. The model's classes are in the package trenchcoat."""

try:
    from trenchcoat.models.auto import config_class, model_class
except ImportError as error:
    raise ImportError({missing!r}) from error

{config} = config_class({family!r})
{model} = model_class({family!r})
'''


def write_code(family: str, folder: Path | None = None) -> dict[str, str]:
    """The `auto_map` of a folder of `family`; with `folder`, its module is written there."""
    config, model = auto.config_class(family).__name__, auto.model_class(family).__name__
    if folder is not None:
        missing = f"this model needs the Python package trenchcoat: {INSTALL}"
        write_text(folder / f"{MODULE}.py", _CODE.format(missing=missing, config=config, model=model, family=family))
    return {"AutoConfig": f"{MODULE}.{config}", "AutoModelForCausalLM": f"{MODULE}.{model}"}


def base_facts(model: Any, *, online: bool = False) -> dict[str, Any]:
    """What is known of the base of `model`: `name`, and where they are known `hub` (its id), `revision` and `licence`.

    A folder is known by its name alone: its path is the business of this machine. `online`: ask the hub for the licence
    where it is not in the cache.
    """
    ours = getattr(model.config, "trenchcoat", None)
    if isinstance(ours, Mapping) and isinstance(ours.get("base"), Mapping):
        return dict(ours["base"])
    path, revision = base_source(model)
    if path == "embedded":
        return {"name": "the teacher embedded in trenchcoat", "licence": {"license": "apache-2.0"}}
    local = Path(path).expanduser()
    if not path or local.exists() or local.is_absolute():
        licence = card_licence(local / CARD) if path and local.is_dir() else None
        name = local.name or f"a {str(model.config.model_type).removeprefix(auto.PREFIX)} model in memory"
        return {"name": name} | ({} if licence is None else {"licence": licence})
    licence = hub_licence(path, revision, online)
    known = {"hub": path, "revision": revision, "licence": licence}
    return {"name": path, **{name: value for name, value in known.items() if value is not None}}


def write_card(folder: Path, config: Any = None, *, report: str = "", tags: Sequence[str] = ()) -> None:
    """Write the model card of a complete folder, whose linearized config is `config`; `report`: what was measured, in
    Markdown. It names the licence files that are in the folder. Without `config`, only add `tags` to the card that is
    there."""
    path, files = folder / CARD, [file.name for file in licence_files(folder)]
    card = ModelCard(path.read_text(encoding="utf-8") if config is None else card_text(config, report, files))
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    write_text(path, str(card))


def card_text(config: Any, report: str = "", files: Sequence[str] = ()) -> str:
    """The model card of a complete folder whose linearized config is `config`; see :func:`write_card`. `files`: names
    of the base model's licences, notices and use policies."""
    ours = dict(config.trenchcoat)
    base = dict(ours["base"])
    name = base["name"].rpartition("/")[2]
    lines = [
        *_head(base, files),
        f"# Linearized: {name}", "",
        f"This is {base['name']} with its softmax attention replaced, by the package trenchcoat: a token attends "
        "exactly to a window of recent tokens, and to everything older through a state of constant size, except where "
        "softmax attention was kept.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in _facts(config, ours, base, files).items()), "",
        "## Run it", "",
        "```python",
        "from transformers import pipeline",
        'write = pipeline("text-generation", model="NAME_OR_FOLDER", trust_remote_code=True)',
        'print(write("A trenchcoat is", max_new_tokens=40)[0]["generated_text"])',
        "```", "",
        f"This needs the Python package trenchcoat: {INSTALL}. `trust_remote_code=True` runs `{MODULE}.py` of this "
        "folder, which only imports that package; after `import trenchcoat` it is not needed, and "
        '`trenchcoat.load("NAME_OR_FOLDER")` never runs it.', "",
    ]  # fmt: skip
    if report:
        lines += [_MEASURED, "", report.strip(), ""]
    return "\n".join(lines)


def write_native_card(folder: Path, config: Any, base: Mapping[str, Any], *, report: str = "") -> None:
    """Write the model card of a folder of a class that Transformers ships, whose config is `config`, made from a
    linearized `base` (as :func:`base_facts` says); `report`: what was measured, in Markdown."""
    linear = sum(kind == "linear_attention" for kind in config.layer_types)
    made = _head(base, [file.name for file in licence_files(folder)])
    lines = [
        *made, f"# Linearized: {base['name'].rpartition('/')[2]}", "",
        f"This is {base['name']} with gated delta rule layers in place of {linear} of its {len(config.layer_types)} "
        f"attention layers, made by the package trenchcoat and written as a model of Transformers' own class "
        f"{type(config).__name__.removesuffix('TextConfig')}ForCausalLM. It opens without that package, in "
        "Transformers, vLLM, llama.cpp and whatever else knows the class. The licence of the base model applies to "
        "these weights too.", "",
    ]  # fmt: skip
    write_text(folder / CARD, "\n".join(lines + ([_MEASURED, "", report, ""] if report else [])))


def measured_in(folder: Path) -> str:
    """The `report` that a complete folder's card was written with; empty where there is none."""
    try:
        return (folder / CARD).read_text(encoding="utf-8").partition(f"{_MEASURED}\n")[2].strip()
    except OSError:
        return ""


def _head(base: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """The lines of a card before its text: what the hub reads."""
    licence = dict(base.get("licence") or {})
    if files and licence.get("license", "other") == "other" and "license_link" not in licence:
        licence = {"license": "other", "license_name": "as-base-model", **licence, "license_link": files[0]}
    head = ["library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {base['hub']}"] if "hub" in base else []
    head += [f"{key}: {json.dumps(value)}" for key, value in licence.items()]
    return ["---", *head, "tags:", "- trenchcoat", "- linear-attention", "---", ""]


def _facts(config: Any, ours: Mapping[str, Any], base: Mapping[str, Any], files: Sequence[str]) -> dict[str, str]:
    """The rows of the card's table."""
    student = auto.student_settings(ours["student"])
    revision = f", revision {base['revision']}" if "revision" in base else ""
    linked = f"[{base['hub']}](https://huggingface.co/{base['hub']})" if "hub" in base else base["name"]
    maps, cls, licence = student.feature_map, student_class(student.name), dict(base.get("licence") or {})
    made = f"`{maps.name}`, feature dimension {maps.feature_dim}, {student.key_maps.replace('_', ' ')}"
    inside = ", ".join(f"[{name}]({name})" for name in files)
    named = licence.get("license_name") or licence.get("license")
    if named is None:
        named = f"see {inside}" if files else "not known: look it up"
    elif files:
        named = f"{named} ({inside})"
    facts = {
        "base model": f"{linked}{revision}",
        "licence of the base model": f"{named}; it applies to these weights too",
        "attention": f"`{student.name}`, window {student.window}, sinks {student.sinks}",
        "feature maps": made if cls.has_far and cls.has_maps else "none",
        "keeps softmax attention": _kept(config, student),
        "LoRA": f"rank {ours['lora']['rank']}, not merged" if ours.get("lora") else "none, or merged into the weights",
        "all settings": "`config.json`, under `trenchcoat`",
    }
    return facts


def _kept(config: Any, student: Any) -> str:
    layers = [str(layer) for layer in student.keep_softmax] + [entry for entry in student.keep if "." not in entry]
    groups = [entry for entry in student.keep if "." in entry]
    text = config.get_text_config()
    total = int(text.num_hidden_layers) * int(text.num_key_value_heads)
    parts = [f"{len(layers)} of {text.num_hidden_layers} layers ({', '.join(layers)})"] if layers else []
    parts += [f"{len(groups)} of {total} key/value groups ({', '.join(groups)}; layer.group)"] if groups else []
    scale = student.kept_log_scale
    parts += [f"scores times ln(t + {scale:g}) / ln({scale:g})"] if parts and scale is not None else []
    return "; ".join(parts) or "nowhere"

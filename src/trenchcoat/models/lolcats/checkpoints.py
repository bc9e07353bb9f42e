"""Checkpoints of the original LoLCATs code, imported as adapters and exported again.

Where its attention and ours are the same function, and where they differ, is in `docs/LOLCATS.md`. The base model's
weights are never loaded: its config gives the shapes, its files the identity that the adapter remembers.

Shape legend: H query heads, G key/value heads, D head dim, P columns of a map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trenchcoat.config import LoraConfig, ModelConfig, StudentConfig, UserError
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students
from trenchcoat.models.basefolder import base_config, base_folder
from trenchcoat.models.families import attention_sites
from trenchcoat.models.hub import ADAPTER_META, adapter_state, read_adapter
from trenchcoat.models.identity import fingerprint, remember_fingerprint
from trenchcoat.models.loading import model_source
from trenchcoat.models.lolcats.files import Key, StateFile, fetched, read_state, write_states
from trenchcoat.models.lolcats.settings import (
    FAMILIES,
    WINDOWED,
    Asked,
    check_exportable,
    layers_of,
    lora_of,
    original_words,
    plain,
    student_of,
)
from trenchcoat.models.lora import add_lora
from trenchcoat.models.shapes import meta_model

MAPS_FILE, LORA_FILE = "maps.pt", "lora.pt"

_OURS = {"q": "query_map", "k": "key_map"}
_STUDENT = re.compile(r"(.*layers\.(\d+)\.self_attn)\.student\.(.+)")
_LORA = re.compile(r"(.*layers\.\d+\.self_attn\.\w+\.lora_[AB])\.weight")


def import_checkpoint(maps: Path | str, lora: Path | str | None, base: str, out: Path, asked: Asked) -> list[str]:
    """Write the adapter folder `out` from the original's files; returns what was read and assumed, in sentences.

    Args:
        maps: `.pt` file of feature maps and window factors (and perhaps LoRA), or the hub id of a repository with one.
        lora: the same of LoRA matrices (and perhaps maps trained further, which then win).
        base: folder or hub id of the model that the checkpoint was made from.
        asked: settings that the keys do not determine, or that override them.

    Raises:
        UserError: files that are not such a checkpoint, that have missing or extra tensors, or do not fit the base.
    """
    _check_empty(out)
    found = read_state(fetched(maps))
    if lora is not None:
        found.update(read_state(fetched(lora)))
    student, lora_cfg = student_of(found, asked), lora_of(found, asked)
    if lora is not None and lora_cfg is None:
        raise UserError(f"{lora} holds no LoRA; leave --lora out, or give the file of stage 2")
    cfg = ModelConfig(path=str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base)
    folder = base_folder(model_source(cfg), None)
    config = base_config(cfg, folder)
    model = _empty_model(config, found, student, lora_cfg)
    tensors = {**_maps(model, found, student), **_lora_tensors(model, found, lora_cfg)}
    known = {name.replace(".weight", ".default.weight") if "lora_" in name else name: t for name, t in tensors.items()}
    model.load_state_dict(known, strict=False, assign=True)
    remember_fingerprint(model, meta_model(config), folder)
    hub.save_adapter(model, out, base=cfg, student=student, lora=lora_cfg, base_fingerprint=fingerprint(model))
    return _summary(found, student, lora_cfg, asked)


def _empty_model(config: Any, found: StateFile, student: StudentConfig, lora: LoraConfig | None) -> Any:
    """The base with students and LoRA, on the meta device: names and shapes of everything the files must contain."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--base is a {config.model_type!r} model; the original has checkpoints of {' and '.join(FAMILIES)} models"
        )
    model = meta_model(config)
    layers = {site.index for site in attention_sites(model)}
    strange = sorted(set(layers_of((*found.maps, *found.lora))) - layers)
    if strange:
        raise UserError(
            f"{found.path} has tensors of layer {strange[0]}, --base has the layers 0..{max(layers)}; give the model "
            "that the checkpoint was made from"
        )
    attach_students(model, student)
    if lora is not None:
        add_lora(model, lora)
    return model


def _maps(model: Any, found: StateFile, student: StudentConfig) -> dict[str, Tensor]:
    """The students' parameters by our names, float32."""
    sites = {site.index: site for site in attention_sites(model)}
    linear = [index for index in sites if index not in student.keep_softmax]
    first = sites[linear[0]]
    shapes = _map_shapes(student, first.num_heads, first.head_dim)
    optional = {name for name in shapes if student.tied and name.startswith("feature_map_k.")}
    _check_complete(found, found.maps, {(index, name) for index in linear for name in shapes}, optional)
    for (index, name), tensor in found.maps.items():
        _check_tensor(found, (index, name), tensor, shapes[name])
    tensors: dict[str, Tensor] = {}
    for index in linear:
        site, own = sites[index], {name: t.float() for (at, name), t in found.maps.items() if at == index}
        path = f"{site.name}.student"
        if student.name in WINDOWED:
            tensors[f"{path}.mix_H"] = own["window_factors"].flatten()
        for side, ours in _OURS.items():
            if side == "k" and student.tied:
                _check_tied(found, index, own)
                continue
            shared = site.num_heads // site.num_kv_heads if side == "k" and student.key_maps == "per_kv_head" else 1
            weight = _unrepeat(found, index, own[f"feature_map_{side}.mlp.layer"], shared)
            tensors[f"{path}.{ours}.weight"] = weight
            bias = own.get(f"feature_map_{side}.mlp.bias")
            if bias is not None:
                bias = _unrepeat(found, index, bias.reshape(-1, 1), shared)
                tensors[f"{path}.{ours}.bias"] = bias.expand(-1, weight.shape[2]).contiguous()
    return tensors


def _map_shapes(student: StudentConfig, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one layer's tensors in the original."""
    shapes: dict[str, tuple[int, ...]] = {}
    bias = student.feature_map.name == "t2r" if student.feature_map.bias is None else student.feature_map.bias
    for side in _OURS:
        shapes[f"feature_map_{side}.mlp.layer"] = (heads, head_dim, student.feature_map.feature_dim)
        if bias:
            shapes[f"feature_map_{side}.mlp.bias"] = (1, heads, 1, 1)
    if student.name in WINDOWED:
        shapes["window_factors"] = (1, heads, 1, 1)
    return shapes


def _check_complete(found: StateFile, given: Iterable[Key], wanted: set[Key], optional: set[str]) -> None:
    present = set(given)
    missing = sorted(key for key in wanted - present if key[1] not in optional)
    extra = sorted(present - wanted)
    if missing:
        whole = sorted({layer for layer, _ in missing} - {layer for layer, _ in present})
        hint = f"; where layers kept their softmax attention, say so: --keep-softmax {','.join(map(str, whole))}"
        raise UserError(
            f"{found.path} is incomplete: {len(missing)} tensors are missing, e.g. {missing[0][1]} of layer "
            f"{missing[0][0]}{hint if whole else ''}"
        )
    if extra:
        raise UserError(
            f"{found.path} has {len(extra)} tensors too many, e.g. {extra[0][1]} of layer {extra[0][0]}, for the "
            "settings recognised or given"
        )


def _check_tensor(found: StateFile, key: Key, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise UserError(
            f"{found.path}: {key[1]} of layer {key[0]} is {list(tensor.shape)}; with --base and these settings it "
            f"should be {list(wanted)}. Is --base the model that the checkpoint was made from?"
        )
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{found.path}: {key[1]} of layer {key[0]} has values that are not finite; the file is damaged")


def _check_tied(found: StateFile, index: int, own: Mapping[str, Tensor]) -> None:
    for name, tensor in own.items():
        if name.startswith("feature_map_k.") and not tensor.equal(own[name.replace("_k.", "_q.")]):
            raise UserError(f"{found.path}: layer {index} should share one map, but {name} is not its query map")


def _unrepeat(found: StateFile, index: int, per_head: Tensor, shared: int) -> Tensor:
    """[H, ...] -> [H / shared, ...], checked to be the same in each group of heads."""
    if shared == 1:
        return per_head
    groups = per_head.unflatten(0, (-1, shared))
    if not groups.equal(groups[:, :1].expand_as(groups)):
        raise UserError(f"{found.path}: layer {index}'s key maps should be one per key/value head, but heads differ")
    return groups[:, 0].contiguous()


def _lora_tensors(model: Any, found: StateFile, lora: LoraConfig | None) -> dict[str, Tensor]:
    if lora is None:
        return {}
    wanted: dict[Key, tuple[str, Tensor]] = {}
    for name, parameter in adapter_state(model).items():
        if _LORA.fullmatch(name):
            layer, _, inner = name.partition("layers.")[2].partition(".self_attn.")
            wanted[int(layer), inner.removesuffix(".weight")] = name, parameter
    _check_complete(found, found.lora, set(wanted), set())
    tensors = {}
    for key, (name, parameter) in wanted.items():
        _check_tensor(found, key, found.lora[key], tuple(parameter.shape))
        tensors[name] = found.lora[key].float()
    return tensors


def _summary(found: StateFile, student: StudentConfig, lora: LoraConfig | None, asked: Asked) -> list[str]:
    own = "as the file says" if "student" in found.settings else "recognised from the keys"
    window = f", window {student.window}" if student.name in WINDOWED else ""
    lines = [
        f"attention: {student.name}{window} ({'as asked for' if asked.attention else own}); feature maps: "
        f"{student.feature_map.name} of {student.feature_map.feature_dim}{', tied' if student.tied else ''}; "
        f"{len(layers_of(found.maps))} layers"
    ]
    if "student" not in found.settings:
        lines.append(
            "the keys say neither the window's width and kind nor the activation; where the model was trained with "
            "others, give --window, --attention, --feature-map, --skip-connection, --affine"
        )
    if lora is not None:
        lines.append(f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}")
    if found.ignored:
        lines.append(f"ignored: {len(found.ignored)} buffers that the model computes itself, e.g. {found.ignored[0]}")
    return lines


def export_checkpoint(source: Path, out: Path) -> list[str]:
    """Write the adapter in `source` (an adapter's or a run's folder) as the original's files; returns sentences.

    `maps.pt` holds feature maps and window factors, `lora.pt` LoRA where there is one; our settings are stored with the
    tensors, so that :func:`import_checkpoint` needs nothing else. Raises UserError for a model that the original does
    not support.
    """
    _check_empty(out)
    folder = hub.find_adapter(source)
    if folder is None:
        raise UserError(
            f"{source} holds no adapter: give an adapter's or a run's folder (a merged model has its LoRA in its "
            "weights, which the original's files cannot hold)"
        )
    tensors, meta = read_adapter(folder)
    if not isinstance(meta.get("student"), Mapping) or not isinstance(meta.get("base"), Mapping):
        raise UserError(f"{folder / ADAPTER_META} lacks `base` or `student`; export the adapter again")
    student = student_of(StateFile(folder, settings={"student": meta["student"]}, maps=_as_maps(tensors)), Asked())
    family = str(dict(meta["base"].get("config") or {}).get("model_type"))
    check_exportable(student, family)
    maps: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        found = _STUDENT.fullmatch(name)
        if found is not None:
            maps |= _original_maps(found[1], found[3], tensor, tensors, student)
        else:
            lora[f"base_model.model.{name.replace('.weight', '.default.weight')}"] = tensor
    files: dict[str, Any] = {MAPS_FILE: (maps, {"student": plain(student)})}
    if lora:
        files[LORA_FILE] = (lora, {"lora": meta["lora"]})
    write_states(out, files)
    words = ", ".join(f"{name}: {value}" for name, value in original_words(student).items())
    return [f"{' and '.join(files)} are in {out}", f"the original's configuration needs, under `attention`: {words}"]


def _as_maps(tensors: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """What settings are checked against: whether there are window factors."""
    mixes = [t for name, t in tensors.items() if name.endswith(".mix_H")]
    return {(0, "window_factors"): mixes[0]} if mixes else {}


def _original_maps(
    path: str, inner: str, tensor: Tensor, every: Mapping[str, Tensor], student: StudentConfig
) -> dict[str, Tensor]:
    """One of a student's parameters under the original's names and shapes."""
    if inner == "mix_H":
        return {f"{path}.window_factors": tensor.view(1, -1, 1, 1)}
    module, _, kind = inner.partition(".")
    heads = every[f"{path}.student.query_map.weight"].shape[0]
    if tensor.shape[0] != heads:
        tensor = tensor.repeat_interleave(heads // tensor.shape[0], 0)
    if kind == "bias":
        if not tensor.equal(tensor[:, :1].expand_as(tensor)):
            raise UserError(
                f"this adapter cannot be written for the original code: {path}.student.{inner} has a bias for each "
                "feature, the original one for each head"
            )
        tensor = tensor[:, :1].reshape(1, -1, 1, 1)
    sides = {"query_map": "q", "key_map": "k"}
    written = {f"{path}.feature_map_{sides[module]}.mlp.{'layer' if kind == 'weight' else kind}": tensor}
    if student.tied:
        written |= {name.replace("feature_map_q", "feature_map_k"): t for name, t in written.items()}
    return written


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another folder")

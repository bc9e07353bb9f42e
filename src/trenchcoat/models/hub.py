"""Linearized models on disk: adapter folders, merged folders, and `load` for both.

* adapter folder: adapter.safetensors (students and LoRA, or every weight), trenchcoat.json (settings, base model, its
  identity);
* merged folder: a complete Transformers checkpoint of class Linearized<Family>ForCausalLM;
* run folder: a run's folder; its `adapter` folder is used.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trenchcoat.config import LoraConfig, ModelConfig, StudentConfig, UserError
from trenchcoat.config.errors import refusals
from trenchcoat.config.paths import absolute_if_here, expanded
from trenchcoat.models import auto
from trenchcoat.models.attach import attach_students, set_mode, student_config, students_of
from trenchcoat.models.basefolder import LOAD_ERRORS, read_config, reason
from trenchcoat.models.card import write_card
from trenchcoat.models.identity import fingerprint
from trenchcoat.models.licence import copy_licences
from trenchcoat.models.loading import (
    ADAPTER_META,
    load_model,
    model_source,
    placement,
    require_hub_id,
    resolve_device,
    resolve_dtype,
    stored_dtype,
)
from trenchcoat.models.lora import add_saved_lora, has_lora, lora_parameters, lora_settings, lora_shape, merged_state
from trenchcoat.models.offload import keep_students_on_device
from trenchcoat.models.saving import complete_model, remember_tokenizer
from trenchcoat.models.stage2 import trains_all
from trenchcoat.models.text import embeddings_of, remember_embeddings
from trenchcoat.runtime.files import (
    CorruptFileError,
    atomic_directory,
    load_tensors,
    partial_path,
    read_json,
    remove_abandoned,
    save_tensors,
    saving,
    sha256,
    sync,
)
from trenchcoat.runtime.sealed import opened, sealed, write_sealed

ADAPTER_FILE = "adapter.safetensors"

BEFORE = "before"
"""Key of ``trenchcoat.json`` while an adapter is being replaced: the meta of the one before."""

ADAPTER_VERSION = 2
"""Version of the adapter folder's layout."""

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
"""Fields of the base model's config saved with the adapter, to report how another base differs."""

_SOURCE = ("path", "revision", "attention")
"""Fields of ModelConfig that identify the adapter's base model."""


def save_adapter(
    model: Any,
    directory: Path | str,
    *,
    base: ModelConfig | None = None,
    student: StudentConfig | None = None,
    lora: LoraConfig | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write what was learned, without the base model, to an adapter folder.

    `base`, `student` and `lora` are the settings that the model was made with; only `base` has to be given, and not for
    a model from :func:`load`. `base_fingerprint` is the base weights' fingerprint, if already computed. Raises
    UserError for missing settings, and SaveError when the disk is full.
    """
    known: dict[str, Any] = getattr(model, "trenchcoat_adapter", {})
    if base is None and "base" not in known:
        raise UserError("save_adapter needs base=ModelConfig(...): this model does not know what it was loaded from")
    source = known["base"] if base is None else _source(base)
    _write_adapter(
        Path(directory),
        adapter_state(model),
        model.config,
        source=source,
        student=student if student is not None else student_config(model),
        lora=lora_shape(lora) if lora is not None and has_lora(model) else lora_settings(model),
        base_fingerprint=base_fingerprint or fingerprint(model),
        whole=trains_all(model),
    )


def write_students(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Any,
    *,
    base: ModelConfig,
    student: StudentConfig,
    base_fingerprint: str,
) -> None:
    """An adapter folder of students alone (as :func:`adapter_state` names them), for a model that is not loaded;
    ``config`` is its Transformers config."""
    _write_adapter(
        directory, tensors, config, source=_source(base), student=student, lora=None, base_fingerprint=base_fingerprint
    )


def _source(base: ModelConfig) -> dict[str, Any]:
    """What identifies the base model; a local folder by its absolute path, so that the adapter opens from anywhere."""
    return {name: getattr(base, name) for name in _SOURCE} | {"path": absolute_if_here(base.path)}


def _write_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Any,
    *,
    source: Mapping[str, Any],
    student: StudentConfig,
    lora: Mapping[str, Any] | None,
    base_fingerprint: str,
    whole: bool = False,
) -> None:
    meta: dict[str, Any] = {
        "version": ADAPTER_VERSION,
        "base": {**source, "config": _shape(config), "fingerprint": base_fingerprint},
        "student": asdict(student),
        "lora": lora,
    }
    if whole:
        meta["whole"] = True
    write_adapter(directory, tensors, meta)


def save_merged(model: Any, directory: Path | str, tokenizer: Any = None, *, report: str = "") -> None:
    """Write a complete checkpoint, LoRA merged into the weights; the model itself is not changed.

    The folder loads with `AutoModelForCausalLM.from_pretrained` after `import trenchcoat`, or anywhere with
    `trust_remote_code=True`, and with :func:`load`. It is written atomically, and replaces a folder of that name. With
    `tokenizer` it holds that too; `report` is added to its model card, and the base model's licences, notices and use
    policies are copied. Raises UserError for weights that are quantized, sharded or offloaded.
    """
    whole = complete_model(model, merged_state(model), lora=False, online=True)
    with atomic_directory(Path(directory)) as partial:
        whole.save_pretrained(partial)
        copy_licences(model, partial, online=True)
        write_card(partial, whole.config, report=report)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


@dataclass(frozen=True, kw_only=True)
class _Loading:
    """How to load: the keyword arguments of :func:`load`."""

    device: str
    dtype: str
    base: str | None
    attention: str | None
    revision: str | None
    device_map: Any
    quantization_config: Any

    def dtype_of(self, source: str, revision: str | None) -> str:
        """The dtype asked for, of the model `source`."""
        return stored_dtype(source, revision) if self.dtype == "stored" else self.dtype


def is_ordinary(folder: Path) -> bool:
    """Whether a folder holds a model of Transformers' own classes: softmax, or linear layers of somebody else's."""
    if find_adapter(folder) is not None or not (folder / "config.json").is_file():
        return False
    return not str(read_config(folder).model_type).startswith(auto.PREFIX)


def load(
    path: Path | str,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    base: str | None = None,
    attention: str | None = None,
    revision: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
) -> tuple[Any, Any]:
    """Load a linearized model, in mode `student`, and its tokenizer.

    Args:
        path: an adapter folder, a complete folder (or the hub id of one), or a run folder.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the base weights: `auto` (bfloat16 on a GPU, float32 on a CPU), `stored` (as in the files), `float32`,
            `bfloat16`, `float16`, or a torch dtype; students are float32.
        base: adapters only: path of the base model, if it has moved.
        attention: implementation of softmax layers that were kept; default: as when the adapter was made.
        revision: of the hub id: of `path`, or for an adapter that of its base model (default: as when it was made).
        device_map: as in Transformers' `from_pretrained`, in place of `device`. Complete folders may leave layers on
            the `cpu` (beside a GPU) or on `disk`; they are fetched for every token.
        quantization_config: as there, for the base weights.

    Raises:
        UserError: nothing loadable there; an adapter of another base model; settings this version does not know.
        CorruptFileError: damaged files.
    """
    name = str(dtype).removeprefix("torch.")
    how = _Loading(
        device=device,
        dtype=name,
        base=base,
        attention=attention,
        revision=revision,
        device_map=device_map,
        quantization_config=quantization_config,
    )
    folder = Path(expanded(str(path)))
    adapter = find_adapter(folder)
    if adapter is not None:
        return _load_adapter(adapter, how)
    if (folder / "recipe.yaml").is_file():
        command = f"trenchcoat linearize {shlex.quote(str(folder))}"
        raise UserError(f"{path} is a run in which no stage is finished; go on with: {command}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{path} holds no linearized model: expected {ADAPTER_META} (adapter), config.json (complete model), or an "
            "`adapter` folder (run)"
        )
    return _load_merged(str(folder), how)


def _refuse_revision(source: str, revision: str | None) -> None:
    if revision is not None and Path(source).exists():
        raise UserError(f"revision={revision!r} is of a hub id, and {source} is a folder: leave it out")


def _load_adapter(folder: Path, how: _Loading) -> tuple[Any, Any]:
    tensors, meta = read_adapter(folder)
    source, version = meta.get("base"), meta.get("version")
    if version != ADAPTER_VERSION:
        raise UserError(f"{folder / ADAPTER_META} has version {version!r}; this trenchcoat reads {ADAPTER_VERSION}")
    if not isinstance(source, Mapping) or not isinstance(meta.get("student"), Mapping):
        raise UserError(f"{folder / ADAPTER_META} lacks `base` or `student`; export the adapter again")
    base, revision = how.base, how.revision
    _refuse_revision(base if base is not None else str(source["path"]), revision)
    if base is None and revision is None:
        revision = source.get("revision")
    cfg = ModelConfig(
        path=base if base is not None else str(source["path"]),
        revision=revision,
        device=how.device,
        attention=how.attention or str(source.get("attention", "auto")),
    )
    try:
        dtype: Any = how.dtype_of(model_source(cfg), revision)
        cfg = replace(cfg, dtype=dtype)
        model, tokenizer = load_model(cfg, how.quantization_config, how.device_map)
    except UserError as error:
        hint = "" if base is not None else "; if the base model has moved, give its path with base=..."
        raise UserError(f"the base model of the adapter {folder} cannot be loaded: {error}{hint}") from error
    _check_base(folder, cfg, model, source)
    lora = meta.get("lora")
    try:
        attach_students(model, auto.student_settings(meta["student"]))
        if lora is not None:
            add_saved_lora(model, lora)
    except UserError as error:
        raise UserError(f"{folder / ADAPTER_META} does not fit its base model: {error}") from error
    loaded: Any = model
    if meta.get("whole"):
        loaded.trenchcoat_fingerprint, loaded.trenchcoat_whole = fingerprint(model), True
    load_adapter_state(model, tensors)
    set_mode(model, "student")
    loaded.trenchcoat_adapter = {"base": _source(cfg)}
    remember_tokenizer(model, tokenizer)
    return loaded.eval().requires_grad_(False), tokenizer


def _check_base(folder: Path, cfg: ModelConfig, model: Any, source: Mapping[str, Any]) -> None:
    """Raise UserError when `model` is not the base that the adapter was made for."""
    path, wanted, found = cfg.path, dict(source.get("config") or {}), _shape(model.config)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"the adapter {folder} was made for another base model than {path!r}: {name} is {found.get(name)!r} "
                f"there, the adapter needs {value!r}"
            )
    known = source.get("fingerprint")
    if known is not None and cfg.dtype == "float16" and fingerprint(model) != known:
        model, _ = load_model(replace(cfg, dtype="float32"))  # float16 rounds differently from the fingerprint
    if known not in (None, fingerprint(model)):
        raise UserError(
            f"the adapter {folder} was made for another base model than {path!r}: the sizes agree, the weights do not "
            "(another checkpoint or revision of the same architecture?). Give the right one with base=..."
        )


def _load_merged(source: str, how: _Loading) -> tuple[Any, Any]:
    _refuse_revision(source, how.revision)
    if not Path(source).is_dir():
        require_hub_id(source, f"cannot load {source!r} as a linearized model")
    _register(source)
    try:
        config = read_config(source, how.revision)
        if not str(config.model_type).startswith(auto.PREFIX):
            raise UserError(
                f"{source} is an ordinary {config.model_type!r} model, not a linearized one; linearize it first, or "
                "give its adapter folder"
            )
        options = placement(how.device, how.device_map, how.quantization_config)
        if how.quantization_config is not None and config.trenchcoat.get("lora") is not None:
            raise UserError(
                f"{source} has a LoRA that is not merged, over which weights cannot be quantized: merge it first"
            )
        where = resolve_device(how.device)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=how.revision,
            dtype=resolve_dtype(how.dtype_of(source, how.revision), where),
            attn_implementation=how.attention,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
        with refusals(
            lambda error: (
                f"{source} has no tokenizer that can be loaded ({reason(error)}): save it there "
                "(tokenizer.save_pretrained), or open the model alone with AutoModelForCausalLM"
            ),
            LOAD_ERRORS,
        ):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=how.revision, trust_remote_code=False)
    except UserError as error:
        raise error if source in str(error) else UserError(f"{source}: {error}") from error
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load {source!r} as a linearized model: {reason(error, source)}") from error
    lost = sorted(info["missing_keys"])
    if lost:
        raise UserError(f"{source} is incomplete: {len(lost)} tensors are missing, e.g. {lost[0]}; export it again")
    remember_embeddings(tokenizer, embeddings_of(model))
    remember_tokenizer(model, tokenizer)
    keep_students_on_device(model)
    return (model if options else model.to(where)).eval().requires_grad_(False), tokenizer


def _register(source: str) -> None:
    """Register the classes of a merged folder's family, also for a family that is not registered on import."""
    config = Path(source) / "config.json"
    if config.is_file():
        settings = read_json(config)
        model_type = str(settings.get("model_type", "")) if isinstance(settings, Mapping) else ""
        if model_type.startswith(auto.PREFIX):
            auto.config_class(model_type.removeprefix(auto.PREFIX))


def _shape(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in _SHAPE}
    found["model_type"] = str(found["model_type"]).removeprefix(auto.PREFIX)
    return found


# What was learned, as named tensors and as files


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Students' and LoRA's parameters by name, e.g. `model.layers.0.self_attn.student.mix_H` and
    `model.layers.0.self_attn.q_proj.lora_A.weight`, or all parameters where every weight is trained; detached, not
    copied."""
    return {name: p.detach() for name, p in _learned(model).items()}


def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` (as :func:`adapter_state` names them) into the model.

    Names and shapes must be exactly the model's: otherwise UserError names the first difference, and nothing is
    changed.
    """
    own = _learned(model)
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or foreign:
        hint = "; call add_lora(model, cfg) first" if any("lora_" in n for n in foreign) and not has_lora(model) else ""
        parts = [f"{len(missing)} missing, e.g. {missing[0]}"] if missing else []
        parts += [f"{len(foreign)} not of this model, e.g. {foreign[0]}"] if foreign else []
        raise UserError(f"the adapter does not belong to this model and its settings: {'; '.join(parts)}{hint}")
    for name, parameter in own.items():
        given, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
        if given != wanted:
            raise UserError(f"the adapter does not fit: {name} is {given}, the model's is {wanted}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    if trains_all(model):
        return dict(model.named_parameters())
    lora = {id(p): name for name, p in lora_parameters(model).items()}
    owned = {id(p) for student in students_of(model).values() for p in student.parameters()}
    return {lora.get(id(p), name): p for name, p in model.named_parameters() if id(p) in owned or id(p) in lora}


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``adapter.safetensors`` and ``trenchcoat.json`` (``meta``, the checksum of the tensors and its own).

    An adapter that is there already is replaced as a whole: until its tensors are, ``trenchcoat.json`` holds its meta
    too, so the folder opens whenever the writer is killed.
    """
    directory = Path(directory)
    path, staged = directory / ADAPTER_META, partial_path(directory / ADAPTER_FILE)
    remove_abandoned(directory)
    try:
        save_tensors(staged, tensors)
        content = {**meta, "sha256": sha256(staged)}
        before = _intact_meta(directory)
        if before is not None:
            write_sealed(path, {**content, BEFORE: sealed(before)})
        with saving(directory / ADAPTER_FILE):
            os.replace(staged, directory / ADAPTER_FILE)
            sync(directory)
        write_sealed(path, content)
    finally:
        staged.unlink(missing_ok=True)


def _intact_meta(directory: Path) -> dict[str, Any] | None:
    """The meta of the adapter that is in a folder already; None where there is none that could be opened."""
    try:
        return read_adapter(directory)[1]
    except UserError:
        return None


def read_meta(directory: Path) -> dict[str, Any]:
    """The content of an adapter's ``trenchcoat.json``; raises ``CorruptFileError`` for a damaged one."""
    path = directory / ADAPTER_META
    content = read_json(path)
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > ADAPTER_VERSION:
        raise UserError(f"{path} has version {version!r}; this trenchcoat reads up to {ADAPTER_VERSION}")
    fix = "restore it, or export the adapter again (another base is given with base=...)"
    found = opened(content, path, fix)
    before = found.pop(BEFORE, None)
    tensors = directory / ADAPTER_FILE
    if before is None or not tensors.is_file() or sha256(tensors) == found.get("sha256"):
        return found
    return opened(before, path, fix)


def find_adapter(folder: Path) -> Path | None:
    """``folder`` itself if it is an adapter folder, else the adapter folder in it (of a run)."""
    return next((f for f in (folder, folder / "adapter") if (f / ADAPTER_META).is_file()), None)


def read_adapter(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter folder: ``(tensors, meta)``.

    Raises ``UserError`` when the folder is not an adapter and ``CorruptFileError`` when the tensors are damaged or do
    not match the JSON file.
    """
    directory = Path(directory)
    for name in (ADAPTER_META, ADAPTER_FILE):
        if not (directory / name).is_file():
            raise UserError(f"{directory} is not an adapter folder: {name} is missing")
    meta = read_meta(directory)
    if sha256(directory / ADAPTER_FILE) != meta.get("sha256"):
        raise CorruptFileError(
            f"{directory / ADAPTER_FILE} does not match the checksum in {ADAPTER_META}: it is damaged or from another "
            "export; export the adapter again"
        )
    return load_tensors(directory / ADAPTER_FILE), meta

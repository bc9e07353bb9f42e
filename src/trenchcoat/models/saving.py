"""Complete folders of linearized models: `save_pretrained` and `push_to_hub` of any model with students.

Students and an unmerged LoRA are no part of the class that a base model was loaded as, so Transformers alone would
write a folder that opens as the plain model with some weights left random. Here the folder is one of
`Linearized<Family>ForCausalLM`; a LoRA stays a LoRA in it, under the same names, so that a checkpoint can be resumed.
What cannot be written so that it opens again is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from trenchcoat.config import UserError
from trenchcoat.models import auto
from trenchcoat.models.attach import student_config, students_of
from trenchcoat.models.card import base_facts, write_card, write_code
from trenchcoat.models.licence import copy_licences
from trenchcoat.models.lora import lora_settings
from trenchcoat.models.transformers_internals import causal_lm_class, replace_saving
from trenchcoat.runtime.sharding import is_sharded_tensor

_HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
"""Options of `save_pretrained(push_to_hub=True)` and `push_to_hub` that concern the upload."""


_TOKENIZER = "trenchcoat_tokenizer"


def remember_tokenizer(model: Any, tokenizer: Any) -> None:
    """Have the tokenizer that belongs to `model` written into the folders that `model.save_pretrained` makes."""
    setattr(model, _TOKENIZER, tokenizer)


def complete_model(
    model: Any, state: Mapping[str, Tensor] | None = None, *, lora: bool = True, online: bool = False
) -> Any:
    """`model` as one of class `Linearized<Family>ForCausalLM`, which shares its tensors.

    `state`: its tensors by name, where they are not `model`'s own; `lora`: whether a LoRA in it is in `state` too (else
    it is merged); `online`: ask the hub for the base model's licence. Raises UserError for a model that such a class
    cannot hold, and for weights that are quantized, sharded or offloaded.
    """
    family = str(model.config.model_type).removeprefix(auto.PREFIX)
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError("this model's weights are quantized: save the adapter (trenchcoat.save_adapter) instead")
    config = auto.linearized_config(
        model.config,
        student_config(model),
        lora=lora_settings(model) if lora else None,
        base=base_facts(model, online=online),
    )
    config.auto_map = write_code(family)
    kind = auto.model_class(family)
    if not issubclass(type(model), causal_lm_class(type(config).__mro__[1]) or kind):
        raise UserError(
            f"a {type(model).__name__} with students cannot be saved as a folder that opens again: only causal "
            "language models can"
        )
    made: Callable[[Any], Any] = kind
    with torch.device("meta"):
        whole = made(config)
    _fill(whole, model.state_dict() if state is None else state)
    if getattr(model, "generation_config", None) is not None:
        whole.generation_config = model.generation_config
    return whole


def _fill(whole: Any, state: Mapping[str, Tensor]) -> None:
    """Give a model on the meta device the tensors of `state`; UserError unless they are exactly its own, and whole."""
    away = sorted(name for name, tensor in state.items() if tensor.is_meta or is_sharded_tensor(tensor))
    if away:
        raise UserError(
            f"{len(away)} weights are sharded or offloaded, e.g. {away[0]}, so the model cannot be saved whole: save "
            "the adapter (trenchcoat.save_adapter), or load the model without device_map and in one process"
        )
    result = whole.load_state_dict(dict(state), strict=False, assign=True)
    whole.tie_weights()
    lost = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    parts = [f"{len(lost)} are missing, e.g. {lost[0]}"] if lost else []
    foreign = result.unexpected_keys
    parts += [f"{len(foreign)} are not of it, e.g. {foreign[0]}"] if foreign else []
    if parts:
        raise UserError(
            f"the model's tensors are not those of {type(whole).__name__}, so its folder would not open again: "
            f"{'; '.join(parts)}"
        )


def save_pretrained(model: Any, write: Callable[..., Any], save_directory: Path | str, **options: Any) -> None:
    """What `model.save_pretrained(save_directory, ...)` does for a model with students; `write` is Transformers' own.

    Raises UserError as :func:`complete_model` does.
    """
    upload = bool(options.pop("push_to_hub", False))
    for_hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    whole = complete_model(model, options.pop("state_dict", None))
    write(whole, save_directory, **options)
    if options.get("is_main_process", True):
        folder = Path(save_directory)
        write_code(whole.config.model_type.removeprefix(auto.PREFIX), folder)
        copy_licences(model, folder)
        if not (folder / "README.md").exists():
            write_card(folder, whole.config)
        tokenizer = getattr(model, _TOKENIZER, None)
        if tokenizer is not None and not (folder / "tokenizer_config.json").exists():
            tokenizer.save_pretrained(folder)
        if upload:
            upload_folder(folder, for_hub.pop("repo_id", folder.resolve().name), **for_hub)


def push_to_hub(model: Any, repo_id: str, *, max_shard_size: Any = None, tags: Any = None, **options: Any) -> str:
    """What `model.push_to_hub(repo_id, ...)` does for a model with students; returns the address of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        return upload_folder(Path(folder), repo_id, tags=tags, **options)


def require_uploadable(repo_id: str) -> None:
    """Raise ``UserError`` for a name that no repository can have, and where nobody is logged in; the hub is not asked.

    Call it before the work whose result goes there.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise _cannot_upload(repo_id, error) from error
    if get_token() is None:
        raise _cannot_upload(repo_id, "nobody is logged in")


def _cannot_upload(repo_id: str, why: object) -> UserError:
    said = " ".join(str(why).split())[:300].rstrip(".")
    return UserError(
        f"cannot upload to {repo_id!r}: {said}. Expected a name like you/model, and a token that may write there "
        "(`hf auth login`, or HF_TOKEN)"
    )


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    tags: list[str] | None = None,
    **commit: Any,
) -> str:
    """Upload a folder to the hub as `repo_id`, made where it does not exist; returns the address of the commit.

    Raises UserError when the hub refuses, or cannot be reached.
    """
    if tags:
        write_card(folder, tags=tags)
    try:
        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        made = api.upload_folder(
            repo_id=name, folder_path=folder, **{"commit_message": "Upload a linearized model", **commit}
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise _cannot_upload(repo_id, error) from error
    return str(made.commit_url)


replace_saving(save_pretrained, push_to_hub, lambda model: bool(students_of(model)))

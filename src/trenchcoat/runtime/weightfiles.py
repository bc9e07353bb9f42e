"""Which files of a model's folder hold its weights: those that Transformers' ``from_pretrained`` reads, and no others.

A backup, a variant (``model.fp16.safetensors``) or another program's file may lie beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trenchcoat.config import UserError
from trenchcoat.runtime.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_names(folder: Path) -> list[str] | None:
    """Names of the files in ``folder`` that ``from_pretrained`` reads, present or not; None when it names none.

    They are the file or the index that ``config.json`` names as ``transformers_weights``, else the single file, else
    those of the index. Raises ``UserError`` for an index that cannot be read.
    """
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = settings.get("transformers_weights") if isinstance(settings, Mapping) else None
    if named is None:
        named = next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)
    if named is None:
        return None
    return _indexed(folder / named) if str(named).endswith(".index.json") else [str(named)]


def _indexed(index: Path) -> list[str]:
    if not index.is_file():
        return [index.name]
    content: Any = read_json(index)
    where = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(where, Mapping) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index} has no `weight_map` of tensors to files; download it again")
    return sorted(set(where.values()))


def weight_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that hold the model's weights, in the order they are read.

    Raises ``UserError`` for a folder without safetensors weights, or without a file that its index names, and for an
    index that names files elsewhere.
    """
    names = weight_names(folder)
    if names is None:
        raise UserError(_without(folder))
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise UserError(
            f"{folder} names {outside[0]!r} as a file of its weights, outside the folder; correct its index"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {missing[0]}, one of the {len(names)} files of its weights; download it again")
    return [folder / name for name in names]


def _without(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f"{folder} has no safetensors files that a model is read from ({SINGLE}, or those of {INDEX}); it has "
            f"{', '.join(others[:3])}: rename the right one, or add its index"
        )
    pickled = any(folder.glob("pytorch_model*.bin"))
    convert = (
        f"its weights are .bin files: convert them once, with AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        ".save_pretrained(NEW_FOLDER), copy the tokenizer's files, and give that folder"
    )
    return f"{folder} has no safetensors files; {convert if pickled else 'download it again, or give another folder'}"


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of the model in ``folder``; raises ``UserError`` as :func:`weight_files` does."""
    where: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as opened:
                where |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a readable safetensors file ({error}); download it again") from error
    return where

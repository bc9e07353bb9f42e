"""Checks before a stage starts, against the checkpoint's own config, and reuse of another folder's transfer.

A transfer is reused by placing it in the new run's folder as its finished stage 1, after a check that it was made for
the same base and student.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trenchcoat.cli.compat.configs import OldConfig
from trenchcoat.config import Recipe, UserError
from trenchcoat.evaluation.results import StageFacts
from trenchcoat.models.basefolder import read_config
from trenchcoat.models.hub import find_adapter, read_adapter
from trenchcoat.runtime.files import atomic_file, save_tensors
from trenchcoat.runtime.runfolder import SETTINGS, TRANSFER, WEIGHTS, RunFolder, flatten
from trenchcoat.runtime.sealed import write_sealed

_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def base_config(path: str) -> Any | None:
    """The base model's config; None where it cannot be read now (loading the model will report why)."""
    try:
        return read_config(path)
    except UserError:
        return None


def check_layers(flags: Mapping[str, Any], base: Any | None) -> None:
    """Raise ``UserError`` unless the block flags, where given, mean all layers at once."""
    asked = {name: value for name, value in flags.items() if name.startswith("layers_")}
    if not asked:
        return
    layers = getattr(base, "num_hidden_layers", None)
    whole = layers is not None and (
        asked.get("layers_per_model", layers) >= layers
        and asked.get("layers_limit_min", 0) <= 0
        and asked.get("layers_limit_max", layers) >= layers - 1
    )
    if not whole:
        shown = " ".join(f"--{name} {value}" for name, value in asked.items())
        number = f"the model has {layers}" if layers is not None else "the model's number of layers cannot be read"
        raise UserError(
            f"{shown}: these scripts train all layers in one run ({number}). Leave the flags out: every layer learns "
            "alone here, so transfer needs the memory of one; shard the weights with --enable_fsdp, --fsdp_cpu_offload"
        )


def check_rope(config: OldConfig, base: Any | None, *, overridden: bool) -> list[str]:
    """Compare the RoPE settings in ``config`` with the checkpoint's own, which are the ones used.

    Raises ``UserError`` where they differ, unless the model's path was ``overridden`` on the command line: then the
    difference is returned as a remark.
    """
    own: Any = getattr(base, "rope_parameters", None)
    theta = own.get("rope_theta") if isinstance(own, Mapping) else None
    if theta is None:
        return []
    wanted: dict[str, Any] = {"rope_theta": config.at("model.rope_theta")}
    scaling: Mapping[str, Any] = config.at("model.rope_scaling", {})
    if scaling:
        wanted["rope_type"] = scaling.get("rope_type") or scaling.get("type")
        wanted |= {name: scaling.get(name) for name in _ROPE}
    differ = [name for name, value in wanted.items() if value is not None and own.get(name) != value]
    if not differ:
        return []
    if overridden:
        return [f"the checkpoint's own RoPE is used, not that of {config.file} ({', '.join(differ)} differ)"]
    shown = ", ".join(f"{name} {wanted[name]} (the checkpoint: {own.get(name)})" for name in differ)
    raise UserError(
        f"{config.file} and the checkpoint it names disagree about RoPE: {shown}. The checkpoint's is "
        "used: correct the file, or change config.json in a local copy of the checkpoint"
    )


def adopt_transfer(source: Path, recipe: Recipe) -> None:
    """Use the finished transfer in ``source`` (a run's or an adapter's folder) for ``recipe``'s run.

    Safe to call from several processes at once. Raises ``UserError`` when there is none, or it was made for another
    base model or student.
    """
    own = RunFolder(recipe.run.dir).stage_dir(TRANSFER)
    run = RunFolder(source)
    facts = run.result(TRANSFER)
    if facts is not None:
        settings = run.settings(TRANSFER)
        _check_made_for(recipe, source, settings)
        run.weights(TRANSFER)  # raises where they are damaged
        _link(run.stage_dir(TRANSFER) / WEIGHTS, own / WEIGHTS)
    else:
        adapter = find_adapter(source)
        if adapter is None:
            raise UserError(
                f"{source} holds no finished attention transfer: give the folder of a run of distill_llama.py or of "
                "`trenchcoat transfer`, or an adapter's folder"
            )
        tensors, meta = read_adapter(adapter)
        settings = flatten({"model": {"path": meta["base"]["path"]}, "student": meta["student"]})
        settings["base weights"] = meta["base"].get("fingerprint")
        _check_made_for(recipe, source, settings)
        save_tensors(own / WEIGHTS, {name: tensor for name, tensor in tensors.items() if "lora_" not in name})
        facts = asdict(StageFacts(TRANSFER, 0, 0, 0.0))
    kept = {name: value for name, value in settings.items() if _is_kept(name) or name == "base weights"}
    write_sealed(own / SETTINGS, {**kept, "taken up from": str(source)})
    RunFolder(recipe.run.dir).mark_finished(TRANSFER, facts)  # last: where there is a result, the stage is finished


def _link(source: Path, target: Path) -> None:
    with atomic_file(target) as partial:
        try:
            os.link(source, partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, partial)


def _is_kept(name: str) -> bool:
    return name == "model.path" or (name.startswith("student.") and name != "student.impl")


def _check_made_for(recipe: Recipe, source: Path, settings: Mapping[str, Any]) -> None:
    now = flatten(recipe)
    for name, value in settings.items():
        if _is_kept(name) and name in now and now[name] != value:
            raise UserError(
                f"the transfer in {source} was made with {name}={value!r}; this run has {now[name]!r}. Give the flags "
                "and the --model_config that it was made with"
            )

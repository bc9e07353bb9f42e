"""`save_pretrained` of models with students, Transformers' Trainer on them, and how such folders open elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaModel, Trainer, TrainingArguments

import trenchcoat
from tiny_families import logits, tiny_model, tokens
from trenchcoat.config import FeatureMapConfig, LoraConfig, StudentConfig, UserError
from trenchcoat.models.attach import attach_students, detach_students, freeze_for_transfer, set_mode
from trenchcoat.models.hub import adapter_state
from trenchcoat.models.lora import add_lora, has_lora, merge_lora, remove_lora

KEPT = StudentConfig(window=4, keep=("1.0",), feature_map=FeatureMapConfig(feature_dim=6))
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
REPOSITORY = Path(__file__).parents[2]


def learned(model: Any, lora: bool = True) -> Any:
    """`model` with students (and LoRA) that are not as they were made."""
    attach_students(model, KEPT)
    if lora:
        add_lora(model, LORA)
    set_mode(model, "student")
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_save_pretrained_opens_again(family: str, dtype: torch.dtype, lora: bool, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = learned(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype), lora)
    ids = tokens(2, 30)
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert again.dtype == dtype
    assert has_lora(again) == lora
    assert torch.equal(logits(again, ids), logits(model, ids))
    again.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "two"), ids), logits(model, ids))
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1


def test_after_merging_or_removing_lora_there_is_none_in_the_folder(tmp_path: Path) -> None:
    for name, change in (("merged", merge_lora), ("removed", remove_lora)):
        model = learned(tiny_model())
        change(model)
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert not has_lora(again)
        assert torch.equal(logits(again, tokens(1, 20)), logits(model, tokens(1, 20)))


def test_a_model_without_students_is_saved_as_ever(tmp_path: Path) -> None:
    model = learned(tiny_model(), lora=False)
    detach_students(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert not (tmp_path / "README.md").exists()


def test_a_lora_in_the_folder_is_merged_by_save_merged(tmp_path: Path) -> None:
    model = learned(tiny_model())
    model.save_pretrained(tmp_path / "one")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    trenchcoat.save_merged(opened, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not has_lora(merged)
    torch.testing.assert_close(logits(merged, tokens(1, 20)), logits(model, tokens(1, 20)), rtol=0, atol=5e-5)


def test_what_cannot_open_again_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    bare = LlamaModel(tiny_model().config)
    attach_students(bare, KEPT)
    with pytest.raises(UserError, match=r"LlamaModel .* only causal language models"):
        bare.save_pretrained(tmp_path / "out")
    model = learned(tiny_model(), lora=False)
    some = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    with pytest.raises(UserError, match=r"would not open again: .* missing, e\.g\. model\.layers\.1"):
        model.save_pretrained(tmp_path / "out", state_dict=some)
    inject_adapter_in_model(PeftLoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(UserError, match=r"a LoRA that trenchcoat\.add_lora did not add"):
        model.save_pretrained(tmp_path / "out")
    away = learned(tiny_model(), lora=False)
    away.model.layers[0].mlp.to("meta")
    with pytest.raises(UserError, match=r"sharded or offloaded, e\.g\. model\.layers\.0\.mlp"):
        away.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Transformers' Trainer


def arguments(folder: Path, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_of_trainer_learns_saves_and_resumes(lora: bool, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]

    def trained(folder: str, steps: int, resume: bool = False) -> Any:
        """A model after that many steps."""
        torch.manual_seed(0)
        model = learned(tiny_model(), lora)
        if not lora:
            model.requires_grad_(True)
        trainer = Trainer(model=model, args=arguments(tmp_path / folder, steps), train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if resume else None)
        return model

    before, ids = trained("none", 0), tokens(2, 20)
    whole = trained("whole", 4)
    assert not torch.equal(logits(before, ids), logits(whole, ids))
    for step in (2, 4):
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / f"checkpoint-{step}")
        assert torch.equal(logits(opened, ids), logits(whole, ids)) == (step == 4)
    resumed = trained("resumed", 4, resume=True)
    torch.testing.assert_close(logits(resumed, ids), logits(whole, ids), rtol=0, atol=1e-5)


def test_labels_are_refused_in_transfer_mode_only() -> None:
    model, ids = learned(tiny_model(), lora=False), tokens(2, 12)
    assert model(ids, labels=ids).loss.requires_grad
    set_mode(model, "transfer")
    freeze_for_transfer(model)
    with pytest.raises(UserError, match=r"transfer mode.*trenchcoat\.transfer.*set_mode\(model, 'student'\)"):
        model(ids, labels=ids)
    model(ids)
    detach_students(model)
    assert model(ids, labels=ids).loss is not None


# In a process that never imported trenchcoat


def elsewhere(
    folder: Path, code: str, *arguments: str, source: Path = REPOSITORY / "src"
) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, where `source` is on the path and modules of folders are cached in `folder`."""
    environment = {
        **os.environ, "PYTHONPATH": str(source), "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)

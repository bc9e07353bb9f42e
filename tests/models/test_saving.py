"""`save_pretrained` of models with students, Transformers' Trainer on them, and how such folders open elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaModel, Trainer, TrainingArguments

import trenchcoat
from tiny_families import logits, tiny_model, tokens
from trenchcoat.config import FeatureMapConfig, LoraConfig, ModelConfig, StudentConfig, UserError
from trenchcoat.config.package import INSTALL
from trenchcoat.models.attach import attach_students, detach_students, freeze_for_transfer, set_mode
from trenchcoat.models.card import card_text
from trenchcoat.models.hub import adapter_state
from trenchcoat.models.loading import load_model
from trenchcoat.models.lora import add_lora, has_lora, merge_lora, remove_lora
from trenchcoat.models.saving import complete_model

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


@pytest.mark.filterwarnings("ignore:Could not find a config file in .linearized in memory")
def test_an_adapter_of_peft_opens_over_the_folder_and_never_over_the_plain_model(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, get_peft_model
    from peft import LoraConfig as PeftLoraConfig

    tiny_model().save_pretrained(tmp_path / "base")
    model = learned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora=False)
    model.save_pretrained(tmp_path / "folder")
    settings = PeftLoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    over_folder = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "folder"), settings)
    over_folder.save_pretrained(tmp_path / "one")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(again, tokens(1, 20)), logits(over_folder, tokens(1, 20)))
    get_peft_model(model, replace(settings, base_model_name_or_path=None)).save_pretrained(tmp_path / "two")
    with pytest.raises((OSError, ValueError), match="linearized in memory"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "two")
    detached = learned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora=False)
    detach_students(detached)
    assert detached.name_or_path == str(tmp_path / "base")


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


@pytest.fixture(scope="module")
def given_away(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a complete folder with its tokenizer, the model)."""
    folder = tmp_path_factory.mktemp("given") / "away"
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model_dir), device="cpu", dtype="float32"))
    trenchcoat.save_merged(learned(model), folder, tokenizer)
    return folder, AutoModelForCausalLM.from_pretrained(folder)


def test_a_stranger_opens_a_folder_by_trust_remote_code(given_away: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = given_away
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline\n"
        "assert 'trenchcoat' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)('coat').input_ids\n"
        "ids = torch.tensor([[int(i) for i in sys.argv[2].split()]])\n"
        "print(type(model).__name__, model(ids).logits.double().sum().item())\n"
        "model.save_pretrained(sys.argv[3])\n"
        "write = pipeline('text-generation', model=sys.argv[3], tokenizer=sys.argv[1], trust_remote_code=True)\n"
        "print(write('A coat', max_new_tokens=3, do_sample=False)[0]['generated_text'].startswith('A coat'))\n"
    )
    ids = tokens(1, 20)
    row = " ".join(map(str, ids[0].tolist()))
    done = elsewhere(tmp_path, code, str(folder), row, str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr[-2000:]
    name, total, wrote = done.stdout.split()
    assert (name, wrote) == ("LinearizedLlamaForCausalLM", "True")
    assert float(total) == pytest.approx(logits(model, ids).double().sum().item(), rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == ["modeling_trenchcoat.py"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_trenchcoat.LinearizedLlamaConfig",
        "AutoModelForCausalLM": "modeling_trenchcoat.LinearizedLlamaForCausalLM",
    }


def test_a_stranger_without_the_package_is_told_how_to_install_it(given_away: tuple[Path, Any], tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['trenchcoat'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    done = elsewhere(tmp_path, code, str(given_away[0]))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "needs the Python package trenchcoat" in last
    assert INSTALL in last


def test_our_own_loader_never_runs_the_code_of_a_folder(
    given_away: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(given_away[0], folder)
    (folder / "modeling_trenchcoat.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded, _ = trenchcoat.load(folder, device="cpu")
    assert torch.equal(logits(loaded, tokens(1, 9)), logits(given_away[1], tokens(1, 9)))
    AutoModelForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_the_harness_itself_scores_a_folder(given_away: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"a coat {n} is", "choices": ["warm", "cold"], "answer": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "coats.yaml").write_text(
        "task: coats\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    code = (
        "import sys\nfrom lm_eval import simple_evaluate\nfrom lm_eval.tasks import TaskManager\n"
        "manager = TaskManager(include_path=sys.argv[2], include_defaults=False)\n"
        "found = simple_evaluate('hf', model_args=f'pretrained={sys.argv[1]},trust_remote_code=True', device='cpu', "
        "tasks=['coats'], task_manager=manager, bootstrap_iters=0, batch_size=2)\n"
        "print('accuracy', found['results']['coats']['acc,none'])\n"
    )
    done = elsewhere(tmp_path, code, str(given_away[0]), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 <= float(done.stdout.partition("accuracy ")[2]) <= 1


# The model card


def test_the_card_says_what_is_known(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "secret" / "tiny-llama"
    shutil.copytree(tiny_model_dir, base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# tiny\n")
    model, tokenizer = load_model(ModelConfig(path=str(base), device="cpu", dtype="float32"))
    trenchcoat.save_merged(learned(model), tmp_path / "one", tokenizer, report="| a | b |")
    text = (tmp_path / "one" / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert card.data.base_model is None  # a folder is no id of the hub
    assert "Linearized: tiny-llama" in text
    assert "1 of 4 key/value groups (1.0; layer.group)" in text
    assert "| a | b |" in text
    assert INSTALL in text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert "Linearized: tiny-llama" in (tmp_path / "two" / "README.md").read_text()
    for path in [*(tmp_path / "one").iterdir(), *(tmp_path / "two").iterdir()]:
        assert b"secret" not in path.read_bytes(), path


def test_the_card_of_a_model_of_the_hub_links_to_it() -> None:
    model = learned(tiny_model(), lora=False)
    model.trenchcoat_adapter = {"base": {"path": "someone/tiny", "revision": "abc"}}
    config = complete_model(model).config
    card = ModelCard(card_text(config))
    assert card.data.base_model == "someone/tiny"
    assert card.data.license is None
    assert "[someone/tiny](https://huggingface.co/someone/tiny), revision abc" in card.text
    assert "not known: look it up" in card.text

"""Folders of `export --native` in vLLM's own Qwen3.5, without this package's plugin, against Transformers' class.

vLLM's CPU kernels of this class compute in bfloat16 only ("CPU GDN attention requires BF16"), so the two round at other
places: where they choose different tokens, these must have been as likely, to the precision of bfloat16.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_kit import LENGTHS, NEW, SIZES, prompts  # isort: skip - first, as it sets vLLM up
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.inputs import TokensPrompt

from conftest import byte_tokenizer
from trenchcoat.config import StudentConfig
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.native import save_native
from trenchcoat.training.objectives import initialise_from_text

BASES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
ROUNDED = 2.0**-8
"""Relative spacing of bfloat16."""


def save(folder: Path, family: str) -> Path:
    """A native folder in bfloat16, one of three layers kept."""
    torch.manual_seed(0)
    config, kind = BASES[family]
    model: Any = kind(config(**{**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.5 if "embed" in name else 0.06)
            else:
                parameter.uniform_(0.5, 1.5)
    attach_students(model, StudentConfig(name="gated_delta_layer", keep_softmax=(1,)))
    set_mode(model, "transfer")
    ids = torch.randint(3, 259, (2, 200))
    initialise_from_text(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    set_mode(model, "student")
    save_native(model.to(torch.bfloat16), folder, byte_tokenizer())
    return folder


def know_the_class() -> None:
    """vLLM's file of Qwen3.5 holds its vision model too, which imports torchvision: there is none for this build of
    torch, and text does not need it. vLLM would look at the class in a process of its own, which would not know it."""
    try:
        home = importlib.import_module("vllm.model_executor.models.qwen3_5")
    except ImportError:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
            module = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
            sys.modules[name] = module
        sys.modules["torchvision.transforms.v2"].functional = ModuleType("functional")  # type: ignore[attr-defined]
        home = importlib.import_module("vllm.model_executor.models.qwen3_5")
    ModelRegistry.register_model("Qwen3_5ForCausalLM", home.Qwen3_5ForCausalLM)


@pytest.mark.parametrize("family", list(BASES))
def test_vllm_generates_what_transformers_generates(family: str, tmp_path: Path) -> None:
    know_the_class()
    path, asked = save(tmp_path / family, family), prompts()
    llm = LLM(
        model=str(path), dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_seqs=16,
        max_num_batched_tokens=256, enable_prefix_caching=False,
    )  # fmt: skip
    assert "trenchcoat" not in type(llm.llm_engine.model_config.hf_config).__module__
    greedy = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in asked], greedy, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    compared = 0
    for length, prompt, output in zip(LENGTHS, asked, outputs, strict=True):
        found = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1].float()
        for step, (token, row) in enumerate(zip(found, logits, strict=True)):
            # each logit is a rounded sum over rounded states: a few units in the last place of the largest
            assert row.max() - row[token] <= 4 * ROUNDED * row.abs().max(), f"prompt of {length}, token {step}"
            compared += int(row.argmax()) == token
    assert compared >= 0.9 * NEW * len(LENGTHS)

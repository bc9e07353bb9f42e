"""QLoRA: a base in 4 bits goes through both stages, its gradients are those of the dequantized weights, and what it
learned loads on the ordinary base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import save_tiny_model
from trenchcoat.config import FeatureMapConfig, LoraConfig, ModelConfig, ParallelConfig, StudentConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.models import hub, loading
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.identity import fingerprint
from trenchcoat.models.loading import load_base, load_model
from trenchcoat.models.lora import add_lora, merge_lora, merged_state
from trenchcoat.training.objectives import next_token_objective

QUIET = pytest.mark.filterwarnings("ignore:.*_check_is_size.*", "ignore::FutureWarning")
"""Deprecations within the library. Its warning about a kernel without backward stays an error."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A tiny Llama whose matrices are whole blocks of 64, to be loaded in 4 bits."""
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    folder = tmp_path_factory.mktemp("quantized")
    save_tiny_model(folder, seed=0, hidden_size=64, intermediate_size=128, head_dim=16)
    return ModelConfig(path=str(folder), quantize="nf4", dtype="bfloat16", device="cpu")


@QUIET
def test_both_stages_over_four_bits_and_the_adapter_over_sixteen(
    base: ModelConfig, tiny_overrides: list[str], tmp_path: Path
) -> None:
    more = [f"model.path={base.path}", "model.quantize=nf4", "model.dtype=bfloat16", "eval.baselines=false"]
    recipe = load_recipe("demo", [*tiny_overrides, *more, "student.feature_map.init=identity"])
    outcome = stages.linearize(recipe)
    assert outcome.results is not None
    assert all(scores.all.mean < 8 for scores in outcome.results.rows.values())
    model, _ = hub.load(recipe.run.dir, dtype="bfloat16")
    assert {type(module).__name__ for module in model.modules()}.isdisjoint({"Linear4bit"})
    stages.export(Path(recipe.run.dir), tmp_path / "merged", merge=True)
    hub.load(tmp_path / "merged")


@QUIET
def test_lora_is_not_merged_into_four_bits(base: ModelConfig) -> None:
    model, _ = load_base(base, ParallelConfig())
    attach_students(model, StudentConfig(window=8, feature_map=FeatureMapConfig(feature_dim=8)))
    add_lora(model, LoraConfig(rank=4))
    for merge in (merge_lora, merged_state):
        with pytest.raises(UserError, match="merge it over the ordinary base"):
            merge(model)


@QUIET
def test_a_quantized_base_has_the_identity_of_its_files(base: ModelConfig) -> None:
    quantized, _ = load_base(base, ParallelConfig())
    plain, _ = load_model(ModelConfig(path=base.path, device="cpu"))
    assert "Linear4bit" in {type(module).__name__ for module in quantized.modules()}
    assert fingerprint(quantized) == fingerprint(plain)


def _gradients(cfg: ModelConfig, *, dequantize: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """LoRA's gradients on one batch."""
    import bitsandbytes

    model, _ = load_base(cfg, ParallelConfig())
    if dequantize:
        for name, module in list(model.named_modules()):
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight: Any = module.weight
                values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight.data = values.float()
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, plain)
        for parameter in model.requires_grad_(False).parameters():
            parameter.data = parameter.data.to(dtype)
    torch.manual_seed(0)
    attach_students(model, StudentConfig(window=8, feature_map=FeatureMapConfig(feature_dim=8)))
    set_mode(model, "student")
    add_lora(model, LoraConfig(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name))
            parameter.data.normal_(0, 0.05)
    ids = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids)  # as an evaluation before training does: some kernels repack the weights then
    next_token_objective()(model, {"input_ids": ids, "labels": ids})
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@QUIET
def test_gradients_are_those_of_the_dequantized_weights(base: ModelConfig) -> None:
    exact = _gradients(base, dequantize=True, dtype=torch.float32)
    rounded = _gradients(base, dequantize=True, dtype=torch.bfloat16)
    found = _gradients(base, dequantize=False, dtype=torch.bfloat16)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        noise = (rounded[name] - gradient).norm()  # of bfloat16 alone, in an ordinary model of these weights
        assert (found[name] - gradient).norm() < 3 * noise, name


def test_without_the_library_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install bitsandbytes"):
        load_base(ModelConfig(quantize="nf4"), ParallelConfig())


@QUIET
def test_a_linearized_model_is_loaded_in_four_bits(base: ModelConfig, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    plain = ModelConfig(path=base.path, dtype="bfloat16", device="cpu")
    model, tokenizer = load_model(plain)
    attach_students(model, StudentConfig(window=8, feature_map=FeatureMapConfig(feature_dim=8)))
    add_lora(model, LoraConfig(rank=4))
    set_mode(model, "student")
    hub.save_adapter(model, tmp_path / "adapter", base=plain)
    hub.save_merged(model, tmp_path / "merged", tokenizer)
    model.save_pretrained(tmp_path / "with_lora")
    tokenizer.save_pretrained(tmp_path / "with_lora")
    ids = torch.arange(3, 40)[None]
    for name in ("adapter", "merged"):
        small, _ = hub.load(tmp_path / name, device="cpu", quantization_config=settings)
        assert "Linear4bit" in {type(module).__name__ for module in small.modules()}
        with torch.no_grad():
            one, other = small(ids).logits.float().flatten(), model(ids).logits.float().flatten()
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.9
        with pytest.raises(UserError, match=r"quantized: save the adapter|merge it over the ordinary base"):
            small.save_pretrained(tmp_path / "again")
    with pytest.raises(UserError, match="a LoRA that is not merged"):
        hub.load(tmp_path / "with_lora", device="cpu", quantization_config=settings)

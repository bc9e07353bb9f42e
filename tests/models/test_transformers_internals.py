"""What each of Transformers' undocumented names is expected to be: a release that changes one fails here first."""

from __future__ import annotations

import importlib
import inspect
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import CacheLayerMixin
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.mamba import modeling_mamba

from tiny_families import tiny_model, tokens
from trenchcoat.models import auto
from trenchcoat.models import transformers_internals as internals


@pytest.fixture
def watched() -> Any:
    """(model, what its attention and mask functions were called with), under a separate name."""
    seen: dict[str, list[dict[str, Any]]] = {"attention": [], "mask": []}
    model = tiny_model("gpt_oss", attn_implementation="eager")

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **keywords: Any) -> Any:
        seen["attention"].append({"module": module, "shape": query.shape, **keywords})
        own = internals.attention_function(module, "eager")
        return own(module, query, key, value, attention_mask, **keywords)

    def mask(**keywords: Any) -> Any:
        seen["mask"].append(keywords)
        return internals.make_mask("eager", keywords)

    internals.register_attention("watched", attention, mask)
    yield model, seen
    for registry in (internals.ALL_ATTENTION_FUNCTIONS, internals.ALL_MASK_ATTENTION_FUNCTIONS):
        type(registry)._global_mapping.pop("watched", None)


def test_a_config_names_its_attention_and_any_name_can_be_chosen() -> None:
    config = LlamaConfig(attn_implementation="sdpa")
    assert internals.attention_name(config) == "sdpa"
    internals.choose_attention(config, "of no library")
    assert internals.attention_name(config) == config._attn_implementation == "of no library"
    internals.choose_attention(config, None)
    assert internals.attention_name(config) is None


def test_layers_call_the_function_that_was_chosen_with_the_keywords_we_read(watched: Any) -> None:
    model, seen = watched
    ids = tokens(1, 6)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        internals.choose_attention(model.config, "watched")
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert [call["shape"] for call in seen["attention"]] == [(1, 4, 6, 8)] * 2
    for call in seen["attention"]:
        assert {"scaling", "dropout", "s_aux"} <= call.keys()
        assert internals.score_options(call) == {"softcap": None, "sink_logit": call["s_aux"]}
        assert call["s_aux"].shape == (4,)
        assert not internals.has_position_bias(call)
    assert internals.score_options({"softcap": 3.0})["softcap"] == 3.0
    assert internals.has_position_bias({"position_bias": torch.zeros(1)})


def test_mask_functions_get_the_keywords_we_read(watched: Any) -> None:
    model, seen = watched
    internals.choose_attention(model.config, "watched")
    ids, padding = tokens(2, 6), torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=padding)
    request = internals.kept_request(seen["mask"][0])
    assert int(request["q_length"]) == 6
    assert torch.equal(internals.padding_mask(request).long(), padding)
    assert not internals.more_than_causal(request)
    whole = internals.mask_rows(request, 0, 6)
    assert whole.dtype == torch.bool
    assert torch.equal(whole[1, 0], torch.ones(6, 6).tril().bool())
    assert not whole[0, 0, :, 0].any()
    assert torch.equal(internals.mask_rows(request, 2, 4), whole[:, :, 2:4])
    moving = torch.tensor(3)
    kept = internals.kept_request({"q_offset": moving})
    moving += 1
    assert int(kept["q_offset"]) == 3


def test_packed_rows_ask_for_more_than_a_causal_mask(watched: Any) -> None:
    seen, model = watched[1], tiny_model("llama")
    internals.choose_attention(model.config, "watched")
    with torch.no_grad():
        model(input_ids=tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    assert internals.more_than_causal(seen["mask"][0])


def test_eager_is_the_modelling_files_own_and_others_are_shared() -> None:
    attention: Any = tiny_model("llama").model.layers[0].self_attn
    assert internals.attention_function(attention, "eager") is modeling_llama.eager_attention_forward
    assert internals.attention_function(attention, "sdpa") is internals.ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_whether_a_layer_uses_the_interface_shows_in_its_source() -> None:
    assert internals.calls_attention_interface(modeling_llama.LlamaAttention.forward)
    assert internals.calls_attention_interface(modeling_gpt2.GPT2Attention.forward)
    assert not internals.calls_attention_interface(modeling_mamba.MambaMixer.forward)


def test_flags_of_a_cache_layer() -> None:
    own = {name for name in vars(CacheLayerMixin) if name.startswith(("is_", "supports_"))}
    assert own <= vars(internals.FixedSizeLayer).keys(), "a flag that we do not set"
    assert not any(getattr(internals.FixedSizeLayer, name) for name in own)


def test_layers_of_a_cache() -> None:
    growing = DynamicCache()
    layer = internals.cache_layer(growing, 2)
    assert len(growing.layers) == 3
    assert not internals.is_filled(layer)
    assert internals.allocated_length(layer) is None
    assert internals.keys_and_values(layer) == []
    growing.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 2)
    assert internals.is_filled(layer)
    assert [tensor.shape for tensor in internals.keys_and_values(layer)] == [(1, 2, 5, 8)] * 2
    static = StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=32)
    assert internals.allocated_length(internals.cache_layer(static, 1)) == 32


def test_a_cache_passes_recording_on_to_the_layers_that_exist_and_is_cropped_by_minus_the_number() -> None:
    model = tiny_model()
    past = DynamicCache(config=model.config)
    assert not internals.records_past(past)
    past.activate_past_recording()
    assert internals.records_past(past)
    assert not any(hasattr(layer, "record_past") for layer in past.layers)  # so students' layers ask the cache
    model(tokens(1, 9), past_key_values=past, use_cache=True)
    past.crop(-2)
    past.crop(0)
    assert past.get_seq_length() == 7


def test_classes_of_a_config() -> None:
    module = importlib.import_module(auto.AUTO_MODULE)
    assert module.AutoConfig is AutoConfig
    assert module.CONFIG_MAPPING["llama"] is LlamaConfig
    assert {"from_pretrained", "for_model"} <= vars(AutoConfig).keys()
    assert internals.causal_lm_class(LlamaConfig) is modeling_llama.LlamaForCausalLM
    assert internals.causal_lm_class(type("Unknown", (LlamaConfig,), {})) is None
    assert "__post_init__" in dir(LlamaConfig)
    assert "__setstate__" not in dir(LlamaConfig)
    assert module.CONFIG_MAPPING_NAMES["llama"] == "LlamaConfig"
    assert internals.causal_lm_names()["llama"] == "LlamaForCausalLM"


def test_loaded_parameters_are_marked_and_the_others_are_initialized() -> None:
    assert "initialize_weights" in vars(PreTrainedModel)
    assert "_is_hf_initialized" in inspect.getsource(importlib.import_module("transformers.modeling_utils"))
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert not internals.was_loaded(parameter)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    assert internals.was_loaded(parameter)


def test_experts_are_converted_under_another_name_too() -> None:
    conversions = importlib.import_module("transformers.conversion_mapping")
    internals.copy_conversion("mixtral", "mixtral_of_a_test")
    try:
        copied = conversions.get_checkpoint_conversion_mapping("mixtral_of_a_test")
        assert len(copied) == len(conversions.get_checkpoint_conversion_mapping("mixtral")) > 0
    finally:
        conversions._checkpoint_conversion_mapping_cache.pop("mixtral_of_a_test", None)
    internals.copy_conversion("no such family", "another")
    assert conversions.get_checkpoint_conversion_mapping("another") is None


def test_saving_takes_the_options_that_are_handed_on() -> None:
    options = inspect.signature(inspect.unwrap(PreTrainedModel.save_pretrained)).parameters
    assert {"save_directory", "is_main_process", "state_dict", "push_to_hub", "max_shard_size"} <= set(options)
    assert list(options)[:2] == ["self", "save_directory"]
    upload = inspect.signature(inspect.unwrap(PreTrainedModel.push_to_hub)).parameters
    assert {"repo_id", "private", "token", "commit_message", "max_shard_size", "tags"} <= set(upload)
    assert PreTrainedModel.register_for_auto_class.__doc__, "our classes override it, so that no file of ours is copied"


def test_activations_are_checkpointed_without_a_warning() -> None:
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        internals.checkpoint_activations(model)
    assert model.is_gradient_checkpointing

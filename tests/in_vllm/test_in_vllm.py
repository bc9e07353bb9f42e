"""Linearized models in vLLM give the tokens that Transformers gives, in one process and in several."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_kit import FAMILIES, LENGTHS, NEW, STUDENTS, expected, prompts, save_merged  # isort: skip - first, as it sets vLLM up
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, logprobs=1, ignore_eos=True)
EAGER = {"enforce_eager": True, "max_num_batched_tokens": 256}

Folder = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder(student, family)`: a merged folder, and what Transformers generates with it."""
    made: dict[tuple[str, str], tuple[Path, Any]] = {}

    def of(student: str, family: str = "llama") -> tuple[Path, Any]:
        key = (student, family)
        if key not in made:
            path = save_merged(tmp_path_factory.mktemp("merged") / student, student, family)
            made[key] = (path, expected(path, prompts()))
        return made[key]

    return of


def engine(path: Path, **options: Any) -> LLM:
    settings = {"enable_prefix_caching": False, "max_model_len": 1024, "max_num_seqs": 16, "dtype": "float32"}
    return LLM(model=str(path), **{**settings, **EAGER, **options})


def generate(llm: LLM, asked: list[list[int]]) -> list[Any]:
    """The outputs of prompts that were all given at once."""
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in asked]
    return llm.generate(given, GREEDY, use_tqdm=False)


def compare(outputs: list[Any], wanted: list[tuple[list[int], list[float]]], atol: float = 5e-5) -> None:
    for length, output, (tokens, scores) in zip(LENGTHS, outputs, wanted, strict=True):
        found = output.outputs[0]
        assert list(found.token_ids) == tokens, f"prompt of {length} tokens"
        own = [step[token].logprob for step, token in zip(found.logprobs, tokens, strict=True)]
        assert max(abs(a - b) for a, b in zip(own, scores, strict=True)) < atol, f"prompt of {length} tokens"


def check(found: tuple[Path, Any], **options: Any) -> None:
    path, wanted = found
    llm = engine(path, **options)
    compare(generate(llm, prompts()), wanted)
    del llm
    gc.collect()


@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_and_kept_groups_and_layers(student: str, folder: Folder) -> None:
    check(folder(student))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_families(family: str, folder: Folder) -> None:
    """With a student that reads the layer's input, which every family's class has to hand over."""
    check(folder("gated_groups", family))


@pytest.mark.parametrize(
    "options",
    [{"max_num_batched_tokens": 64}, {"max_num_batched_tokens": 50}, {"max_num_seqs": 3}, {"async_scheduling": True}],
    ids=str,
)  # fmt: skip
def test_prefill_in_pieces_and_queues(options: dict[str, Any], folder: Folder) -> None:
    check(folder("groups"), **options)


def test_requests_that_are_preempted(folder: Folder) -> None:
    """Eight requests fill the cache (a page and a block each) and soon need another block each."""
    path, _ = folder("groups")
    llm = engine(path, num_gpu_blocks_override=17, disable_log_stats=False)
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    block = min(group.kv_cache_spec.block_size for group in groups)
    asked = prompts((block - 6,) * 8)
    found = [list(output.outputs[0].token_ids) for output in generate(llm, asked)]
    counters = {metric.name: metric for metric in llm.get_metrics()}
    assert counters["vllm:num_preemptions"].value > 0
    del llm
    gc.collect()
    assert found == [tokens for tokens, _ in expected(path, asked)]


@pytest.mark.parametrize("student", ["terrace", "layers", "groups", "gated_groups"])
def test_a_cached_prefix_is_not_computed_again(student: str, folder: Folder) -> None:
    path, wanted = folder(student)
    llm = engine(path, enable_prefix_caching=True)
    compare(generate(llm, prompts()), wanted)
    again = generate(llm, prompts())
    compare(again, wanted)
    assert again[-1].num_cached_tokens >= 256
    del llm
    gc.collect()


@pytest.mark.parametrize("student", ["groups", "gated_groups"])
@pytest.mark.parametrize("options", [{"compilation_config": {"mode": 3, "backend": "eager"}}, {}], ids=str)
def test_compiled(options: dict[str, Any], student: str, folder: Folder) -> None:
    check(folder(student), enforce_eager=False, **options)


@pytest.mark.parametrize("student", ["groups", "gated_groups"])
def test_two_processes_share_the_heads(student: str, folder: Folder) -> None:
    check(folder(student), tensor_parallel_size=2, gpu_memory_utilization=0.2)


def test_states_of_half_the_size(folder: Folder) -> None:
    """They change the probabilities a little, which shows that the option acts."""
    path, wanted = folder("terrace")
    llm = engine(path, mamba_cache_dtype="bfloat16")
    outputs = generate(llm, prompts())
    with pytest.raises(AssertionError):
        compare(outputs, wanted)
    first = [
        output.outputs[0].logprobs[0][tokens[0]].logprob for output, (tokens, _) in zip(outputs, wanted, strict=True)
    ]
    assert max(abs(own - scores[0]) for own, (_, scores) in zip(first, wanted, strict=True)) < 0.1
    del llm
    gc.collect()


@pytest.mark.parametrize(
    ("option", "changes"),
    [("--speculative-config", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3,
                                                       "prompt_lookup_max": 3}}),
     ("--enable-lora", {"enable_lora": True}), ("--kv-cache-dtype fp8", {"kv_cache_dtype": "fp8"}),
     ("--quantization fp8", {"quantization": "fp8"}),
     ("--mamba-ssm-cache-dtype float16", {"mamba_ssm_cache_dtype": "float16"}),
     ("--kv-transfer-config", {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}})],
)  # fmt: skip
def test_options_without_effect_are_refused(option: str, changes: dict[str, Any], folder: Folder) -> None:
    with pytest.raises(ValueError, match=option):
        engine(folder("terrace")[0], **changes)


def test_a_family_without_a_class_is_refused(tmp_path: Path) -> None:
    import json

    path = save_merged(tmp_path / "merged", "terrace")
    settings = json.loads((path / "config.json").read_text())
    changes = {"architectures": ["LinearizedQwen3ForCausalLM"], "model_type": "linearized_qwen3"}
    (path / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(ValueError, match="no class for vLLM"):
        engine(path)

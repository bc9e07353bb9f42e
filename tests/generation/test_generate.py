"""Generation: batches equal single prompts, seeds reproduce, options reach the model, mistakes are explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_families import make, tiny_model
from trenchcoat.config import UserError
from trenchcoat.generation.generate import Generation, Sampling, Session, generate_rows, generate_text

PROMPTS = ["w3 w4 w5", "w9", "w10 w11 w12 w13 w14 w15 w16", "w3 w4"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, 61))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w60"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(vocab_size=61)


@pytest.fixture(scope="module")
def student() -> Any:
    return make(vocab_size=61)


def write(
    model: Any, tokenizer: Any, prompts: list[str], *, batch_size: int = 8, start: Session | None = None, **options: Any
) -> list[Generation]:
    return generate_text(model, tokenizer, prompts, Sampling.of(options), batch_size=batch_size, start=start)


def texts(generations: list[Generation]) -> list[str]:
    return [generation.text for generation in generations]


def test_a_batch_equals_each_prompt_alone(model: Any, tokenizer: Any) -> None:
    together = write(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    alone = [write(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert [g.prompt for g in together] == PROMPTS
    assert texts(together) == texts(alone)
    assert all(g.text for g in together)
    assert all(g.seconds > 0 for g in together)


def test_a_students_batch_equals_each_prompt_alone(student: Any, tokenizer: Any) -> None:
    together = write(student, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4)
    alone = [write(student, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert texts(together) == texts(alone)
    beams = write(student, tokenizer, PROMPTS[:2], max_new_tokens=6, num_beams=3)
    assert len(texts(beams)) == 2


def test_greedy_is_the_arg_max_of_the_logits(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
    assert texts(write(model, tokenizer, ["w3 w4 w5"], max_new_tokens=5)) == [expected]


def test_sampling_repeats_with_its_seed_and_keeps_the_callers_random_state(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.95}
    state = torch.random.get_rng_state()
    first = texts(write(model, tokenizer, PROMPTS, seed=1, **options))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == texts(write(model, tokenizer, PROMPTS, seed=1, **options))
    assert first != texts(write(model, tokenizer, PROMPTS, seed=2, **options))


def test_top_k_of_one_is_greedy(model: Any, tokenizer: Any) -> None:
    greedy = write(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert texts(write(model, tokenizer, PROMPTS, max_new_tokens=8, do_sample=True, top_k=1)) == texts(greedy)


def test_beams_run_in_a_padded_batch(model: Any, tokenizer: Any) -> None:
    together = write(model, tokenizer, PROMPTS[:2], max_new_tokens=6, num_beams=3)
    alone = [write(model, tokenizer, [prompt], max_new_tokens=6, num_beams=3)[0] for prompt in PROMPTS[:2]]
    assert texts(together) == texts(alone)


def test_text_stops_at_the_end_token(model: Any, tokenizer: Any) -> None:
    greedy = write(model, tokenizer, ["w3 w4 w5"], max_new_tokens=6)[0].text.split()
    end = tokenizer.convert_tokens_to_ids(greedy[2])
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [1, end]
    try:
        stopped = write(model, tokenizer, ["w3 w4 w5", "w9"], max_new_tokens=6)[0]
    finally:
        model.generation_config.eos_token_id = before
    assert stopped.tokens == greedy.index(greedy[2]) + 1


def test_settings_of_the_checkpoint_do_not_leak_into_greedy(model: Any, tokenizer: Any) -> None:
    greedy = texts(write(model, tokenizer, PROMPTS, max_new_tokens=8))
    model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.5)
    try:
        assert texts(write(model, tokenizer, PROMPTS, max_new_tokens=8)) == greedy
    finally:
        model.generation_config.update(do_sample=False, temperature=None, top_p=None)


def test_an_empty_prompt_starts_from_the_beginning_of_text(model: Any, tokenizer: Any) -> None:
    assert write(model, tokenizer, [""], max_new_tokens=4)[0].tokens >= 1


def test_no_prompts_give_no_text(model: Any, tokenizer: Any) -> None:
    assert write(model, tokenizer, []) == []


def test_a_prompt_without_tokens_is_an_error(model: Any, tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no token"):
        write(model, bare, [""])


@pytest.mark.parametrize(("option", "value"), [
    ("max_new_tokens", 0), ("num_beams", 0), ("batch_size", 0), ("temperature", 0.0), ("top_k", -1), ("top_p", 1.5),
])  # fmt: skip
def test_values_out_of_range_are_errors(model: Any, tokenizer: Any, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        write(model, tokenizer, ["w3"], do_sample=True, **{option: value})


def test_a_long_prompt_is_read_in_chunks_with_bounded_memory(
    student: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [" ".join(f"w{3 + i % 50}" for i in range(length)) for length in (100, 90)]
    whole = texts(write(student, tokenizer, prompts, max_new_tokens=8))
    widths: list[int] = []
    hook = student.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    monkeypatch.setattr("trenchcoat.generation.generate.PREFILL_TOKENS", 16)
    try:
        assert texts(write(student, tokenizer, prompts, max_new_tokens=8)) == whole
    finally:
        hook.remove()
    assert max(widths) == 16


def test_generation_starts_from_a_session(student: Any, model: Any, tokenizer: Any) -> None:
    for chosen in (student, model):
        session = Session.new(chosen)
        session.read(tokenizer("w3 w4 w5 w6 w7")["input_ids"])
        ends = ["w8 w9", "w10", "w11 w12 w13"]
        whole = [f"w3 w4 w5 w6 w7 {end}" for end in ends]
        found = texts(write(chosen, tokenizer, ends, max_new_tokens=7, start=session))
        assert found == texts(write(chosen, tokenizer, whole, max_new_tokens=7))
        beams = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
        after = write(chosen, tokenizer, ends[:2], start=session, **beams)
        assert texts(after) == texts(write(chosen, tokenizer, whole[:2], **beams))
        assert [one.prompt for one in after] == ["w8 w9", "w8 w9", "w10", "w10"]
        assert session.seen == 4
        with pytest.raises(ValueError, match="the prompt is empty"):
            write(chosen, tokenizer, [""], start=Session(chosen, session.cache))


def test_unknown_and_conflicting_options_are_errors(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="did you mean typical_p"):
        write(model, tokenizer, ["w3"], typicalp=0.5)
    with pytest.raises(UserError, match="do not go together"):
        write(model, tokenizer, ["w3"], num_return_sequences=3)
    with pytest.raises(UserError, match="nothing to"):
        Session.new(model).read([])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": float("nan")}, "temperature is nan; expected a number above 0"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"top_p": [1]}, r"top_p is \[1\]; expected a number"),
        ({"num_beams": 2.5}, "num_beams is 2.5; expected a whole number"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'; expected a whole number"),
        ({"seed": True}, "seed is True; expected a whole number"),
        ({"do_sample": 1}, "do_sample is 1; expected true or false"),
    ],
)
def test_options_of_the_wrong_kind_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Sampling.of(options)


def test_rows_come_in_batches_of_at_least_one(student: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="batch_size is 0; expected a whole number of at least 1"):
        list(generate_rows(student, tokenizer, PROMPTS, Sampling(), batch_size=0))

"""What each field of a request does, as clients see it: a real server process, the `openai` client package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from serve_kit import CONTEXT, PROMPT, TEMPLATE, Running, ask
from trenchcoat.models import hub

pytest_plugins = ["serve_fixtures"]

HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def local(adapter: Path) -> tuple[Any, Any]:
    """The served model and its tokenizer, in this process."""
    return hub.load(adapter, device="cpu")


def complete(server: Running, prompt: Any = PROMPT, tokens: int = 12, **options: Any) -> Any:
    return server.client.completions.create(model=server.name, prompt=prompt, max_tokens=tokens, **options)


def chat(server: Running, **options: Any) -> Any:
    return server.client.chat.completions.create(**{"model": server.name, "messages": HI, "max_tokens": 8, **options})


def generated(local: tuple[Any, Any], prompt: str, tokens: int, **options: Any) -> str:
    """What `generate` writes greedily."""
    model, tokenizer = local
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, **options)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_stop_strings_are_left_out(server: Running) -> None:
    whole = complete(server, tokens=40).choices[0].text
    stop = whole[20:23]
    done = complete(server, tokens=40, stop=stop)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
    assert done.usage.completion_tokens == whole.index(stop) + len(stop)
    assert complete(server, tokens=40, stop=["not in it", stop]).choices[0].text == done.choices[0].text
    pieces = list(complete(server, tokens=40, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == done.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert complete(server, tokens=40, stop="not in it").choices[0].text == whole


def test_prompts_in_all_four_forms(server: Running, local: tuple[Any, Any]) -> None:
    texts = ["one coat", "two coats"]
    ids = [local[1](text)["input_ids"] for text in texts]
    expected = [generated(local, text, 12) for text in texts]
    assert complete(server, texts[0]).choices[0].text == expected[0]
    assert complete(server, ids[0]).choices[0].text == expected[0]
    for prompts in (texts, ids):
        done = complete(server, prompts)
        assert [(choice.index, choice.text) for choice in done.choices] == list(enumerate(expected))
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (sum(map(len, ids)), 24)
    streamed = ["", ""]
    for chunk in complete(server, texts, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_token_ids_that_the_model_does_not_have(server: Running) -> None:
    for ids in ([1, 10**6], [-1], [2**70]):
        with pytest.raises(openai.BadRequestError, match="token id outside 0 to"):
            complete(server, ids)
    with pytest.raises(openai.BadRequestError, match="logit_bias names token 999999"):
        complete(server, logit_bias={"999999": 1})


def test_several_samples_of_one_prompt(server: Running) -> None:
    done = complete(server, n=3, temperature=1.5, seed=5)
    texts = [choice.text for choice in done.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert [choice.text for choice in complete(server, n=3, temperature=1.5, seed=5).choices] == texts
    assert complete(server, temperature=1.5, seed=5).choices[0].text == texts[0]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(PROMPT), 36)
    greedy = complete(server, n=2)
    assert greedy.choices[0].text == greedy.choices[1].text == complete(server).choices[0].text
    assert len({choice.message.content for choice in chat(server, n=2, temperature=1.5, seed=1).choices}) == 2
    roles = [chunk for chunk in chat(server, n=2, stream=True) if chunk.choices[0].delta.role]
    assert [chunk.choices[0].index for chunk in roles] == [0, 1]


def _logprobs(local: tuple[Any, Any], ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(local[0](input_ids=torch.tensor([ids])).logits[0].float(), -1)


def test_probabilities_of_a_completion_and_of_an_echoed_prompt(server: Running, local: tuple[Any, Any]) -> None:
    prompt = PROMPT * 8  # more than is scored at once
    done = complete(server, prompt, 5, logprobs=2, echo=True).choices[0]
    assert done.text.startswith(prompt)
    ids = local[1](done.text)["input_ids"]
    expected = _logprobs(local, ids)
    assert done.logprobs.tokens == list(done.text)
    assert done.logprobs.text_offset == list(range(len(done.text)))
    assert (done.logprobs.token_logprobs[0], done.logprobs.top_logprobs[0]) == (None, None)
    found = torch.tensor(done.logprobs.token_logprobs[1:])
    torch.testing.assert_close(found, expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-4, rtol=0)
    for place, top in enumerate(done.logprobs.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(float(expected[place].max()), abs=1e-4)
        assert 2 <= len(top) <= 3
    only = complete(server, prompt, 0, logprobs=0, echo=True)
    assert (only.choices[0].text, only.usage.completion_tokens) == (prompt, 0)
    assert only.choices[0].logprobs.token_logprobs == pytest.approx(
        [None, *found[: len(prompt) - 1].tolist()], abs=1e-5
    )
    assert complete(server, echo=True).choices[0].text == PROMPT + complete(server).choices[0].text
    assert complete(server).choices[0].logprobs is None


def test_probabilities_of_a_chat_streamed_and_whole(server: Running, local: tuple[Any, Any]) -> None:
    done = chat(server, logprobs=True, top_logprobs=3).choices[0]
    entries = done.logprobs.content
    assert "".join(entry.token for entry in entries) == done.message.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == done.message.content
    ids = local[1]("user: hi\nassistant:" + done.message.content)["input_ids"]
    expected = _logprobs(local, ids)[-len(entries) - 1 : -1]
    assert [entry.logprob for entry in entries] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
    assert all(entry.top_logprobs[0].logprob == entry.logprob and len(entry.top_logprobs) == 3 for entry in entries)
    chunks = [chunk.choices[0] for chunk in chat(server, logprobs=True, top_logprobs=3, stream=True)]
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    assert streamed == entries


def test_probabilities_end_where_the_text_does(server: Running) -> None:
    whole = complete(server, tokens=20).choices[0].text
    done = complete(server, tokens=20, stop=whole[10:12], logprobs=0).choices[0]
    assert "".join(done.logprobs.tokens) == done.text == whole[: whole.index(whole[10:12])]


def test_penalties_bias_and_limits_on_sampling(server: Running, local: tuple[Any, Any]) -> None:
    plain = complete(server, tokens=30).choices[0].text
    penalized = complete(server, tokens=30, extra_body={"repetition_penalty": 1.5}).choices[0].text
    assert penalized == generated(local, PROMPT, 30, repetition_penalty=1.5) != plain
    assert len(set(complete(server, tokens=30, frequency_penalty=2.0).choices[0].text)) > len(set(plain))
    letter = local[1]("e")["input_ids"][0]
    assert chat(server, logit_bias={str(letter): 100}).choices[0].message.content == "e" * 8
    assert complete(server, logit_bias={str(letter): 100}).choices[0].text == "e" * 12
    for limit in ({"top_k": 1}, {"min_p": 1.0}):
        assert complete(server, tokens=30, temperature=2, seed=1, extra_body=limit).choices[0].text == plain
    assert complete(server, tokens=30, temperature=2, seed=1).choices[0].text != plain


def test_usage_comes_with_a_stream_if_it_is_asked_for(server: Running) -> None:
    for ask_for in (complete, chat):
        without = list(ask_for(server, stream=True))
        assert all(chunk.choices and chunk.usage is None for chunk in without)
        *chunks, last = list(ask_for(server, stream=True, stream_options={"include_usage": True}))
        assert all(chunk.choices and chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens > 8
        assert last.usage.state_bytes > 1000, "the size of the state, an addition of ours"


def test_a_stream_ends_with_done(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    answer = ask(server, "/v1/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")


def test_models(server: Running) -> None:
    entry = server.client.models.retrieve("coat")
    assert (entry.id, entry.max_model_len) == ("coat", CONTEXT)  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="there is no model 'another'"):
        server.client.models.retrieve("another")
    for request in (complete, chat):
        with pytest.raises(openai.NotFoundError, match="pinned to 'coat'"):
            request(replace(server, name="another"))


def test_responses_to_what_is_not_there(server: Running) -> None:
    missing = ask(server, "/v1/embeddings", {})
    assert (missing.status, json.loads(missing.body)["error"]["type"]) == (404, "invalid_request_error")
    wrong = ask(server, "/v1/completions")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert ask(server, "/v1/models", {}).status == 405


def test_half_of_a_surrogate_pair_is_read_as_a_replacement_character(server: Running) -> None:
    broken, whole = (
        ask(server, "/v1/completions", f'{{"prompt": "bad {text} emoji", "max_tokens": 4, "echo": true}}'.encode())
        for text in ("\\ud83d", "\\ufffd")
    )
    assert broken.status == whole.status == 200
    assert json.loads(broken.body)["choices"][0]["text"] == json.loads(whole.body)["choices"][0]["text"]
    messages = [{"role": "user", "content": "\ud83d"}]
    assert ask(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 2}).status == 200
    assert ask(server, "/v1/completions", {"prompt": "x", "stop": ["\ud83d"], "max_tokens": 2}).status == 200


def test_template_reads_parts_as_one_text(server: Running, local: tuple[Any, Any]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert TEMPLATE.endswith("assistant:")
    done = chat(server, messages=[{"role": "user", "content": parts}], response_format={"type": "text"})
    assert done.choices[0].message.content == generated(local, "user: a b\nassistant:", 8)
    with pytest.raises(openai.BadRequestError, match="'image_url'; this server reads text only"):
        chat(server, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}])

"""Chat and `trenchcoat generate` end to end: turns, states, files, mistakes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer
from trenchcoat.cli import app as cli
from trenchcoat.config import FeatureMapConfig, LoraConfig, ModelConfig, StudentConfig, UserError
from trenchcoat.generation.conversation import Conversation
from trenchcoat.generation.generate import Sampling, softmax_twin
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students
from trenchcoat.models.lora import add_lora

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model with a nonzero LoRA."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    attach_students(model, StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=8)))
    lora = LoraConfig(rank=2)
    add_lora(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    place = tmp_path_factory.mktemp("adapter")
    hub.save_adapter(model, place, base=ModelConfig(path=str(tiny_model_dir)), lora=lora)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return hub.load(folder)[0]


def templated() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def talk(model: Any, tokenizer: Any, **options: Any) -> Conversation:
    return Conversation(model, tokenizer, Sampling.of({"max_new_tokens": 6, **options}))


def spoken(conversation: Conversation) -> list[list[int]]:
    """Record what is read at each turn."""
    heard: list[list[int]] = []
    write = conversation.session.write

    def listen(ids: Sequence[int], *args: Any, **options: Any) -> list[int]:
        heard.append([*conversation.session.pending, *ids])
        new = write(ids, *args, **options)
        heard.append(new)
        return new

    conversation.session.write = listen  # type: ignore[method-assign]
    return heard


@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_turns_read_only_new_tokens_and_answer_as_from_the_whole_text(model: Any, mode: str) -> None:
    tokenizer, chosen = templated(), model if mode == "student" else softmax_twin(model)
    chat = talk(chosen, tokenizer)
    heard, pieces = spoken(chat), []
    first, second = chat.ask("Hello", pieces.append), chat.ask("And you?", pieces.append)
    assert tokenizer.decode(heard[0]) == "<user>Hello<eos>\n<assistant>"
    assert tokenizer.decode(heard[2]).endswith("<eos>\n<user>And you?<eos>\n<assistant>")
    assert "".join(pieces).strip().startswith(first.text[:3])
    row: list[int] = []
    for ids, new in ((heard[0], heard[1]), (heard[2], heard[3])):
        row = [*row[: len(row) - (len(row) and 1)], *ids] if row else list(ids)
        whole = chosen.generate(torch.tensor([row]), generation_config=chat.config)[0].tolist()
        assert whole[len(row) :] == new
        row = whole
    assert second.seen > first.seen
    assert "state" in second.summary
    assert second.state_bytes > 0
    assert (second.state_bytes == first.state_bytes) == (mode == "student")


def test_an_answer_with_an_end_token_is_not_ended_twice(model: Any) -> None:
    chat = talk(model, templated(), max_new_tokens=5)
    chat.config.eos_token_id = [int(token) for token in range(3, 259)]  # any token is an end token
    chat.ask("Hello", lambda text: None)
    assert len(chat.session.pending) == 1
    heard = spoken(chat)
    chat.ask("And?", lambda text: None)
    assert templated().decode(heard[0]) == "<eos>\n<user>And?<eos>\n<assistant>"


def test_a_plain_transcript_without_a_template(model: Any, tokenizer: Any) -> None:
    chat = talk(model, tokenizer)
    heard = spoken(chat)
    chat.ask("Hello", lambda text: None)
    chat.ask("More", lambda text: None)
    assert tokenizer.decode(heard[0]) == "User: Hello\nAssistant:"
    assert tokenizer.decode(heard[2]).endswith("\nUser: More\nAssistant:")
    assert chat.config.stop_strings == ["\nUser:"]


def test_a_saved_conversation_continues_and_a_reset_one_starts_over(model: Any, tmp_path: Path) -> None:
    chat = talk(model, templated())
    first = chat.ask("Hello", lambda text: None).text
    chat.save(tmp_path / "state")
    there = chat.ask("And you?", lambda text: None).text
    other = talk(model, templated())
    other.load(tmp_path / "state")
    assert other.ask("And you?", lambda text: None).text == there
    other.reset()
    assert other.ask("Hello", lambda text: None).text == first
    with pytest.raises(UserError, match="constant size"):
        talk(softmax_twin(model), templated()).save(tmp_path / "softmax")


def test_an_answer_can_be_stopped(model: Any) -> None:
    chat, asked = talk(model, templated(), max_new_tokens=50), []

    def halt() -> bool:
        asked.append(True)
        return len(asked) >= 3

    reply = chat.ask("Hello", lambda text: None, halt)
    assert (reply.tokens, reply.stopped) == (3, True)
    assert chat.ask("And?", lambda text: None).tokens >= 1


def test_errors_of_a_chat_template_are_reported_to_the_user(model: Any) -> None:
    tokenizer = templated()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        talk(model, tokenizer).ask("Hello", lambda text: None)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    chat = talk(model, tokenizer)
    chat.ask("Hello", lambda text: None)
    with pytest.raises(UserError, match="does not contain answers"):
        chat.ask("Hello", lambda text: None)


def test_the_twin_shares_the_weights_and_is_the_base_model(model: Any, tiny_model_dir: Path) -> None:
    twin, base = softmax_twin(model), AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ids = torch.randint(3, 259, (1, 20))
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(twin(ids).logits, base(ids).logits)
        assert torch.equal(model(ids).logits, before)
        assert not torch.allclose(before, twin(ids).logits)
    owned = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} <= owned


# The command line


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert cli.main([str(argument) for argument in arguments]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def test_a_file_of_prompts_becomes_json_lines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = ["The coat", "A window", "Three"], tmp_path / "out.jsonl"
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    few = ("--max-new-tokens", 4, "--batch-size", 2)
    assert run(capsys, "generate", folder, "--prompts", tmp_path / "p.txt", *few, "--out", out) == ""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert set(rows[0]) == {"prompt", "text", "tokens", "seconds"}
    printed = run(capsys, "generate", folder, "--prompts", tmp_path / "p.jsonl", *few, "--jsonl", "--compare")
    found = [json.loads(line) for line in printed.splitlines()]
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert all("softmax" in row for row in found)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(prompts)))
    piped = run(capsys, "generate", folder, "--prompts", "-", *few, "--jsonl")
    assert [json.loads(line)["text"] for line in piped.splitlines()] == [row["text"] for row in rows]
    monkeypatch.setattr("sys.stdin", io.StringIO("The coat"))
    assert run(capsys, "generate", folder, "--prompt", "-", *few).strip() == ("The coat" + rows[0]["text"]).strip()


def test_prompts_that_are_not_utf_8(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--max-new-tokens", 2)
    assert run(capsys, "generate", folder, "--prompt", "caf\udce9 ", *few).startswith("caf\ufffd ")
    (tmp_path / "p.jsonl").write_text('{"prompt": "bad \\ud83d"}\n')
    assert run(capsys, "generate", folder, "--prompts", tmp_path / "p.jsonl", *few).startswith("bad \ufffd")
    for option in ("--prompt", "--prompts"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
        assert "standard input is not UTF-8" in run(capsys, "generate", folder, option, "-", *few, code=1)
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name, message in (("absent.txt", "cannot be read"), ("deep.jsonl", "deep.jsonl, line 1 is not JSON")):
        assert message in run(capsys, "generate", folder, "--prompts", tmp_path / name, *few, code=1)


def test_a_long_shared_prefix_is_read_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, start = tmp_path / "state", "Numbers are kept as they are: 0, 1, 2, 3, 5, 8, 13, 21. "
    few = ("--max-new-tokens", 5, "--jsonl")
    run(capsys, "generate", folder, "--prompt", start, "--max-new-tokens", 0, "--save-state", state)
    ends = ["The coat", "A window is long"]
    (tmp_path / "p.txt").write_text("\n".join(ends))
    after = run(capsys, "generate", folder, "--prompts", tmp_path / "p.txt", "--load-state", state, *few)
    whole = run(capsys, "generate", folder, "--prompt", start + ends[0], "--prompt", start + ends[1], *few)
    texts = [[json.loads(line)["text"] for line in printed.splitlines()] for printed in (after, whole)]
    assert texts[0] == texts[1]
    several = run(
        capsys, "generate", folder, "--prompt", ends[0], "--load-state", state, *few,
        "--option", "num_return_sequences=3", "--temperature", 5,
    )  # fmt: skip
    assert len({json.loads(line)["text"] for line in several.splitlines()}) == 3


def test_generation_options_reach_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--prompt", "The coat", "--max-new-tokens", 12)
    plain = run(capsys, "generate", folder, *few)
    assert run(capsys, "generate", folder, *few, "--option", "repetition_penalty=5.0") != plain
    short = run(capsys, "generate", folder, *few, "--state-dtype", "bfloat16")
    assert short.startswith("The coat")
    assert "did you mean repetition_penalty" in run(
        capsys, "generate", folder, *few, "--option", "repetition_penality=2", code=1
    )
    assert "do not go together" in run(capsys, "generate", folder, *few, "--option", "cache_implementation=xx", code=1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompts", "{tmp}/bad.jsonl"], "bad.jsonl, line 2"),
        (["--prompts", "{tmp}/empty.txt"], "holds no prompts"),
        (["--prompts", "{tmp}/latin.txt"], "not UTF-8"),
        (["--prompts", "{tmp}/absent.txt"], "absent.txt"),
        (["--prompt", "x", "--load-state", "{tmp}/absent"], "absent"),
        (["--prompt", "x", "--load-state", "{tmp}/latin.txt"], "not a readable safetensors"),
        (["--prompt", "x", "--prompt", "y", "--save-state", "{tmp}/s"], "one prompt"),
        (["--prompt", "x", "--beams", "2", "--save-state", "{tmp}/s"], "one continuation"),
        (["--prompt", "x", "--compare", "--load-state", "{tmp}/latin.txt"], "leave out one"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff")
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    said = run(capsys, "generate", folder, *filled, code=1)
    assert expected in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_a_malformed_option_is_a_usage_error(folder: Path) -> None:
    for wrong in ("words", "=3", "x=[1"):
        assert cli.main(["generate", str(folder), "--prompt", "x", "--option", wrong]) == 2


def test_a_chat_from_the_keyboard(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, end = tmp_path / "state", tmp_path / "end"
    lines = ["Hello", f"/save {state}", "/reset", f"/load {state}", "/dance", "/load nowhere", "More", "/quit", "never"]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    said = run(capsys, "chat", folder, "--max-new-tokens", 4, "--save-state", end)
    assert lines == ["never"]
    for expected in (
        "plain transcript",
        "tokens/s",
        "MiB",
        "saved to",
        "history cleared",
        "loaded",
        "not understood",
        "no such",
    ):
        assert expected in said, expected
    assert end.stat().st_size == pytest.approx(state.stat().st_size, abs=40)

    def closed(prompt: str) -> str:
        raise EOFError

    answers = iter(["Hello"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers, None) or closed(prompt))
    both = run(capsys, "chat", folder, "--max-new-tokens", 4, "--compare")
    assert "linear:" in both
    assert "softmax:" in both

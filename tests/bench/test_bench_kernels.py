"""The kernels' benchmark: its arithmetic, its error messages, every measurement at a tiny size (on CPUs in Triton's
interpreter), and (with a GPU) a quick run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kernel_kit import DEVICE
from trenchcoat.bench import kernels, kernels_decode, kernels_operator, timing
from trenchcoat.bench.benchmark import Settings
from trenchcoat.bench.kernel_part import Measurement
from trenchcoat.bench.llama import TOY_LLAMA, LlamaShape, random_llama
from trenchcoat.bench.registry import run_benchmark
from trenchcoat.cli.app import main
from trenchcoat.config import UserError
from trenchcoat.models.attach import set_mode, students_of
from trenchcoat.ops.triton import check
from trenchcoat.runtime.files import write_json

SHAPE = TOY_LLAMA
DECODE = kernels_decode.DecodePart.toy
TOY = kernels.KernelsBenchmark.toy


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> kernels.KernelsBenchmark:
    """The benchmark at toy sizes, on a GPU too."""
    benchmark = kernels.KernelsBenchmark("kernels")
    monkeypatch.setattr(benchmark, "full", TOY)
    return benchmark


@pytest.fixture
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "check", lambda device: None)


def test_operations_are_those_of_the_formula() -> None:
    """Per token and head at D = F = 128, W = 64: 82k multiply-adds forward, 229k backward, 66k for transfer."""
    sizes = kernels_operator.OperatorPartSizes()
    work = {name: ops / 2 / sizes.heads for name, (ops, _) in kernels_operator.work_of(sizes, 1).items()}
    assert round(work["forward"] / 1e3) == 82
    assert round(work["backward"] / 1e3) == 229
    assert work["training"] == work["forward"] + work["backward"]
    assert round((work["transfer"] - work["forward"]) / 1e3) == 66


def test_bytes_are_those_of_the_model() -> None:
    """8 B parameters; caches as they are allocated; decoding reads all weights but the embedding."""
    shape = LlamaShape()
    assert round(shape.bytes(32) / 2e9, 1) == 8.0
    model = random_llama(SHAPE, 2, "cpu")
    assert kernels_decode.row_bytes(model, "softmax", 10) == 2 * 10 * 2 * 8 * 2
    students = sum(p.nbytes for s in students_of(model).values() for p in s.parameters())
    norms = 2.0 * SHAPE.hidden * (2 * 2 + 1)
    assert kernels_decode.weight_bytes(model) == SHAPE.bytes(2) - 2 * 31 * 16 + norms + students
    cache = kernels_decode.student_cache(model, 3, 20)
    assert 3 * kernels_decode.row_bytes(model, "student", 20) == sum(layer.nbytes() for layer in cache.layers)


def test_every_target_of_the_kernels_is_in_the_table() -> None:
    """At the full sizes, each target refers to an existing measurement."""
    timer, limits = timing.Timer(1, "cpu"), timing.Ceilings(1.0, 1.0)
    rows = []
    for part in kernels.KERNEL_PARTS.values():
        made = {key for key, _ in part.measurements(part.full, timer, limits)}
        rows += [target.judged({key: {"out_of_memory": "a reason"} for key in made}) for target in part.targets]
    assert len(rows) == 19
    assert {row["why"] for row in rows} == {"out of memory"}


@pytest.mark.usefixtures("_checked")
def test_every_measurement_runs_and_is_saved_immediately(tmp_path: Path, toy: kernels.KernelsBenchmark) -> None:
    kept: list[int] = []
    said: list[str] = []

    def keep(result: dict[str, Any]) -> None:
        write_json(tmp_path / "kept.json", result)
        kept.append(sum(len(part) for part in result["parts"].values()))

    result = toy.measure(Settings(device=DEVICE, keep=keep, say=said.append))
    parts = result["parts"]
    assert kept == list(range(1, len(kept) + 1))
    assert len(said) == len(kept) + 1
    assert json.loads((tmp_path / "kept.json").read_text()) == json.loads(json.dumps(result))
    forward, training = parts["operator"]["forward 4"], parts["operator"]["training 4"]
    assert {"sdpa", "flash", "chunkwise"} <= set(forward["others"])
    assert forward["share"] == forward["least"] / forward["seconds"]
    assert training["backward"]["seconds"] < training["seconds"]
    layer = parts["layer"]["layer"]
    assert layer["ratio"] == layer["ours"] / layer["teacher"]
    assert {"transfer", "lora 5", "prefill 7"} <= set(parts["model"])
    largest = {name: row["rows"] for name, row in parts["decode"].items() if name.startswith("largest")}
    assert [largest[f"largest batch, {kind}"] for kind in ("student", "student per_kv_head", "softmax")] == [2, 3, 4]
    text = toy.text(result)
    assert re.search(r"tokens/s over the softmax model's +\S+ +>= 25", text)
    assert "forward at T = 131072: times as fast as softmax attention" in text
    assert "not measured" in text


def test_out_of_memory_is_recorded_and_the_rest_continues(
    monkeypatch: pytest.MonkeyPatch, toy: kernels.KernelsBenchmark
) -> None:
    def measurements(sizes: object, timer: object, limits: object) -> list[Measurement]:
        def full() -> dict[str, Any]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB.\nmore")

        return [("transfer", full), ("lora 1024", lambda: {"tokens": 5, "teacher": 2.0, "ours": 2.2, "ratio": 1.1})]

    monkeypatch.setattr(kernels.KERNEL_PARTS["model"], "measurements", measurements)
    result = toy.measure(Settings(device=DEVICE, only=["model"]))
    assert set(result["parts"]) == {"model"}
    assert result["parts"]["model"]["transfer"] == {"out_of_memory": "CUDA out of memory. Tried to allocate 3.50 GiB."}
    first, second = result["targets"][:2]
    assert (first["met"], first["why"]) == (None, "out of memory")
    assert second["measured"] == 1.1
    assert (second["met"], second["why"]) == ((None, "a quick run") if DEVICE == "cpu" else (True, ""))


def test_the_largest_batch_shrinks_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = replace(DECODE, memory=400_000)

    def full_above(sizes: object, timer: object, model: object, kind: str, rows: int) -> float:
        if rows > 250:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return 0.5

    monkeypatch.setattr(kernels_decode, "seconds_a_token", full_above)
    found = kernels_decode._largest(sizes, timing.Timer(1, "cpu"), "softmax", "per_query_head")
    assert found["tried"][-1] == found["rows"] <= 250 < found["tried"][0]
    assert found["tokens_per_second"] == 2 * found["rows"]


def test_softmax_baseline_matches_the_ordinary_cache() -> None:
    """With buffers of exactly the context length, the logits equal those with Transformers' cache."""
    torch.manual_seed(0)
    model = random_llama(SHAPE, 2, "cpu").float()
    ids = torch.randint(0, 31, (2, 6))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
        layers = [
            kernels_decode.FullLayer(*(torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (layer.keys, layer.values)))
            for layer in cache.layers
        ]
        wanted = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    loop = kernels_decode.Loop(model, kernels_decode.Cache(layers=layers), 2, 5, advance=False)
    loop.ids.copy_(ids[:, 5:])
    for _ in range(2):  # the second run finds its own pair in the last position and overwrites it
        loop.ids.copy_(ids[:, 5:])
        loop.step()
        assert torch.equal(loop.ids, wanted[:, -1].argmax(-1, keepdim=True))
    with torch.no_grad():
        again = model(input_ids=ids[:, 5:], position_ids=loop.place, past_key_values=loop.cache).logits
    torch.testing.assert_close(again, wanted)


def test_the_loop_decodes_like_generate() -> None:
    torch.manual_seed(0)
    model = random_llama(replace(SHAPE, impl="chunkwise"), 2, "cpu").float()
    set_mode(model, "student")
    ids = torch.randint(0, 31, (2, 7))
    wanted = model.generate(ids, max_new_tokens=9, do_sample=False)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=cache).logits
    loop = kernels_decode.Loop(model, cache, 2, 7, advance=True)
    loop.ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
    found = [loop.ids.clone()]
    for _ in range(8):
        loop.step()
        found.append(loop.ids.clone())
    assert torch.equal(torch.cat(found, 1), wanted[:, 7:])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_gpu_it_is_an_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"on a GPU.*estimated device memory: operator \d"):
        run_benchmark("kernels", device=device)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--only", "operator,everything"], "everything"),
        (["kernels", "--layers", "0"], "--layers is 0"),
        (["ops", "--only", "model"], "bench ops does not have --only"),
    ],
)
def test_wrong_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_quick_run(tmp_path: Path) -> None:
    text = run_benchmark("kernels", quick=True, device="cuda", out=str(tmp_path / "kernels.json"))
    assert "roofline" in text
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert not [row for part in result["parts"].values() for row in part.values() if "out_of_memory" in row]

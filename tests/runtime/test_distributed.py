"""Several processes on this machine (gloo): the numbers of one process, resuming on more or fewer, a dying process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from conftest import byte_tokenizer, save_tiny_model, tiny_llama_config
from ranks_kit import run, run_with_a_kill
from ranks_worker import stopped
from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.evaluation.results import Results
from trenchcoat.runtime import distributed
from trenchcoat.runtime.runlog import read_metrics

STEPS = ["transfer.max_steps=4", "lora.max_steps=4"]
"""Of both stages; interrupted runs stop after two steps of the second."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text_file: Path) -> list[str]:
    """Overrides of every run here. Five micro-batches a step do not divide by 2 or 3: some processes idle in the last
    round. LoRA has dropout, and the schedule does not depend on how many steps there will be."""
    stage = ("batch_size=1", "accumulation=5", "eval_every=2", "save_every=1", "eval_batches=3", "warmup_steps=0")
    return [
        f"model.path={tiny_model_dir}", "model.device=cpu", f"data.path={text_file}", "data.format=text",
        "data.seq_len=48", "data.validation_rows=10", f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "student.window=8", "student.keep=[1.0]", "student.feature_map.feature_dim=8",
        "student.feature_map.init=identity",
        *(f"{name}.{setting}" for name in ("transfer", "lora") for setting in stage),
        "transfer.schedule=plateau", "lora.schedule=plateau", "lora.rank=2", "lora.dropout=0.2",
        "lora.gradient_checkpointing=true", "eval.rows=5", "eval.batch_size=2", "eval.decode_lengths=[]",
        "eval.baselines=false", "eval.constant=false", "eval.seq_len=null", "run.threads=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def single(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    stages.linearize(load_recipe("demo", [*base, *STEPS, f"run.dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 290 MB in "one" file, and the same "indexed" in three."""
    torch.manual_seed(0)
    config = tiny_llama_config(hidden_size=768, intermediate_size=3072, num_hidden_layers=10, num_attention_heads=12)
    model = LlamaForCausalLM(config)
    root = tmp_path_factory.mktemp("large")
    for name, size, files in (("one", "5GB", 1), ("indexed", "100MB", 3)):
        model.save_pretrained(root / name, max_shard_size=size)
        byte_tokenizer().save_pretrained(root / name)
        assert len(list((root / name).glob("*.safetensors"))) == files
    return {name: root / name for name in ("one", "indexed")}


@pytest.fixture(scope="module")
def two(
    base: list[str], tmp_path_factory: pytest.TempPathFactory, large_model: dict[str, Path]
) -> tuple[Path, list[dict[str, Any]]]:
    """Two processes: loading, the uninterrupted run, half runs, variants of sharding, failures; returns the folder and
    each process's report by the job's name. Loading comes first, in processes that have freed no memory yet."""
    root = tmp_path_factory.mktemp("two")
    jobs: dict[str, tuple[str, list[str]]] = {
        "loading": ("loading", [f"model.path={large_model['one']}"]),
        "whole": ("linearize", STEPS),
        "half-1": ("stopped", STEPS),
        "half-3": ("stopped", STEPS),
        "none": ("linearize", [*STEPS, "parallel.shard=none"]),
        "node": ("linearize", [*STEPS, "parallel.shard=node", "parallel.node_size=1", "parallel.async_save=false"]),
        "collectives": ("collectives", []),
        "poisoned": ("poisoned", []),
        "uneven": ("transfer", ["parallel.node_size=3", "parallel.shard=node"]),
        "quantized": ("transfer", ["model.quantize=nf4"]),
        "offloaded": ("transfer", ["parallel.cpu_offload=true"]),
    }
    listed = [
        {"do": command, "overrides": [*base, *more, f"run.dir={root / name}"]} for name, (command, more) in jobs.items()
    ]
    return root, [dict(zip(jobs, report, strict=True)) for report in run(2, listed, root / "out")]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log's numbers."""
    return [line for line in read_metrics(folder) if line["kind"] in ("train", "eval")]


def assert_same_run(one: Path, other: Path) -> None:
    """Losses (all layers), gradient norms, adapters and evaluation agree to 1e-5; counters exactly."""
    assert len(lines(one)) == len(lines(other)) > 10
    for a, b in zip(lines(one), lines(other), strict=True):
        exact = ("kind", "stage", "step", "tokens", "lr")
        assert [a.get(name) for name in exact] == [b.get(name) for name in exact]
        names = [name for name in a if name == "grad_norm" or name.split("/")[0] in ("loss", "mse", "relative")]
        assert {name: a[name] for name in names} == pytest.approx({name: b[name] for name in names}, rel=1e-5)
    first, second = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)
    meta = [json.loads((folder / "adapter" / "trenchcoat.json").read_text()) for folder in (one, other)]
    ours, theirs = ({k: v for k, v in one.items() if k not in ("sha256", "checksum")} for one in meta)
    assert ours == theirs
    if (one / "results.json").is_file():
        rows = [Results.load(folder / "results.json").rows for folder in (one, other)]
        assert rows[0].keys() == rows[1].keys()
        for name, scores in rows[0].items():
            assert rows[1][name].all.sums == pytest.approx(scores.all.sums, rel=1e-5)


def test_two_processes_do_what_one_does(single: Path, two: tuple[Path, list[dict[str, Any]]]) -> None:
    root, reports = two
    for report in reports:
        assert [report[name] for name in ("whole", "half-1", "half-3")] == ["done", "stopped", "stopped"]
        assert [report[name] for name in ("none", "node")] == ["done", "done"]
    assert_same_run(single, root / "whole")


@pytest.mark.parametrize("way", ["none", "node"])
def test_every_sharding_of_the_base_gives_the_same(
    way: str, single: Path, two: tuple[Path, list[dict[str, Any]]]
) -> None:
    assert_same_run(single, two[0] / way)


def test_all_processes_write_one_log(two: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = two
    train = [line for line in lines(root / "whole") if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4] * 2
    assert all(line["speed/tokens_per_second"] > 0 and line["speed/memory_gib"] > 0 for line in train)
    checkpoint = root / "whole" / "checkpoints" / "transfer" / "step-00000004"
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) == 2
    sizes = {}
    for shard in shards:
        with safe_open(str(shard), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                sizes.setdefault(name, []).append(opened.get_slice(name).get_shape()[:1])
    assert sizes["model.layers.0.self_attn.student.mix_H"] == [[2], [2]]
    assert sizes["exp_avg_sq/model.layers.0.self_attn.student.query_map.weight"] == [[2], [2]]


def test_resumed_by_one_process(base: list[str], single: Path, two: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = two
    stages.linearize(load_recipe("demo", [*base, *STEPS, f"run.dir={root / 'half-1'}"]))
    assert_same_run(single, root / "half-1")
    assert "lora: continuing from step 2 of 4" in (root / "half-1" / "metrics.jsonl").read_text()


def test_resumed_by_three_processes(
    base: list[str],
    single: Path,
    two: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, _ = two
    continued = {"do": "linearize", "overrides": [*base, *STEPS, f"run.dir={root / 'half-3'}"]}
    from_one = {"do": "linearize", "overrides": [*base, *STEPS, f"run.dir={tmp_path / 'from-one'}"]}
    with monkeypatch.context() as torchrun:  # what it sets for a job of one process
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
            torchrun.setenv(name, value)
        assert stopped(load_recipe("demo", from_one["overrides"])) == "stopped"
    assert run(3, [continued, from_one], tmp_path / "out")[2] == ["done", "done"]
    assert_same_run(single, root / "half-3")
    assert_same_run(single, tmp_path / "from-one")


def test_the_frozen_base_is_gathered_and_nothing_of_it_is_reduced(two: tuple[Path, list[dict[str, Any]]]) -> None:
    _, reports = two
    for report in reports:
        found = report["collectives"]
        assert found["sharded"]
        assert found["student parameters whole"]
        for stage in ("transfer", "lora"):
            kinds = found[stage]
            assert kinds, "FSDP gathers weights"
            assert all("gather" in kind for kind in kinds), kinds


def test_a_nan_on_one_process_stops_all(two: tuple[Path, list[dict[str, Any]]]) -> None:
    _, reports = two
    for report in reports:
        assert "NonFiniteLoss" in report["poisoned"]
        assert "layer 1" in report["poisoned"]


def test_impossible_settings_are_refused_by_all(two: tuple[Path, list[dict[str, Any]]]) -> None:
    _, reports = two
    for report in reports:
        assert "parallel.node_size=3 does not divide the 2 processes" in report["uneven"]
        assert "parallel.shard=none" in report["quantized"]
        assert "parallel.cpu_offload=true needs GPUs" in report["offloaded"]


def test_a_killed_process_is_named_and_torchrun_resumes(base: list[str], single: Path, tmp_path: Path) -> None:
    job = {
        "do": "linearize",
        "overrides": [*base, *STEPS, "parallel.timeout_seconds=60", f"run.dir={tmp_path / 'run'}"],
    }
    run_with_a_kill(job, tmp_path / "out", tmp_path / "run", 5)
    assert_same_run(single, tmp_path / "run")
    assert any(
        "continuing from step" in line["text"] for line in read_metrics(tmp_path / "run") if line["kind"] == "info"
    )


def require_a_share(found: dict[str, float]) -> None:
    """Nothing near the whole model; the budget is a share, one layer, and 200 MB: half of those, so that it can
    fail."""
    assert found["whole"] > 250e6
    assert found["shards"] < 0.55 * found["whole"]
    assert found["added"] < found["shards"] + found["layer"] + 50e6, found


def test_loading_reads_no_more_than_a_share(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for report in two[1]:
        require_a_share(report["loading"])


def test_loading_several_files_and_what_does_not_fit_them(
    base: list[str], tmp_path: Path, large_model: dict[str, Path]
) -> None:
    jobs = [
        {"do": "loading", "overrides": [*base, f"model.path={large_model['indexed']}", f"run.dir={tmp_path / 'r0'}"]}
    ]
    save_tiny_model(tmp_path / "model", seed=0)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "empty" / "config.json")
    jobs += [
        {"do": "transfer", "overrides": [*base, f"model.path={tmp_path / name}", f"run.dir={tmp_path / 'run' / name}"]}
        for name in ("model", "empty")
    ]
    for loaded, changed, empty in run(2, jobs, tmp_path / "out"):
        require_a_share(loaded)
        assert "gate_proj" in changed
        assert "(80, 32)" in changed
        assert "no safetensors files" in empty


def test_one_process_needs_no_group() -> None:
    assert (distributed.size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.all_sum([1.0, float("inf")]) == [1.0, float("inf")]
    assert distributed.share([3, 4, 5]) == [3, 4, 5]
    assert distributed.from_main(lambda: 7) == 7
    assert distributed.first_of("a") == "a"


def test_processes_without_a_rank_and_nccl_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from trenchcoat.config import ParallelConfig

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(UserError, match="RANK is not: start the processes with torchrun"),
        distributed.joined(ParallelConfig(), "cpu"),
    ):
        pass
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="nccl needs GPUs"), distributed.joined(ParallelConfig(backend="nccl"), "cpu"):
        pass

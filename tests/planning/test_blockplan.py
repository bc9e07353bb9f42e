"""Planning blockwise transfer: pass lengths, block sizes, ways to run it, the command and its table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trenchcoat.cli import app as cli
from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.config.units import GIB, parse_tokens, tera
from trenchcoat.models.shapes import find_config, shapes_of
from trenchcoat.planning.blocks.passes import MARGIN, PassChoice, Place, Streamed, choose_pass, held_bytes
from trenchcoat.planning.blocks.size import (
    WEIGHTS_SHARE,
    BlockSize,
    block_bytes,
    choose_block_size,
    layer_bytes,
    measure_block,
)
from trenchcoat.planning.blocks.ways import (
    JOINT,
    PARALLEL,
    PIPELINE,
    STREAMING,
    BlocksPlan,
    BlockWay,
    plan_blocks,
    validation_tokens,
)
from trenchcoat.planning.footprint import Layout, StepSizes, footprint
from trenchcoat.planning.plan import HOST_LINK, Machine, with_reserve
from trenchcoat.planning.report import notes_on_blocks

LARGEST = load_recipe("lolcats_llama3_1_405b_blocks")


@pytest.fixture(scope="module")
def step() -> StepSizes:
    assert LARGEST.transfer is not None
    return StepSizes(shapes_of(find_config(LARGEST.model.path)), LARGEST.student, LARGEST.transfer, 1024)


def _chosen_size(step: StepSizes, gpu: float | None, host: float, size: int | None = None) -> BlockSize:
    """``gpu`` and ``host`` in GiB."""
    gpu_memory = None if gpu is None else gpu * GIB
    return choose_block_size(step, gpu_memory=gpu_memory, host_memory=host * GIB, size=size)


def _plan(name: str, *overrides: str, tokens: float | None = None, **machine: Any) -> BlocksPlan:
    return plan_blocks(load_recipe(name, overrides), Machine(**machine), tokens)


def _way(plan: BlocksPlan, name: str, gpus: int = 1) -> BlockWay:
    return next(way for way in plan.of(gpus) if way.name.startswith(name))


# Numbers of tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("all", "all"),
        (" Auto ", "auto"),
        ("1M", 10**6),
        ("250000", 250000),
        ("2.5m", 2500000),
        ("1G", 10**9),
        ("8k", 8000),
    ],
)
def test_numbers_of_tokens(text: str, tokens: int | str) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "1.5", "1MB", "1M/s", "1.2.3", "nan", "inf"])
def test_an_invalid_number_of_tokens_is_refused_when_the_recipe_is_read(text: str) -> None:
    with pytest.raises(UserError, match=r"blocks\.pass_tokens must be `all`, `auto` or a number of tokens"):
        parse_tokens(text)
    with pytest.raises(UserError, match=r"blocks\.pass_tokens"):
        load_recipe("demo", [f"blocks.pass_tokens='{text}'"])


# Passes

SMALL = Streamed(
    tokens=9_600, distinct=4_800, validation=300, step_tokens=100, bytes_a_token=10.0, weights=50_000.0, blocks=4,
    memory=40_000.0, disk=1e9, read=1000.0, write=500.0, compute=0.05,
)  # fmt: skip


def _walked(run: Streamed, choice: PassChoice) -> tuple[float, float, float, float]:
    """(seconds, weight bytes, states read, states written) from simulating the passes and blocks one by one."""
    seconds = weights = read = written = 0.0
    left = run.tokens
    while left > 0:
        tokens = min(left, choice.pass_tokens)
        left -= tokens
        for number in range(run.blocks):
            block = run.weights / run.blocks
            following = block if number < run.blocks - 1 else 0.0
            inputs = (tokens + run.validation) * run.bytes_a_token if choice.hidden == "disk" else 0.0
            outputs = (
                (min(tokens, run.distinct) + run.validation) * run.bytes_a_token if choice.hidden == "disk" else 0.0
            )
            disk = following / run.read + (inputs / run.read + outputs / run.write) / run.nodes
            computing = (tokens + run.validation) * (run.compute or 0.0) / run.blocks
            seconds += max(disk, computing) + (0.0 if run.copy is None else block / run.copy)
            seconds += block / run.read if number == 0 else 0.0
            weights, read, written = weights + block, read + inputs, written + outputs
    return seconds, weights, read, written


@pytest.mark.parametrize("hidden", ["memory", "disk"])
@pytest.mark.parametrize("pass_tokens", ["auto", "all", "700", "1000", "6000"])
@pytest.mark.parametrize("changes", [{}, {"copy": 2e4}, {"nodes": 3}, {"compute": 0.2}, {"blocks": 1, "validation": 0}])
def test_the_sums_equal_a_simulation_of_the_passes(hidden: Place, pass_tokens: str, changes: dict[str, Any]) -> None:
    run = replace(SMALL, memory=1e9 if pass_tokens != "auto" else 40_000.0, **changes)
    choice = choose_pass(run, pass_tokens=pass_tokens, hidden=hidden)
    seconds, weights, read, written = _walked(run, choice)
    assert choice.seconds == pytest.approx(seconds)
    assert (choice.weights_read, choice.states_read, choice.states_written) == pytest.approx((weights, read, written))
    assert choice.pass_tokens % run.step_tokens == 0
    assert choice.passes == math.ceil(run.tokens / choice.pass_tokens)


@pytest.mark.parametrize("memory", [12_000.0, 40_000.0, 90_000.0, 1e9])
@pytest.mark.parametrize("disk", [0.0, 20_000.0, 1e9])
@pytest.mark.parametrize("speed", [(1000.0, 500.0), (100.0, 100.0), (1e6, 1e6)])
@pytest.mark.parametrize("compute", [None, 0.001, 0.05, 2.0])
def test_auto_is_the_fastest_that_fits(
    memory: float, disk: float, speed: tuple[float, float], compute: float | None
) -> None:
    run = replace(SMALL, memory=memory, disk=disk, read=speed[0], write=speed[1], compute=compute)
    chosen = choose_pass(run)
    room = {"memory": memory, "disk": disk}
    everything = [
        choose_pass(run, pass_tokens=str(steps * run.step_tokens), hidden=place)  # type: ignore[arg-type]
        for steps in range(1, run.steps + 1)
        for place in room
        if held_bytes(run, steps) <= room[place]
    ]
    assert chosen.held <= room[chosen.hidden]
    quickest = min(choice.seconds for choice in everything)
    # passes have equal length, which needs no extra pass; the last one may be shorter
    assert chosen.seconds <= quickest * (1 + MARGIN) * 1.001
    in_memory = [choice.seconds for choice in everything if choice.hidden == "memory"]
    if chosen.hidden == "disk" and in_memory:
        assert min(in_memory) > chosen.seconds * (1 + MARGIN)


def test_more_memory_means_fewer_passes_and_never_more_time() -> None:
    choices = [choose_pass(replace(SMALL, memory=m * 1000.0, disk=0.0)) for m in range(9, 120)]
    for less, more in zip(choices, choices[1:], strict=False):
        assert more.passes <= less.passes
        assert more.seconds <= less.seconds
        assert more.weights_read <= less.weights_read
    assert choices[-1].passes == 1
    assert choices[0].passes > 40


def test_a_row_of_several_epochs_is_held_once() -> None:
    assert held_bytes(SMALL, SMALL.steps) == 2 * 10 * (4_800 + 300)
    assert held_bytes(SMALL, 1) == 2 * 10 * (100 + 300)
    assert held_bytes(replace(SMALL, nodes=2), 1) == 10 * (100 + 300)


def test_the_choice_is_explained_with_its_figures() -> None:
    why = choose_pass(SMALL, hidden="auto").why
    assert "passes of" in why
    assert "the alternative: " in why
    only = choose_pass(replace(SMALL, disk=0.0)).why
    assert "on disk 0.008 MB would be needed and 0 MB is free" in only
    assert "set by blocks.pass_tokens and blocks.hidden" in choose_pass(SMALL, pass_tokens="all", hidden="disk").why
    unknown = choose_pass(replace(SMALL, compute=None))
    assert unknown.compute_seconds is None
    assert "an unknown time of computing" in unknown.why
    assert choose_pass(SMALL, pass_tokens="1").pass_tokens == 100  # at least one step
    assert choose_pass(replace(SMALL, memory=1e9), pass_tokens="1G").passes == 1


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({"memory": 7_999.0, "disk": 0.0}, {}, r"100 training and 300 validation tokens take 0.008 MB as inputs and"),
        ({"memory": 7_999.0, "disk": 0.0}, {}, "0.008 MB in memory and 0 MB on disk. To fix it, take fewer"),
        ({}, {"hidden": "memory", "pass_tokens": "all"}, "lower blocks.pass_tokens, .* or set blocks.hidden=disk"),
        ({"disk": 5.0}, {"hidden": "disk"}, "point blocks.hidden_dir at a larger disk"),
        ({"disk": 5.0, "nodes": 2}, {"hidden": "disk"}, "on disk of each node. To fix it"),
        ({"memory": -5.0, "disk": 0.0}, {}, "0 MB in memory"),
    ],
)
def test_passes_that_do_not_fit_are_refused(changes: dict[str, Any], asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_pass(replace(SMALL, **changes), **asked)


# Blocks


def test_a_block_is_its_weights_one_layers_activations_and_its_students(step: StepSizes) -> None:
    sizes = [block_bytes(step, k) for k in (1, 2, 9)]
    student = 2 * 128 * 128 * 64 + 128  # a query and a key map for each head, and the mixes
    a_layer = layer_bytes(step.shapes) + (4 + 4 + 8 + 4) * student
    assert sizes[1] - sizes[0] == pytest.approx(a_layer)
    assert sizes[2] - sizes[0] == pytest.approx(8 * a_layer)
    alone = replace(step.shapes, layers=1, embedding_parameters=0, head_parameters=0, other_parameters=0)
    single = footprint(replace(step, shapes=alone), Layout())
    assert sizes[0] == pytest.approx(single.total + 4 * student)


def test_the_largest_blocks_that_fit_are_chosen(step: StepSizes) -> None:
    def chosen(gpu: float | None, host: float, size: int | None = None) -> tuple[int, int]:
        found = _chosen_size(step, gpu, host, size)
        assert found.blocks == math.ceil(126 / found.layers)
        assert found.host_bytes <= host * GIB
        if gpu is not None:
            assert with_reserve(found.device_bytes) <= gpu * GIB
        return found.layers, found.blocks

    assert chosen(80, 1000) == (12, 11)
    assert chosen(80, 1000, size=9) == (9, 14)
    assert chosen(80, 115.2) == (9, 14)  # half of the host's memory holds the next nine layers
    assert chosen(80, 10) == (1, 126)  # the minimum, although it needs more than half
    assert chosen(1000, 2000) == (126, 1)
    assert chosen(None, 2000) == (126, 1)  # with a single block nothing is prefetched
    layers = [chosen(gpu, 2000)[0] for gpu in (10, 16, 24, 40, 48, 80, 141, 192)]
    assert layers == sorted(layers)
    host = chosen(None, 64)[0]
    assert LARGEST.transfer is not None
    block = measure_block(step, host, gpu=False)
    assert block.host_bytes == block.device_bytes + host * layer_bytes(step.shapes)  # this block and the next
    assert block.host_bytes <= WEIGHTS_SHARE * 64 * GIB


@pytest.mark.parametrize(
    ("gpu", "host", "size", "said"),
    [
        (5.0, 100.0, None, "a block of one layer needs 6.5 GiB on the GPU, .* 5.0 GiB is available: lower transfer"),
        (80.0, 100.0, 14, r"blocks.size=14 needs 84.\d GiB on the GPU, .* take blocks of fewer layers"),
        (80.0, 40.0, 9, "blocks.size=9 needs 53.4 GiB of host memory per process, .* 40.0 GiB is available"),
        (80.0, 4.0, None, "a block of one layer needs 5.9 GiB of host memory per process, .*: free memory"),
        (
            None,
            8.0,
            None,
            "a block of one layer needs 12.5 GiB of host memory per process, .*: lower transfer.batch_size",
        ),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    step: StepSizes, gpu: float | None, host: float, size: int | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        _chosen_size(step, gpu, host, size)


# Ways


def test_the_known_figures_of_405b() -> None:
    """20 million tokens, all distinct: 655 GB per boundary, 9.2 TB in 14 blocks, over 80 TB layer by layer."""
    plan = _plan("lolcats_llama3_1_405b_blocks", "transfer.epochs=1", "transfer.eval_batches=1", tokens=20e6)
    assert plan.boundary_bytes == 20e6 * 16384 * 2
    assert plan.boundary_bytes == pytest.approx(655e9, rel=0.001)
    parallel = _way(plan, PARALLEL)
    assert (parallel.blocks, parallel.layers) == (14, 9)
    assert parallel.disk_bytes == pytest.approx(9.2e12, rel=0.005)
    disk = _way(plan, "streaming, disk")
    assert disk.passes == 1
    assert disk.disk_bytes == pytest.approx(2 * 655e9, rel=0.001)
    layers = _plan("lolcats_llama3_1_405b_blocks", "transfer.epochs=1", "blocks.size=1", tokens=20e6)
    assert _way(layers, PARALLEL).disk_bytes > 80e12
    # two epochs of ten million share their rows: half as much
    twice = _plan("lolcats_llama3_1_405b_blocks", "transfer.eval_batches=1", tokens=10e6)
    assert twice.tokens == plan.tokens
    assert _way(twice, PARALLEL).disk_bytes == pytest.approx(4.6e12, rel=0.005)


def test_passes_of_a_million_tokens_read_405b_twenty_times_in_an_hour_and_a_half() -> None:
    settings = ["blocks.pass_tokens=1000000", "blocks.hidden=memory", "transfer.eval_batches=1"]
    way = _plan("lolcats_llama3_1_405b_blocks", *settings, bandwidth=3e9, host_memory=256 * GIB, tokens=10e6).chosen
    assert way.passes == 20 + 1  # whole optimizer steps of 8192 tokens, below a million
    assert way.read_bytes / way.passes == pytest.approx(0.81e12, rel=0.01)
    assert way.disk_hours / way.passes * 20 == pytest.approx(1.5, rel=0.01)
    held = way.host_bytes - 9 * 2 * 3_187_703_808
    assert held == pytest.approx(2 * 33e9, rel=0.02)
    assert way.limit == "compute"
    # "about 14 hours" are those of one H100 at a third of its peak; at 40 % they are 11.5
    assert way.compute_hours == pytest.approx(11.5, rel=0.01)
    slower = _plan("lolcats_llama3_1_405b_blocks", *settings, tokens=10e6, mfu=0.33, host_memory=256 * GIB).chosen
    assert slower.compute_hours == pytest.approx(14, rel=0.01)
    waited = way.passes * 808e9 * (1 / HOST_LINK + 1 / 14 / 3e9)  # copies to the GPU, and the first block of each pass
    assert way.hours == pytest.approx(way.compute_hours + waited / 3600, rel=0.01)


def test_a_slow_disk_becomes_the_limit_and_changes_the_choice() -> None:
    quick = _plan("lolcats_llama3_1_405b_blocks", gpus=8, host_memory=768 * GIB)
    slow = _plan("lolcats_llama3_1_405b_blocks", gpus=8, host_memory=768 * GIB, bandwidth=0.2e9)
    assert (quick.chosen.name, quick.chosen.limit) == ("streaming, disk", "compute")
    assert (slow.chosen.name, slow.chosen.limit) == ("streaming, memory", "disk")
    assert slow.chosen.hours > slow.chosen.compute_hours
    for way in slow.of(8):
        before = _way(quick, way.name, 8)
        assert way.disk_hours >= before.disk_hours
        assert way.hours >= before.hours


def test_ways_follow_the_number_of_gpus() -> None:
    plan = _plan("lolcats_llama3_1_405b_blocks", gpus=16)
    assert sorted({way.gpus for way in plan.ways}) == [1, 2, 4, 8, 16]
    assert [way.kind for way in plan.of(16)] == [JOINT, STREAMING, STREAMING, PIPELINE, PARALLEL]
    assert [way.kind for way in plan.of(1)] == [JOINT, STREAMING, STREAMING, PARALLEL]
    for kind in ("streaming, disk", PARALLEL):
        hours = [_way(plan, kind, gpus).hours for gpus in (1, 2, 4, 8)]
        assert hours == sorted(hours, reverse=True)
    assert _way(plan, "streaming, disk", 8).gpu_hours == pytest.approx(
        _way(plan, "streaming, disk").gpu_hours, rel=0.02
    )
    assert [gpus for gpus in (2, 4, 8, 16) if _way(plan, PIPELINE, gpus).fits] == [16]
    pipeline = _way(plan, PIPELINE, 16)
    assert (pipeline.layers, pipeline.blocks) == (9, 14)  # 14 of the 16 have a block
    assert (pipeline.disk_bytes, pipeline.written_bytes) == (0.0, 0.0)
    assert not _way(plan, JOINT, 8).name.startswith("joint: sharded over all")
    assert not _way(plan, JOINT, 1).fits
    assert [way.asked for way in plan.of(16)].count(True) == 1
    assert plan.best(16, PARALLEL) is _way(plan, PARALLEL, 16)
    assert _plan("lolcats_llama3_1_405b_blocks", gpus=6).of(6)
    # eight micro-batches per step keep eight of sixteen processes busy
    assert _way(plan, "streaming, disk", 16).compute_hours == _way(plan, "streaming, disk", 8).compute_hours


def test_the_way_that_the_recipe_sets_is_marked() -> None:
    def chosen(*overrides: str, gpus: int = 1, **machine: Any) -> str:
        return _plan("lolcats_llama3_1_405b_blocks", *overrides, gpus=gpus, **machine).chosen.name

    assert chosen() == "streaming, disk"
    assert chosen("blocks.hidden=memory") == "streaming, memory"
    assert chosen("blocks.pass_tokens=500k") == "streaming, as set"
    assert chosen("blocks.pass_tokens=all") == "streaming, disk"
    assert chosen("blocks.ranks=pipeline") == "streaming, disk"  # of one process
    assert chosen("blocks.ranks=pipeline", gpus=16) == "pipeline"
    assert chosen(host_memory=2048 * GIB) == "streaming, memory"


def test_the_limiting_resource_is_named() -> None:
    small = _plan("lolcats_llama3_1_405b_blocks", gpu_memory=48 * GIB)
    assert {way.limit for way in small.ways} == {"GPU memory"}
    assert not any(way.fits for way in small.ways)
    assert "blocks.size=9 needs 54.3 GiB on the GPU" in small.chosen.why
    assert small.best(1) is None
    tight = _plan("lolcats_llama3_1_405b_blocks", host_memory=32 * GIB)
    assert _way(tight, "streaming, disk").limit == "host memory"
    disk = _plan("lolcats_llama3_1_405b_blocks", disk=1.2e12)
    assert _way(disk, "streaming, disk").passes > 1  # shorter passes, to fit
    assert (_way(disk, PARALLEL).fits, _way(disk, PARALLEL).limit) == (False, "disk space")
    full = _plan("lolcats_llama3_1_405b_blocks", disk=0.83e12)
    assert (_way(full, "streaming, disk").limit, _way(full, "streaming, disk").passes) == ("disk space", 0)
    as_set = _plan("lolcats_llama3_1_405b_blocks", "blocks.hidden=memory", "blocks.pass_tokens=all")
    assert (as_set.chosen.name, as_set.chosen.limit) == ("streaming, as set", "host memory")
    assert "lower blocks.pass_tokens" in as_set.chosen.why
    assert any("lower blocks.pass_tokens" in note for note in notes_on_blocks(LARGEST, as_set))


def test_the_notes_name_what_is_faster_and_what_does_not_divide() -> None:
    def notes(*overrides: str, **machine: Any) -> str:
        recipe = load_recipe("lolcats_llama3_1_405b_blocks", overrides)
        return "\n".join(notes_on_blocks(recipe, plan_blocks(recipe, Machine(**machine))))

    said = notes(gpus=16)
    assert "faster: pipeline" in said
    assert "transfer.accumulation=8 micro-batches per step do not divide evenly among 16 processes" in said
    assert "the teacher's pass on the GPUs of one node" in said
    assert "pass the free disk space as --disk" in said
    assert "--disk" not in notes(disk=20e12)
    assert "not with model.quantize=nf4" in notes("model.quantize=nf4")
    assert "parallel: 4.63 TB of hidden states, 1.17 TB free" in notes(disk=2e12)


def test_tokens_of_training_and_of_validation(tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("x" * 4_000_000)
    local = _plan("lolcats_llama3_1_405b_blocks", f"data.path={text}")
    assert (local.tokens, local.distinct) == (2e6, 1e6)
    assert local.validation == math.ceil(0.05 / 0.95 * 1e6 / 1024) * 1024
    assert validation_tokens(LARGEST, 10e6) == math.ceil(500 * 10e6 / 51760 / 1024) * 1024
    assert validation_tokens(load_recipe("lolcats_llama3_1_405b_blocks", ["transfer.eval_batches=3"]), 10e6) == 3 * 1024
    other = load_recipe("lolcats_llama3_1_405b_blocks", ["data.path=a/b", "data.validation_rows=7"])
    assert validation_tokens(other, 10e6) == 7 * 1024
    steps = _plan("lolcats_llama3_1_405b_blocks", "data.path=a/b", "transfer.max_steps=10")
    assert (steps.tokens, steps.distinct) == (10 * 8 * 1024, 10 * 8 * 1024)
    with pytest.raises(UserError, match="the size of a/b is unknown: give the tokens of one pass as --tokens"):
        _plan("lolcats_llama3_1_405b_blocks", "data.path=a/b")
    own = _plan("lolcats_llama3_1_405b_blocks", f"blocks.epochs=[{','.join(['1'] * 7 + ['3'] * 7)}]")
    assert own.tokens == 20e6
    with pytest.raises(UserError, match=r"blocks\.epochs has 2 numbers for 14 blocks of 9 layers"):
        _plan("lolcats_llama3_1_405b_blocks", "blocks.epochs=[1,2]")
    with pytest.raises(UserError, match="transfer=null"):
        _plan("lolcats_llama3_1_405b_blocks", "transfer=null")
    with pytest.raises(UserError, match="a block of one layer needs"):
        _plan("lolcats_llama3_1_405b", gpu_memory=4 * GIB)


def test_the_planned_pass_fills_the_memory() -> None:
    plan = _plan("lolcats_llama3_1_70b_blocks", host_memory=64 * GIB)
    assert plan.shapes.layers == 80
    way = _way(plan, "streaming, memory")
    free = 0.8 * 64 * GIB - 5 * layer_bytes(plan.shapes)
    assert way.host_bytes <= 0.8 * 64 * GIB
    rows = way.pass_tokens or 0
    step = 8 * 2048
    assert 2 * 2 * 8192 * (rows + plan.validation) <= free
    assert 2 * 2 * 8192 * (rows * (way.passes / (way.passes - 1)) + step + plan.validation) > free  # not one fewer


# The recipes and the command


def test_the_block_recipes_differ_from_the_joint_ones_only_in_the_blocks() -> None:
    joint = load_recipe("lolcats_llama3_1_405b")
    assert LARGEST.transfer is not None
    assert joint.transfer is not None
    assert LARGEST.transfer == replace(joint.transfer, accumulation=8)
    assert (LARGEST.blocks.size, LARGEST.data.seq_len) == (9, 1024)
    same = {"transfer": joint.transfer, "blocks": joint.blocks, "run": joint.run}
    assert replace(LARGEST, **same) == joint
    large, other = load_recipe("lolcats_llama3_1_70b_blocks"), load_recipe("lolcats_llama3_1_70b")
    assert (large.blocks.size, large.data.seq_len) == (5, 2048)
    assert replace(large, data=other.data, blocks=other.blocks, run=other.run) == other
    assert large.data == replace(other.data, seq_len=2048)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "plan.json"
    words = ["blocks", "plan", "lolcats_llama3_1_70b_blocks", "--gpus", "2", "--host-memory", "64GB", "--disk", "1TB"]
    rates = ["--bandwidth", "3GB/s", "--write-bandwidth", "1GB/s", "--tokens", "5M", "blocks.pass_tokens=1M"]
    assert cli.main([*words, *rates, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("10,000,000 tokens", "reads 3 and writes 1 GB/s", "streaming, as set *", "GPU-", "all of it:"):
        assert word in shown, word
    document = json.loads(out.read_text())
    assert document["chosen"] == "streaming, as set"
    way = next(way for way in document["ways"] if way["asked"] and way["gpus"] == 2)
    assert way["pass_tokens"] == 1_000_000 // 16384 * 16384
    assert way["place"] == "memory"
    assert document["notes"]


def test_plan_shows_joint_and_blocks_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "plan.json"
    assert cli.main(["plan", "lolcats_llama3_1_405b", "--gpus", "8", "--details", "--json", str(out)]) == 0
    shown = capsys.readouterr().out.split("all layers at once, or block by block")[1]
    for word in ("joint: FSDP, shards in host memory", "streaming, memory *", "pipeline", "parallel"):
        assert word in shown, word
    assert "streaming, disk" not in shown
    assert len(json.loads(out.read_text())["blocks"]["ways"]) == 5
    assert cli.main(["plan", "lolcats_llama3_1_405b", "--gpus", "16", "--details", "blocks.ranks=pipeline"]) == 0
    shown = capsys.readouterr().out
    assert "pipeline *" in shown
    assert "streaming, " in shown
    assert cli.main(["plan", "lolcats_llama3_1_8b", "transfer=null"]) == 0
    assert "block by block" not in capsys.readouterr().out
    assert cli.main(["plan", "lolcats_llama3_1_8b", "data.path=a/b", "--details"]) == 0
    assert "block by block: the size of a/b is unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["blocks"], 2, "required: ACTION"),
        (["blocks", "plan"], 2, "required: MODEL_OR_RECIPE"),
        (["blocks", "plan", "demo", "--host-memory", "lots"], 2, "--host-memory must be a size"),
        (["blocks", "plan", "demo", "--write-bandwidth", "0"], 2, "--write-bandwidth must be a size"),
        (["blocks", "plan", "demo", "blocks.sise=3"], 2, "did you mean blocks.size"),
        (["blocks", "plan", "demo", "blocks.pass_tokens=few"], 2, "blocks.pass_tokens must be"),
        (["blocks", "plan", "lolcats_llama3_1_8b", "transfer=null"], 1, "there are no blocks to plan"),
    ],
)
def test_wrong_usage(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == code
    assert said in capsys.readouterr().err


DOCUMENT = Path(__file__).parents[2] / "docs" / "PLAN.md"
SHOWN = [
    ("lolcats_llama3_1_8b", 1),
    ("lolcats_llama3_1_70b_blocks", 1),
    ("lolcats_llama3_1_70b_blocks", 8),
    ("lolcats_llama3_1_405b_blocks", 1),
    ("lolcats_llama3_1_405b_blocks", 8),
    ("lolcats_llama3_1_405b_blocks", 16),
]


def _cells(way: BlockWay) -> list[str]:
    hours = [f"{value:.2g}" for value in (way.compute_hours, way.disk_hours, way.hours, way.gpu_hours)]
    return [
        f"{way.name} *" if way.asked else way.name,
        str(way.layers),
        f"{way.device_bytes / GIB:.1f}",
        tera(way.host_bytes),
        tera(way.disk_bytes) if way.disk_bytes else "-",
        tera(way.read_bytes),
        str(way.passes),
        *hours,
        way.limit if way.fits else f"**{way.limit}**",
    ]


def block_rows() -> list[str]:
    """The table of docs/PLAN.md."""
    names = [
        "recipe",
        "GPUs",
        "way",
        "layers",
        "GPU",
        "host",
        "on disk",
        "read",
        "passes",
        "computing",
        "disk",
        "hours",
    ]
    names += ["GPU-hours", "limit"]
    rows = [f"| {' | '.join(names)} |", f"|---|---:|---|{'---:|' * 10}---|"]
    for name, gpus in SHOWN:
        for i, way in enumerate(_plan(name, gpus=gpus).of(gpus)):
            first = [f"`{name}`", str(gpus)] if i == 0 else ["", ""]
            rows.append(f"| {' | '.join([*first, *_cells(way)])} |")
    return rows


def test_the_documented_blocks_table_is_the_planned_one() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.split("<!-- blocks-table -->\n")[1].split("<!-- /blocks-table -->")[0].splitlines() == block_rows()

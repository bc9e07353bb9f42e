"""A pipeline with a range of layers per process gives the students of the joint run (torchrun with gloo)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from blocks_kit import lines
from conftest import save_tiny_model
from ranks_kit import run, run_with_a_kill
from trenchcoat.config import Recipe, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.blocks.folder import BlockFolder, LayerBlock, cut, divide, found_blocks
from trenchcoat.conversion.blocks.pipeline import FINISHED, Position, schedule
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder
from trenchcoat.runtime.runlog import read_metrics

LAYERS = 5
EPOCHS = ["blocks.size=2", "blocks.epochs=[0.5,1,0.25]", "transfer.schedule=constant"]
FLAT = [
    "blocks.size=1", "transfer.schedule=constant", "transfer.early_stopping=1",
    "transfer.early_stopping_threshold=0.3", "transfer.eval_every=1",
]  # fmt: skip
FROM_TEXT = [
    "student.feature_map.init=landmarks", "student.keep_softmax=[0]", "student.keep=[3.1]", "data.packing=contiguous",
]  # fmt: skip
PIPELINE = "blocks.ranks=pipeline"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> list[str]:
    """Overrides of every run here: one epoch, per-layer schedule and clipping, random weights."""
    model = save_tiny_model(tmp_path_factory.mktemp("five-layers"), seed=0, num_hidden_layers=LAYERS)
    return [
        f"model.path={model}", "model.device=cpu", f"data.path={text_file}", "data.format=text",
        "data.seq_len=48", "data.validation_rows=10", f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "data.max_rows=14", "student.window=8", "student.feature_map.feature_dim=8", "student.keep=none",
        "student.feature_map.init=kaiming", "transfer.batch_size=2", "transfer.accumulation=3",
        "transfer.max_steps=null", "transfer.epochs=1", "transfer.eval_every=4", "transfer.eval_batches=2",
        "transfer.save_every=2", "transfer.warmup_steps=0", "transfer.schedule=plateau",
        "transfer.plateau_patience=0", "transfer.lr=0.05", "transfer.early_stopping=null", "eval.rows=4",
        "eval.batch_size=2", "eval.seq_len=40", "eval.length_factors=[1]", "run.threads=1", "run.progress=off",
    ]  # fmt: skip


def recipe(base: list[str], folder: Path, *more: str) -> Recipe:
    return load_recipe("demo", [*base, f"run.dir={folder}", *more])


@pytest.fixture(scope="module")
def single(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference runs in one process: joint, joint with initial values from text, and streams that end per block."""
    root = tmp_path_factory.mktemp("single")
    stages.transfer(recipe(base, root / "whole"))
    stages.transfer(recipe(base, root / "text", *FROM_TEXT))
    blockstages.run_blocks(recipe(base, root / "epochs", *EPOCHS))
    blockstages.run_blocks(recipe(base, root / "flat", *FLAT))
    return root


@pytest.fixture(scope="module")
def three(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """Three processes run the jobs in order; returns the folder and every process's report."""
    root = tmp_path_factory.mktemp("three")
    jobs: list[tuple[str, str, list[str]]] = [
        ("blocks", "whole", []),
        ("blocks_stopped", "stopped", []),
        ("blocks_behind", "stopped", []),
        ("blocks", "stopped", []),
        ("blocks", "text", FROM_TEXT),
        ("blocks", "epochs", EPOCHS),
        ("blocks", "flat", FLAT),
        ("blocks_poisoned", "poisoned", []),
        ("blocks", "few", ["blocks.size=3"]),
        ("blocks", "uneven", ["blocks.epochs=[1,1,2,2,2]"]),
    ]
    listed = [
        {"do": name, "overrides": [*base, PIPELINE, f"run.dir={root / folder}", *more]} for name, folder, more in jobs
    ]
    return root, run(3, listed, root / "out")


def require_same(found: Path, wanted: Path) -> None:
    """Bit for bit: weights and all per-layer numbers in the log."""
    weights, joint = RunFolder(found).weights(TRANSFER), RunFolder(wanted).weights(TRANSFER)
    assert weights.keys() == joint.keys()
    for name, tensor in joint.items():
        assert torch.equal(weights[name], tensor), name
    assert lines(found) == lines(wanted)
    assert len(lines(found)) > 3


def said(folder: Path) -> str:
    return "\n".join(line["text"] for line in read_metrics(folder) if line["kind"] == "info")


def test_three_processes_give_the_students_of_the_joint_run(single: Path, three: tuple[Path, list[list[Any]]]) -> None:
    root, reports = three
    assert [report[0] for report in reports] == ["done"] * 3
    require_same(root / "whole", single / "whole")
    assert "pipeline: 3 processes hold layers 0 to 0; 1 to 2; 3 to 4" in said(root / "whole")
    made = load_recipe("demo", [f"run.dir={root / 'whole'}"])
    assert found_blocks(made) == [LayerBlock(0, 0, 1), LayerBlock(1, 1, 3), LayerBlock(2, 3, 5)]
    results = [BlockFolder(made, block).result() for block in found_blocks(made)]
    whole = RunFolder(root / "whole").result(TRANSFER)
    assert whole is not None
    assert whole["seconds"] == max(one["seconds"] for one in results if one)


def test_it_is_scored_and_stitched_again_like_any_other(
    base: list[str], single: Path, three: tuple[Path, list[list[Any]]]
) -> None:
    root, _ = three
    found = blockstages.stitch_blocks(recipe(base, root / "whole")).results
    joint = stages.evaluate_run(
        recipe(base, single / "whole", "lora=null", "eval.baselines=false", "eval.decode_lengths=[]")
    )
    assert found is not None
    assert joint.results is not None
    for row, scores in found.rows.items():
        assert scores.all.sums == pytest.approx(joint.results.rows[row].all.sums, rel=1e-6), row
    state = blockstages.show_status(recipe(base, root / "whole")).shown[0].columns[2].cells
    assert list(state) == ["finished"] * 3


def test_a_stop_of_one_process_stops_all_at_one_step(single: Path, three: tuple[Path, list[list[Any]]]) -> None:
    """Then one process loses that step and repeats it, while the others pass states on."""
    root, reports = three
    for report in reports:
        steps = report[1]
        assert len(steps) == 3
        assert len({each[-1] for each in steps}) == 1, steps
        assert report[3] == "done"
    require_same(root / "stopped", single / "whole")
    last = int(reports[0][1][0][-1].removeprefix("step-"))
    before = int(reports[0][1][0][-2].removeprefix("step-"))
    assert 4 <= last <= 8, "the first process is a few micro-batches ahead of the last one"
    assert f"the processes are at: step {last}, step {last}, step {before}" in said(root / "stopped")


def test_initial_values_from_text_and_a_process_that_only_passes_on(
    single: Path, three: tuple[Path, list[list[Any]]]
) -> None:
    root, reports = three
    assert reports[2][4] == "done"
    require_same(root / "text", single / "text")
    assert not (root / "text" / "blocks" / "layers-000-000").exists()


@pytest.mark.parametrize(("name", "job"), [("epochs", 5), ("flat", 6)])
def test_processes_that_end_before_the_others_pass_on(
    name: str, job: int, single: Path, three: tuple[Path, list[list[Any]]]
) -> None:
    root, reports = three
    assert [report[job] for report in reports] == ["done"] * 3
    weights, streamed = (RunFolder(folder / name).weights(TRANSFER) for folder in (root, single))
    for key, tensor in streamed.items():
        assert torch.equal(weights[key], tensor), key
    made = load_recipe("demo", [f"run.dir={root / name}"])
    steps = [result["steps"] for block in found_blocks(made) if (result := BlockFolder(made, block).result())]
    assert len(steps) == 3
    if name == "epochs":
        assert steps == [6, 12, 3]


def test_a_nan_in_one_process_stops_all_naming_the_layer(three: tuple[Path, list[list[Any]]]) -> None:
    _, reports = three
    assert reports[1][7].startswith("NonFiniteLoss: transfer: the loss is not finite at step 0, first in layer 2")
    for rank in (0, 2):
        assert reports[rank][7].startswith("ProcessLost: process 1 of 3 failed (NonFiniteLoss: ")
        assert "first in layer 2" in reports[rank][7]


def test_invalid_divisions_are_refused(three: tuple[Path, list[list[Any]]]) -> None:
    for report in three[1]:
        assert "3 processes for 2 blocks: start at most 2" in report[8]
        assert "blocks.epochs gives blocks 1 to 2 [1.0, 2.0] epochs" in report[9]


def test_a_killed_process_is_named_and_the_run_continues(base: list[str], single: Path, tmp_path: Path) -> None:
    """The second of two processes dies midway; afterwards a different number of processes is refused."""
    folder = tmp_path / "run"
    job = {"do": "blocks", "overrides": [*base, PIPELINE, f"run.dir={folder}"]}
    run_with_a_kill(job, tmp_path / "out", folder / "blocks" / "layers-002-004", 6)
    require_same(folder, single / "whole")
    assert "pipeline: continuing" in said(folder)
    with pytest.raises(UserError, match="holds a block of layers 0 to 1, which does not match"):
        blockstages.run_blocks(recipe(base, folder))


def test_commands_that_refuse_a_pipeline(base: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs several processes: start them with torchrun"):
        blockstages.run_blocks(recipe(base, tmp_path / "run", PIPELINE))
    with pytest.raises(UserError, match=r"blocks\.ranks=pipeline only works with `blocks run`"):
        blockstages.collect_inputs(recipe(base, tmp_path / "run", PIPELINE))


def test_blocks_are_divided_by_layers() -> None:
    assert [(one.first, one.stop) for one in divide(cut(9, 2), 2)] == [(0, 4), (4, 9)]
    assert [(one.first, one.stop) for one in divide(cut(7, 1), 3)] == [(0, 2), (2, 4), (4, 7)]
    assert [one.number for one in divide(cut(126, 9), 14)] == list(range(14))
    for layers, size, processes in ((126, 1, 8), (32, 3, 4), (31, 5, 6), (5, 2, 3)):
        held = divide(cut(layers, size), processes)
        assert [one.first for one in held] == [0, *(one.stop for one in held[:-1])]
        assert held[-1].stop == layers
        sizes = [one.stop - one.first for one in held]
        assert max(sizes) - min(sizes) <= size


def test_the_order_continues_from_the_process_that_is_furthest_behind() -> None:
    """Evaluations are scheduled where any process needs one; those that all have done are skipped."""
    from trenchcoat.config import TransferConfig

    class Text:
        def __len__(self) -> int:
            return 4

        def validation_batches(self) -> int:
            return 3

    settings = [
        TransferConfig(epochs=epochs, max_steps=None, accumulation=2, eval_every=4, eval_batches=1)
        for epochs in (1.25, 3.0)
    ]
    text: Any = Text()

    def order(first: Position) -> list[tuple[int, int]]:
        return [tuple(item) for item in schedule(text, settings, first, start=False)]

    whole = order(Position(-1, False))
    assert whole == [
        (1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5), (1, 0), (2, 6), (2, 7), (1, 0), (2, 8), (2, 9),
        (2, 10), (2, 11), (1, 0),
    ]  # fmt: skip
    assert order(Position(4, False)) == whole[10:]
    assert order(Position(4, True)) == whole[11:]
    assert order(Position(6, True)) == []
    assert max(Position(6, True), Position(6, False), Position(-1, False)) == (6, True) < FINISHED

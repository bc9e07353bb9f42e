"""Selection of key/value groups: gates and retrieval against their definitions, the file, resuming, the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from ranks_kit import run
from tiny_families import FAMILIES, logits, tiny_model, tokens
from trenchcoat.cli.app import main
from trenchcoat.config import Recipe, SelectConfig, StudentConfig, UserError, dump_recipe
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.blocks.select import with_selection
from trenchcoat.conversion.selection import run as selection_run
from trenchcoat.conversion.selection.controls import spread_order
from trenchcoat.conversion.selection.frontier import Frontier
from trenchcoat.conversion.selection.gates import Gated, gate_gradients
from trenchcoat.conversion.selection.probe import Probe, copied, full_rows, method_named, observer_of
from trenchcoat.conversion.selection.registry import METHODS
from trenchcoat.conversion.selection.retrieval import retrieval
from trenchcoat.conversion.variants import open_variants
from trenchcoat.evaluation.selection import SELECTION_FILE, Selection, combined, ranking
from trenchcoat.models import softmax_rows
from trenchcoat.models.attach import attach_students, attention_through, detach_students, set_mode
from trenchcoat.models.families import attention_sites
from trenchcoat.runtime.runfolder import RunFolder
from trenchcoat.runtime.runlog import RunLog, SilentLog

NEAR = StudentConfig(name="window_sinks", window=4, sinks=2)


def probe_of(model: Any, **changes: Any) -> Probe:
    """Two rows of random tokens and two copies of 16 + 16."""
    settings: dict[str, Any] = {
        "model": model, "observe": observer_of(model), "near": NEAR, "whole": frozenset(), "text_NT": tokens(2, 32),
        "copy_NT": copied(tokens(2, 32, seed=1)), "cfg": SelectConfig(), "seed": 0, "log": SilentLog("."),
    }  # fmt: skip
    return Probe(**{**settings, **changes})


def gated_logits(model: Any, gates: dict[int, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    with attention_through(model, Gated(attention_sites(model), NEAR, gates)):
        return logits(model, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_go_from_the_model_to_window_and_sinks(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 30)
    sites = attention_sites(model)
    before = logits(model, ids)
    opened = gated_logits(model, {s.index: torch.ones(s.num_heads) for s in sites}, ids)
    torch.testing.assert_close(opened, before, rtol=1e-5, atol=1e-5)
    closed = gated_logits(model, {s.index: torch.zeros(s.num_heads) for s in sites}, ids)
    assert not closed.allclose(before, atol=1e-3)
    assert torch.equal(logits(model, ids), before)
    half = gated_logits(model, {0: torch.tensor([0.0, 0.0, 1.0, 1.0]), 1: torch.zeros(4)}, ids)
    for kept, gated in (((), closed), (("0.1",), half)):  # as a student with kept groups computes it
        attach_students(model, dataclasses.replace(NEAR, keep=kept))
        set_mode(model, "student")
        torch.testing.assert_close(gated, logits(model, ids), rtol=1e-5, atol=1e-5)
        detach_students(model)


@pytest.mark.parametrize("wanted", ["kl", "ce"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_scores_are_the_gradients_of_the_gates(family: str, wanted: Literal["kl", "ce"]) -> None:
    """Against finite differences, with the layers recomputed in the backward pass; the model is unchanged after it."""
    model = tiny_model(family).double()
    probe = probe_of(model, cfg=SelectConfig(gates=(0.3, 0.6), loss=wanted))
    before = logits(model, probe.text_NT)
    parts = gate_gradients(probe)
    assert torch.equal(logits(model, probe.text_NT), before)
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    for part, rows, first in (("text", probe.text_NT, 8), ("copy", probe.copy_NT, 16)):

        def loss(gate: float, group: int, step: float, rows: torch.Tensor = rows, first: int = first) -> float:
            gates = {s.index: torch.full((s.num_heads,), gate) for s in attention_sites(model)}
            gates[1][2 * group : 2 * group + 2] += step  # two query heads a group
            found = gated_logits(model, gates, rows)
            if wanted == "ce":
                return float(F.cross_entropy(found[:, first:-1].flatten(0, 1), rows[:, first + 1 :].flatten()))
            own, its = (x[:, first:].flatten(0, 1).log_softmax(-1) for x in (logits(model, rows), found))
            return float((own.exp() * (own - its)).sum(-1).mean())

        for group in (0, 1):
            steps = [(loss(g, group, 0.01) - loss(g, group, -0.01)) / 0.02 for g in (0.3, 0.6)]
            assert parts[part][1][group] == pytest.approx(-sum(steps) / 2, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_retrieval_is_the_weight_on_what_followed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, attn_implementation="eager")
    probe = probe_of(model)
    monkeypatch.setattr(softmax_rows, "WEIGHTS_AT_ONCE", 4 * 32 * 5)  # blocks of 5 queries
    found = retrieval(probe)["copy"]
    with torch.no_grad():
        maps = model(input_ids=probe.copy_NT, use_cache=False, output_attentions=True).attentions
    query = torch.arange(16, 31)
    for layer, map_bHTT in enumerate(maps):
        heads = map_bHTT[:, :, query, query - 15].mean((0, 2))
        assert found[layer] == pytest.approx([float(heads[:2].sum()), float(heads[2:].sum())], rel=1e-4, abs=1e-6)


def test_layers_that_keep_softmax_are_left_out() -> None:
    probe = probe_of(tiny_model(), whole=frozenset({0}))
    for name in METHODS:
        scores = combined(method_named(name)(probe))
        assert [len(row) for row in scores] == [0, 2], name
        assert all(entry.startswith("1.") for entry in ranking(scores))


def test_the_frontier_closes_nothing_with_no_group_and_everything_with_all() -> None:
    frontier = Frontier(probe_of(tiny_model(), text_NT=tokens(6, 32), copy_NT=copied(tokens(6, 32, seed=1))), 2)
    some, everything = frontier.losses(["0.1", "1.0"]), frontier.everything()
    assert everything["text"].count == 6 * (31 - 8)
    assert everything["copy"].count == 6 * 15
    assert some["text"].sums != everything["text"].sums
    assert frontier.total == 4
    point = frontier.point("gates", ["0.0", "0.1", "1.0", "1.1"])
    assert (point.groups, point.share) == (4, 1.0)
    assert {point.text, point.copy} <= {1.0, None}  # of a random model the gap may be within its noise


def test_combining_and_ranking() -> None:
    parts = {"text": [[3.0, -1.0], [1.0, 0.0]], "copy": [[0.0, 2.0], [6.0, 0.0]], "none": [[0.0, -1.0], [0.0, 0.0]]}
    scores = combined(parts)
    assert scores == [[0.75, -0.25 + 0.25], [0.25 + 0.75, 0.0]]
    assert ranking(scores) == ("1.0", "0.0", "0.1", "1.1")


def test_every_beginning_of_the_uniform_order_is_evenly_spread() -> None:
    for total in (1, 2, 7, 90, 128):
        order = spread_order(total)
        assert sorted(order) == list(range(total))
    for number in (3, 7, 15, 31):
        chosen = sorted(spread_order(128)[:number])
        gaps = [b - a for a, b in zip([-1, *chosen], [*chosen, 128], strict=True)]
        assert max(gaps) - min(gaps) <= 1


def test_rows_of_text_are_full() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {"input_ids": torch.arange(1, 9).reshape(2, 4), "attention_mask": mask}
    rows = full_rows(iter([batch] * 3), 2, 5)
    assert rows.tolist() == [[1, 2, 5, 6, 7], [1, 2, 5, 6, 7]]
    assert copied(rows).tolist() == [[1, 2, 1, 2], [1, 2, 1, 2]]


# In a run


@pytest.fixture
def base(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """Overrides of a tiny run in ``tmp_path / run``."""
    return [
        f"model.path={tiny_model_dir}", "model.device=cpu", f"data.path={text_file}", "data.format=text",
        "data.seq_len=40", "data.validation_rows=10", f"data.cache_dir={tmp_path / 'cache'}", "student.window=8",
        "student.feature_map.feature_dim=8", "student.feature_map.init=identity", "student.keep=none",
        "eval.seq_len=null", "select.rows=2", "select.frontier=[0.3]", "select.frontier_rows=4",
        f"run.dir={tmp_path / 'run'}", "run.progress=off",
    ]  # fmt: skip


@pytest.fixture
def recipe(base: list[str]) -> Callable[..., Recipe]:
    """The recipe of the tiny run, with further overrides."""
    return lambda *more: load_recipe("demo", [*base, *more])


def selections(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / SELECTION_FILE).read_text())
    return found


def test_a_share_is_resolved_once_and_the_recipe_names_the_groups(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_variants(recipe("student.keep=30%"), []) as variants:
        kept = variants.recipe.student.keep
        assert variants.run.recipe is variants.recipe
    found = Selection.load(tmp_path / "run" / SELECTION_FILE)
    assert sorted(found.kept) == list(kept)
    assert len(kept) == 1
    assert found.base == variants.base_fingerprint
    assert (tmp_path / "run" / "selection.png").is_file()
    assert {point.method for point in found.frontier} == {"gates", "uniform"}
    assert {point.groups for point in found.frontier} == {0, 1, 4}
    # again: nothing is measured, also for another share
    monkeypatch.setattr(selection_run, "method_named", None)
    with open_variants(recipe("student.keep=30%"), []) as variants:
        assert variants.recipe.student.keep == kept
    with open_variants(recipe("student.keep=2"), []) as variants:
        assert set(kept) < set(variants.recipe.student.keep)
    # a list needs no selection
    with open_variants(recipe("student.keep=[0.1]", "run.dir=" + str(tmp_path / "other")), []) as variants:
        assert variants.recipe.student.keep == ("0.1",)
    assert not (tmp_path / "other" / SELECTION_FILE).exists()


def test_a_conversion_selects_first_and_its_adapter_has_the_groups(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """In one piece and block by block, and again, when the selection is read; the students are the same."""
    quick = ["student.keep=1", "select.method=retrieval", "select.frontier=[]", "transfer.max_steps=1", "lora=null"]
    for name, convert in (("whole", stages.transfer), ("blocks", blockstages.run_blocks)):
        for _ in range(2):
            convert(recipe(*quick, f"run.dir={tmp_path / name}"))
        kept = Selection.load(tmp_path / name / SELECTION_FILE).kept
        assert load_recipe(tmp_path / name).student.keep == kept
        meta = json.loads((tmp_path / name / "adapter" / "trenchcoat.json").read_text())
        assert meta["student"]["keep"] == list(kept)
    whole, blocks = (RunFolder(tmp_path / name).weights("transfer") for name in ("whole", "blocks"))
    assert whole.keys() == blocks.keys()
    assert all(torch.equal(whole[key], blocks[key]) for key in whole)


def test_another_selection_is_made_again_or_refused_once_a_stage_depends_on_it(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with open_variants(recipe("student.keep=1", "select.method=uniform", "select.frontier=[]"), []) as variants:
        assert variants.recipe.student.keep == ("1.0",)
    with open_variants(recipe("student.keep=1", "select.method=random", "select.frontier=[]"), []) as variants:
        variants.folder.begin("transfer", variants.recipe, {})
    assert selections(tmp_path)["method"] == "random"
    with pytest.raises(UserError, match=r"select\.method was 'random', now 'uniform'\), and stage 'transfer' was"):
        stages.select(recipe("student.keep=1", "select.method=uniform", "select.frontier=[]"))
    with (
        pytest.raises(UserError, match=r"holds stage 'transfer' of another recipe: student\.keep was"),
        open_variants(recipe("student.keep=2", "select.method=random", "select.frontier=[]"), ["transfer"]),
    ):
        pass


def test_a_selection_on_other_weights_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    chosen = recipe("student.keep=1", "select.method=uniform", "select.frontier=[]")
    with open_variants(chosen, []):
        pass
    path = tmp_path / "run" / SELECTION_FILE
    dataclasses.replace(Selection.load(path), base="other").save(path)
    with (
        open_variants(chosen, []) as variants,
        pytest.raises(UserError, match=r"were selected on other base weights \(other\)"),
    ):
        _ = variants.base_fingerprint


def test_files_of_another_format_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / SELECTION_FILE
    Selection("gates", [[1.0]], {}, 1).save(path)
    assert Selection.load(path) == Selection("gates", [[1.0]], {}, 1)
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "format": 99}))
    with pytest.raises(UserError, match="has format 99, but this version reads format 2: delete it"):
        Selection.load(path)
    del raw["scores"]
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="has no 'scores'"):
        Selection.load(path)


def test_rows_must_reach_beyond_the_window(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"select\.seq_len is 40 .* must be at least 4 windows = 64"):
        stages.select(recipe("student.keep=1", "student.window=16"))


def test_the_groups_that_recall_are_found_and_beat_the_same_number_spread_evenly(tmp_path: Path) -> None:
    """On the embedded model, whose recall is in two heads of its last layer."""
    settings = ["data.seq_len=256", "select.rows=2", "select.gates=[0.3]", "select.frontier=[]", "eval.rows=4"]
    settings += [f"run.dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", "run.progress=off"]
    found = stages.select(
        load_recipe("demo", [*settings, "student.keep=1", "select.frontier=[0.1]", "select.frontier_rows=4"])
    ).results
    assert isinstance(found, Selection)
    last = str(found.layers - 1)
    assert found.kept[0].split(".")[0] == last
    by_method = {p.method: p for p in found.frontier if p.groups == 1}
    assert by_method["gates"].copy is not None
    assert by_method["uniform"].copy is not None
    assert by_method["gates"].copy > by_method["uniform"].copy + 2 * (by_method["gates"].copy_error or 0.0)
    looks = stages.select(load_recipe("demo", [*settings, "select.method=retrieval"])).results
    assert looks.keep(1) == found.kept


def test_the_command(recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe()))
    file = str(tmp_path / "recipe.yaml")
    assert main(["select", file]) == 0
    assert "nothing chosen: --keep 13% or --reach 95% chooses" in capsys.readouterr().out
    assert main(["select", file, "--keep", "50%"]) == 0
    said = capsys.readouterr().out
    assert f"kept: student.keep=[{','.join(selections(tmp_path)['kept'])}]" in said
    assert len(selections(tmp_path)["kept"]) == 2
    assert main(["select", file, "--reach", "100%"]) == 0
    capsys.readouterr()
    for wrong in (["--keep", "[1.0]"], ["--keep", "0"], ["--reach", "0"], ["--keep", "1", "--reach", "50%"]):
        assert main(["select", file, *wrong]) == 2
    assert "expected a share such as 13% or a number of groups such as 12" in capsys.readouterr().err


def test_reach_finds_the_least_number(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a made-up frontier on which n groups close n / 4 of the gaps."""

    def point(frontier: Frontier, method: str, kept: tuple[str, ...]) -> Any:
        share = len(kept) / 4
        return selection_run.FrontierPoint(method, len(kept), share, share, 0.0, share, 0.0)

    monkeypatch.setattr(Frontier, "point", point)
    for reach, number in ((0.1, 1), (0.5, 2), (0.51, 3), (1.0, 4)):
        found = stages.select(recipe("select.method=uniform"), reach).results
        assert len(found.kept) == number, reach


def test_log_says_that_a_selection_was_read(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(RunLog, "info", lambda log, text: said.append(text))
    for _ in range(2):
        stages.select(recipe("student.keep=1", "select.method=uniform", "select.frontier=[]"))
    assert "scoring 4 key/value groups by uniform" in said[0]
    assert said[-1].startswith("selection: read from ")


def test_blocks_select_by_retrieval_as_the_whole_model_does(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = ("student.keep=2", "select.method=retrieval", "select.frontier=[]")
    whole = stages.select(recipe(*settings)).results
    resolved = with_selection(recipe(*settings, f"run.dir={tmp_path / 'blocks'}"))
    found = Selection.load(tmp_path / "blocks" / SELECTION_FILE)
    assert resolved.student.keep == tuple(sorted(whole.kept))
    assert (found.base, found.kept) == (whole.base, whole.kept)
    for mine, other in zip(found.parts["copy"], whole.parts["copy"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    with pytest.raises(UserError, match=r"select\.method=gates needs the whole model in memory"):
        with_selection(recipe("student.keep=2", "select.frontier=[]", f"run.dir={tmp_path / 'gates'}"))
    chosen = recipe("student.keep=2", "select.frontier=[]", f"run.dir={tmp_path / 'gates'}")
    kept = stages.select(chosen).results.kept
    assert with_selection(chosen).student.keep == tuple(sorted(kept))


def test_two_sharded_processes_measure_what_one_does(
    recipe: Callable[..., Recipe], base: list[str], tmp_path: Path
) -> None:
    """Five passes a part do not divide by two, so one process idles in the last round."""
    settings = ["student.keep=1", "select.rows=1", "select.gates=[0.1,0.3,0.5,0.7,0.9]", "select.frontier_rows=3"]
    single = stages.select(recipe(*settings)).results
    overrides = [*base, *settings, f"run.dir={tmp_path / 'two'}"]
    forward_only = ("select.method=retrieval", "select.frontier=[]")
    retrieval_too = [*overrides, *forward_only, f"run.dir={tmp_path / 'retrieval'}"]
    jobs = [{"do": "select", "overrides": each} for each in (overrides, retrieval_too)]
    assert run(2, jobs, tmp_path / "out") == [["done", "done"], ["done", "done"]]
    two = Selection.load(tmp_path / "two" / SELECTION_FILE)
    assert (two.kept, two.base) == (single.kept, single.base)
    for part in ("text", "copy"):
        for mine, other in zip(two.parts[part], single.parts[part], strict=True):
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)
    for mine, other in zip(two.frontier, single.frontier, strict=True):
        assert dataclasses.asdict(mine) == pytest.approx(dataclasses.asdict(other), abs=1e-3)
    alone = stages.select(recipe(*settings, *forward_only, f"run.dir={tmp_path / 'alone'}")).results
    spread = Selection.load(tmp_path / "retrieval" / SELECTION_FILE)
    for mine, other in zip(spread.parts["copy"], alone.parts["copy"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)

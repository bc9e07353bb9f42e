"""`trenchcoat plan`: what fits, its speed, advice when nothing fits, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trenchcoat.cli import app as cli
from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.config.units import GIB, parse_size
from trenchcoat.models.flops import transfer_flops_per_token
from trenchcoat.planning.advice import enough_gpus, notes_on, one_layer_bytes
from trenchcoat.planning.plan import Machine, Plan, Planner, make_plan
from trenchcoat.planning.verdict import TRUST


def _plan(name: str, *overrides: str, **machine: Any) -> tuple[Planner, Plan]:
    return make_plan(load_recipe(name, overrides), Machine(**machine))


def _notes(planned: tuple[Planner, Plan]) -> str:
    return "\n".join(notes_on(*planned))


@pytest.mark.parametrize(
    ("text", "binary", "size"),
    [
        ("80GB", True, 80 * GIB),
        ("80GB", False, 80e9),
        ("1.5 TB", False, 1.5e12),
        ("3GB/s", False, 3e9),
        ("640MiB", False, 640 * 2**20),
        ("10M", False, 10e6),
        ("512", False, 512.0),
    ],
)
def test_sizes(text: str, binary: bool, size: float) -> None:
    assert parse_size(text, "--x", binary=binary) == pytest.approx(size)


@pytest.mark.parametrize("text", ["", "GB", "80 gigs", "-3GB", "0GB", "1.2.3GB"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--disk must be a size such as 80GB"):
        parse_size(text, "--disk")


def test_each_ways_fit_follows_the_memory() -> None:
    _, plan = _plan("lolcats_llama3_1_8b", gpus=8)
    assert {way.name: way.fits for way in plan.ways} == dict.fromkeys((way.name for way in plan.ways), True)
    assert plan.best == "a copy on each GPU"  # nothing to gather
    _, small = _plan("lolcats_llama3_1_8b", gpus=8, gpu_memory=12 * GIB)
    fitting = {way.name for way in small.ways if way.fits}
    assert fitting == {"one GPU, 4-bit base", "sharded over all (FSDP)", "FSDP, shards in host memory"}
    assert small.best == "sharded over all (FSDP)"


def test_70b_on_a_node_and_405b_on_three() -> None:
    _, plan = _plan("lolcats_llama3_1_70b", gpus=8)
    assert plan.best == "sharded over all (FSDP)"
    assert "host" not in _notes((_, plan))
    planned = _plan("lolcats_llama3_1_405b", gpus=24)
    assert planned[1].best == "sharded over all (FSDP)"
    assert [way.name for way in planned[1].ways if "HSDP" in way.name] == ["sharded in each node (HSDP)"]
    assert "lora is bound by the links" in _notes(planned)
    assert "divide" not in _notes(planned)


def test_the_speed_is_that_of_the_arithmetic_or_of_the_links() -> None:
    planner, plan = _plan("lolcats_llama3_1_70b", gpus=8, mfu=0.5, link=1e15)
    way = plan.chosen
    assert way is not None
    flops = transfer_flops_per_token(plan.shapes, planner.recipe.student, 1024).total
    assert way.stages["transfer"].tokens_per_second == pytest.approx(8 * 989.4e12 * 0.5 / flops)
    assert way.stages["transfer"].bound_by == "arithmetic"
    _, slow = _plan("lolcats_llama3_1_70b", gpus=8, link=1e9)
    sharded = next(way for way in slow.ways if way.name == "sharded over all (FSDP)")
    base = 2 * slow.shapes.parameters * 7 / 8
    assert sharded.stages["lora"].tokens_per_second == pytest.approx(8 * 1024 / (2 * base / 1e9))
    assert sharded.stages["lora"].bound_by == "links"


def test_hours_follow_the_tokens(tmp_path: Path) -> None:
    recipe = load_recipe("lolcats_llama3_1_8b")
    stages = make_plan(recipe, Machine(), tokens=3.6e6)[1].ways[0].stages
    assert stages["transfer"].tokens == 2 * 3.6e6
    assert stages["transfer"].hours == pytest.approx(7.2e6 / stages["transfer"].tokens_per_second / 3600)
    steps = make_plan(load_recipe("lolcats_llama3_1_8b", ["lora.max_steps=10"]), Machine())[1].ways[0].stages["lora"]
    assert steps.tokens == 10 * 8 * 1024
    text = tmp_path / "some.txt"
    text.write_text("x" * 4000)
    local = make_plan(load_recipe("lolcats_llama3_1_8b", [f"data.path={text}"]), Machine())[1]
    assert local.ways[0].stages["lora"].tokens == 2000
    unknown = _plan("lolcats_llama3_1_8b", "data.path=somebody/something")
    assert unknown[1].ways[0].stages["lora"].hours is None
    assert "with --tokens the hours are shown too" in _notes(unknown)


def test_when_nothing_fits_the_notes_name_what_would() -> None:
    planned = _plan("lolcats_llama3_1_405b", gpus=1)
    assert planned[1].chosen is None
    said = _notes(planned)
    assert "nothing fits 1 x 80.0 GiB: the least is" in said
    enough = enough_gpus(planned[0])
    assert enough == 16
    assert "16 such GPUs would be enough, with parallel.shard=full" in said
    layer = one_layer_bytes(planned[0])
    assert 5.9 * GIB < layer < 9 * GIB
    assert f"{layer / GIB:.1f} GiB or more on one GPU; `trenchcoat blocks plan` shows how" in said
    # the given number is the smallest: it fits, and one node fewer does not
    assert _plan("lolcats_llama3_1_405b", gpus=16)[1].chosen is not None
    eight = _plan("lolcats_llama3_1_405b", gpus=8)[1]
    assert {way.name for way in eight.ways if way.fits} == {"FSDP, shards in host memory"}
    assert "of host memory per node" in _notes(_plan("lolcats_llama3_1_405b", gpus=8))


def test_settings_that_would_make_it_fit_are_found() -> None:
    long = ["data.seq_len=16384", "lora.gradient_checkpointing=false"]
    assert "with lora.gradient_checkpointing=true it would fit: " in _notes(_plan("lolcats_llama3_1_8b", *long))
    many = ["transfer.batch_size=64", "lora.batch_size=64", "lora.gradient_checkpointing=false"]
    settings = "lora.gradient_checkpointing=true transfer.batch_size=1 lora.batch_size=1"
    assert f"with {settings} it would fit: one GPU, 4-bit" in _notes(
        _plan("lolcats_llama3_1_8b", *many, gpu_memory=12 * GIB)
    )
    rows = _notes(_plan("lolcats_llama3_1_8b", "lora.batch_size=256"))
    assert "with lora.batch_size=1 it would fit: one GPU" in rows
    hopeless = _notes(_plan("lolcats_llama3_1_8b", "data.seq_len=4000000", gpu_memory=8 * GIB))
    assert "more GPUs alone would not be enough" in hopeless


def test_the_notes_name_uneven_accumulation_and_missing_disk_space() -> None:
    said = _notes(_plan("lolcats_llama3_1_70b", gpus=16, disk=100e9, bandwidth=2e9))
    assert "transfer.accumulation=8 micro-batches per step do not divide evenly among 16 processes" in said
    assert "transfer.accumulation=16 does" in said
    assert "147 GB of disk are needed, 100 GB is available" in said
    assert "reading the weights once takes 1.2 min at 2 GB/s" in said


def test_a_null_stage_is_not_planned() -> None:
    _, plan = _plan("lolcats_llama3_1_8b", "transfer=null")
    assert list(plan.ways[0].stages) == ["lora"]
    with pytest.raises(UserError, match="nothing to plan"):
        _plan("lolcats_llama3_1_8b", "transfer=null", "lora=null")


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"gpu": "Abacus"}, "--gpu 'Abacus' is not known"),
        ({"gpus": 0}, "--gpus and --gpus-per-node must be at least 1"),
        ({"mfu": 1.5}, "--mfu must be above 0 and at most 1, got 1.5"),
    ],
)
def test_impossible_machines_are_refused(machine: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        _plan("lolcats_llama3_1_8b", **machine)


def test_a_student_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(UserError, match="skip needs feature_dim equal to the head dimension 128"):
        _plan("lolcats_llama3_1_8b", "student.feature_map.skip=true")


def test_per_kv_head_maps_need_less() -> None:
    full, shared = _plan("lolcats_llama3_1_405b")[1], _plan("lolcats_llama3_1_405b", "student.key_maps=per_kv_head")[1]
    assert shared.state[0] == full.state[0] / 16
    assert (
        shared.ways[0].stages["transfer"].memory.parts["students"]
        < 0.6 * (full.ways[0].stages["transfer"].memory.parts["students"])
    )


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "plan.json"
    sizes = ["--gpus", "8", "--gpu-memory", "80GB", "--disk", "2TB", "--bandwidth", "3GB/s"]
    words = ["plan", "lolcats_llama3_1_70b", *sizes, "--details"]
    assert cli.main([*words, "student.key_maps=per_kv_head", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("70.55 billion parameters", "sharded over all (FSDP) *", "gathered layers", "disk: ", "far sums"):
        assert word in shown, word
    document = json.loads(out.read_text())
    assert document["best"] == "sharded over all (FSDP)"
    way = next(way for way in document["ways"] if way["name"] == document["best"])
    assert way["stages"]["lora"]["total_bytes"] == pytest.approx(sum(way["stages"]["lora"]["memory"]["parts"].values()))
    assert way["stages"]["lora"]["hours"] > way["stages"]["transfer"]["hours"] > 0
    assert document["notes"]


def _shown(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plan", *line.split()]) == 0
    shown = capsys.readouterr().out
    assert all(len(text) <= 80 for text in shown.splitlines() if not text.startswith("  t")), shown
    return shown


@pytest.mark.parametrize(
    ("line", "sentence", "command"),
    [
        ("lolcats_llama3_1_70b --gpus 8 lora.rank=4", "do attention transfer in about 17 min and LoRA in",
         "torchrun --nproc_per_node 8 -m trenchcoat linearize lolcats_llama3_1_70b lora.rank=4 parallel.shard=full"),
        ("lolcats_llama3_1_70b", "(the base in its own precision takes 2 such GPUs)",
         "trenchcoat linearize lolcats_llama3_1_70b model.quantize=nf4"),
        ("lolcats_llama3_1_405b --keep 10", "in about 12 h: streaming, disk; LoRA needs 16 such GPUs",
         "trenchcoat blocks run lolcats_llama3_1_405b --keep 10"),
        ("lolcats_llama3_1_405b --gpus 24", "do attention transfer in about 3.5 h and LoRA in about 7 h",
         "torchrun --nnodes 3 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 -m trenchcoat "
         "linearize lolcats_llama3_1_405b parallel.shard=full "),
        ("lolcats_llama3_1_8b lora=null", "does attention transfer in about 13 min: one GPU, up to",
         "trenchcoat transfer lolcats_llama3_1_8b lora=null\n"),
        ("lolcats_llama3_1_8b transfer=null", "One H100 with 80.0 GiB does LoRA in about 26 min: one GPU",
         "trenchcoat finetune lolcats_llama3_1_8b transfer=null\n"),
        ("lolcats_llama3_1_8b data.path=unknown/text", "a time that --tokens N",
         "trenchcoat linearize lolcats_llama3_1_8b"),
    ],
)  # fmt: skip
def test_the_verdict_and_the_command(
    line: str, sentence: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = _shown(line, capsys, monkeypatch)
    assert sentence in " ".join(shown.split())
    assert f"\n  {command}" in shown


def test_a_recipe_for_a_cpu_is_planned_for_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = _shown("demo", capsys, monkeypatch)
    assert "trenchcoat linearize demo model.device=auto\n" in shown
    assert "< 0.01 + < 0.01" in shown


@pytest.mark.parametrize("line", ["plan lolcats_llama3_1_70b --gpus 8 --details",
                                  "blocks plan lolcats_llama3_1_405b_blocks --gpus 16"])  # fmt: skip
def test_the_large_tables_fit_a_terminal(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(line.split()) == 0
    shown = capsys.readouterr().out
    assert all(len(text) <= 80 for text in shown.splitlines() if not text.startswith("  t")), shown
    assert "…" not in shown


def test_stage_2_is_timed_by_its_own_rows() -> None:
    """A quarter as many rows of four times the length are the same tokens."""
    settings = (["400", "data.seq_len=1024"], ["100", "data.seq_len=1024", "lora.seq_len=4096"])
    recipes = [load_recipe("lolcats_llama3_1_8b", [f"lora.max_steps={steps}", *more]) for steps, *more in settings]
    shorter, longer = (make_plan(one, Machine())[1].ways[0].stages["lora"] for one in recipes)
    assert shorter.tokens == longer.tokens
    assert longer.hours == pytest.approx(shorter.hours)


def test_nothing_fits_at_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = " ".join(_shown("lolcats_llama3_1_405b --gpu-memory 4GB", capsys, monkeypatch).split())
    assert "Attention transfer does not fit, however many of these GPUs there are; LoRA does not fit" in shown
    assert " trenchcoat linearize" not in shown


def test_the_published_hours_stand_beside_ours() -> None:
    for recipe, gpus, ours in (("70b", 8, ("0.28", "0.56")), ("405b", 24, ("3.5", "7"))):
        plan = make_plan(load_recipe(f"lolcats_llama3_1_{recipe}"), Machine(gpus=gpus))[1]
        assert plan.chosen is not None
        assert tuple(f"{stage.hours:.2g}" for stage in plan.chosen.stages.values()) == ours
    assert "4 + 14 h (this arithmetic: 0.28 + 0.56)" in TRUST
    assert "16 h of LoRA (7)" in TRUST


def test_the_command_simulates_and_compares(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "plan.json"
    sizes = ["data.seq_len=128", "student.window=16", "student.feature_map.feature_dim=8"]
    words = ["plan", "lolcats_llama3_1_8b", f"model.path={tiny_model_dir}", *sizes, "--gpus", "2", "--simulate"]
    assert cli.main([*words, "--json", str(out)]) == 0
    assert "Arithmetic and simulation" in capsys.readouterr().out
    simulated = json.loads(out.read_text())["simulated"]
    assert set(simulated) == {"transfer", "lora"}
    for found in simulated.values():
        assert found["simulated_bytes"] > 0
        assert found["arithmetic_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu-memory", "lots"], "--gpu-memory must be a size"),
        (["--tokens", "many"], "--tokens must be a number such as 10M"),
        (["--gpus", "12"], "--gpus 12 is not a whole number of nodes with 8 GPUs each: give --gpus 16"),
        (["--mfu", "40"], "--mfu must be above 0"),
        (["student.windw=3"], "did you mean student.window"),
    ],
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "lolcats_llama3_1_8b", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_large_recipes_hold_the_papers_values() -> None:
    small, large = load_recipe("lolcats_llama3_1_8b"), load_recipe("lolcats_llama3_1_70b")
    assert replace(large, model=small.model, run=small.run, parallel=small.parallel) == small
    largest = load_recipe("lolcats_llama3_1_405b")
    assert largest.lora is not None
    assert largest.transfer is not None
    assert (largest.lora.rank, largest.lora.alpha, largest.lora.dropout) == (4, 8.0, 0.5)
    assert (largest.transfer.mse_weight, largest.transfer.xent_weight) == (1000.0, 1.0)
    assert largest.data == small.data
    for recipe in (large, largest):
        assert recipe.lora is not None
        assert recipe.lora.gradient_checkpointing
        assert not recipe.eval.baselines


DOCUMENT = Path(__file__).parents[2] / "docs" / "PLAN.md"
MACHINES = [
    ("lolcats_llama3_1_8b", 1, 24, "RTX 4090"),
    ("lolcats_llama3_1_8b", 1, 80, "H100"),
    ("lolcats_llama3_1_8b", 8, 80, "H100"),
    ("lolcats_llama3_1_70b", 1, 80, "H100"),
    ("lolcats_llama3_1_70b", 4, 80, "H100"),
    ("lolcats_llama3_1_70b", 8, 80, "H100"),
    ("lolcats_llama3_1_405b", 8, 80, "H100"),
    ("lolcats_llama3_1_405b", 8, 141, "H200"),
    ("lolcats_llama3_1_405b", 16, 80, "H100"),
    ("lolcats_llama3_1_405b", 24, 80, "H100"),
    ("lolcats_llama3_1_405b", 64, 80, "H100"),
]


def plan_rows() -> list[str]:
    """The table of docs/PLAN.md."""
    rows = ["| recipe | machine | way | transfer | LoRA | tokens/s | hours |", "|---|---|---|---:|---:|---:|---:|"]
    for name, gpus, memory, gpu in MACHINES:
        way = _plan(name, gpus=gpus, gpu_memory=memory * GIB, gpu=gpu)[1].chosen
        assert way is not None
        stages = [way.stages[stage] for stage in ("transfer", "lora")]
        cells = [
            f"`{name}`",
            f"{gpus} x {gpu} {memory} GB",
            way.name,
            *(f"{stage.memory.total / GIB:.1f}" for stage in stages),
            " / ".join(f"{stage.tokens_per_second:,.0f}" for stage in stages),
            " + ".join(f"{stage.hours:.2g}" for stage in stages),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _table(name: str) -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].splitlines()


def test_the_documented_table_is_the_planned_one() -> None:
    assert _table("plan-table") == plan_rows()


def test_the_documented_simulations_agree_with_the_arithmetic() -> None:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in _table("simulated-table")[2:]]
    assert len(rows) == 8
    for model, ranks, stage, arithmetic, simulated, difference, known in rows:
        count = int(ranks)
        recipe = load_recipe(f"lolcats_llama3_1_{model.lower()}", ["lora.dropout=0", "transfer.xent_weight=0"])
        plan = make_plan(recipe, Machine(gpus=count))[1]
        way = next(way for way in plan.ways if way.name == "sharded over all (FSDP)")
        counted = way.stages["lora" if stage == "LoRA" else "transfer"].memory.total / GIB
        assert f"{counted:.2f}" == arithmetic
        assert difference == f"{(counted / float(simulated) - 1) * 100:+.1f} %"
        assert counted == pytest.approx(float(simulated), rel=0.10)
        if known:
            assert counted == pytest.approx(float(known), rel=0.10)

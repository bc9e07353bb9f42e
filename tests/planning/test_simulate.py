"""The arithmetic against a simulated step, the simulated step against a real one, and both against known values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

from trenchcoat.config import FeatureMapConfig, LoraConfig, ParallelConfig, StudentConfig, TransferConfig, UserError
from trenchcoat.config.units import GIB
from trenchcoat.models.attach import attach_students, freeze_for_transfer, set_mode
from trenchcoat.models.families import decoder_of
from trenchcoat.models.lora import add_lora
from trenchcoat.models.shapes import find_config, shapes_of
from trenchcoat.models.stage2 import as_teacher
from trenchcoat.planning.footprint import NF4_BYTES, Layout, StepSizes, base_bytes, footprint, state_bytes
from trenchcoat.planning.simulate import simulate
from trenchcoat.runtime import distributed, sharding
from trenchcoat.runtime.memory import live_tensor_memory
from trenchcoat.training import objectives
from trenchcoat.training.logits import own_teacher

STUDENT = StudentConfig(window=32, feature_map=FeatureMapConfig(feature_dim=32), impl="chunkwise")
TOKENS = 256
LORA = LoraConfig(rank=4, gradient_checkpointing=True, train_feature_maps=False)
BY_TEXT = replace(LORA, loss="ce")
TRANSFER = TransferConfig()


def _small(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 3000,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    return LlamaConfig(**{**sizes, **changes})


def _step(config: LlamaConfig, stage: Any) -> StepSizes:
    return StepSizes(shapes_of(config), STUDENT, stage, TOKENS)


@pytest.mark.parametrize("stage", [TRANSFER, LORA, BY_TEXT], ids=["transfer", "lora", "ce"])
@pytest.mark.parametrize(
    ("ranks", "shard", "layout"),
    [
        (1, "none", Layout()),
        (4, "none", Layout(ranks=4)),
        (4, "full", Layout(ranks=4, shared_by=4)),
        (8, "node", Layout(ranks=8, shared_by=2)),
    ],
)
def test_arithmetic_agrees_with_the_simulated_step(stage: Any, ranks: int, shard: Any, layout: Layout) -> None:
    config = _small()
    found = simulate(config, STUDENT, stage, seq_len=TOKENS, ranks=ranks, shard=shard, node_size=2)
    counted = footprint(_step(config, stage), layout)
    assert counted.total == pytest.approx(found.peak, rel=0.10)
    assert sum(found.parts.values()) == pytest.approx(found.peak, rel=0.02)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": False},
        {"batch_size": 3},
        {"dropout": 0.5, "gradient_checkpointing": False},
        {"train_feature_maps": True},
        {"loss": "ce"},
        {"targets": ("q_proj", "v_proj")},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_the_settings_of_lora_are_counted(changes: dict[str, Any]) -> None:
    config, stage = _small(vocab_size=500), replace(LORA, **changes)
    found = simulate(config, STUDENT, stage, seq_len=TOKENS)
    counted = footprint(_step(config, stage), Layout())
    assert counted.total == pytest.approx(found.peak, rel=0.10)


def test_layers_as_large_as_those_of_8b() -> None:
    config = find_config("meta-llama/Llama-3.1-8B")
    config.num_hidden_layers = 2
    layout = Layout(ranks=8, shared_by=8)
    for stage in (TRANSFER, LORA):
        found = simulate(config, StudentConfig(), stage, seq_len=128, ranks=8)
        counted = footprint(StepSizes(shapes_of(config), StudentConfig(), stage, 128), layout)
        assert counted.total == pytest.approx(found.peak, rel=0.05)


@pytest.mark.parametrize("stage", [TRANSFER, LORA, BY_TEXT], ids=["transfer", "lora", "ce"])
def test_the_simulated_step_needs_the_memory_of_a_real_one(stage: Any) -> None:
    config = _small(num_hidden_layers=2)
    found = simulate(config, STUDENT, stage, seq_len=TOKENS, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    attach_students(model, STUDENT)
    if isinstance(stage, LoraConfig):
        add_lora(model, stage)
        objective = objectives.stage_2_objective(stage, own_teacher(as_teacher))
    else:
        freeze_for_transfer(model)
        objective = objectives.transfer_objective(stage)
    set_mode(model, "student" if isinstance(stage, LoraConfig) else "transfer")
    ids = torch.randint(0, 500, (1, TOKENS))
    with live_tensor_memory() as memory:
        objective(model, {"input_ids": ids, "labels": ids})
    assert found.parts["Activations and gradients"] == pytest.approx(memory.peak, rel=0.05)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_rows_in_pieces_need_the_memory_that_is_counted(loss: str) -> None:
    """Activations of a real step, whole and in pieces: what the arithmetic has beyond weights and optimizer."""
    config, length, peaks, counts = _small(num_hidden_layers=2, vocab_size=500), 1024, [], []
    for piece_len in (None, TOKENS):
        stage = replace(LORA, loss=loss, gradient_checkpointing=False, train_feature_maps=True, piece_len=piece_len)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        attach_students(model, STUDENT)
        add_lora(model, stage)
        set_mode(model, "student")
        ids = torch.randint(0, 500, (1, length))
        objective = objectives.stage_2_objective(stage, own_teacher(as_teacher))
        objective(model, {"input_ids": ids, "labels": ids})  # which leaves the operator's scratch memory
        with live_tensor_memory() as memory:
            objective(model, {"input_ids": ids, "labels": ids})
        peaks.append(memory.peak)
        parts = footprint(StepSizes(shapes_of(config), STUDENT, stage, length, dtype_bytes=4), Layout()).parts
        counts.append(parts["activations"] + parts["logits"] + parts["gradients"])
    assert counts[1] < counts[0] / 2
    assert counts[1] == pytest.approx(peaks[1], rel=0.15)
    assert counts[0] == pytest.approx(peaks[0], rel=0.15)


@pytest.mark.parametrize(
    ("path", "ranks", "known"),
    [
        ("meta-llama/Llama-3.1-70B", 8, 23.3),
        ("meta-llama/Llama-3.1-405B", 24, 53.3),
        ("meta-llama/Llama-3.1-405B", 64, 33.6),
    ],
)
def test_known_points_of_a_lora_step(path: str, ranks: int, known: float) -> None:
    """Earlier simulations of softmax attention with LoRA inside FSDP, in GiB per rank."""
    shapes, layout = shapes_of(find_config(path)), Layout(ranks=ranks, shared_by=ranks)
    counted = footprint(StepSizes(shapes, StudentConfig(), LORA, 1024), layout)
    assert counted.total / GIB == pytest.approx(known, rel=0.10)
    softmax = ("weights", "gathered layers", "activations", "logits")
    assert sum(counted.parts[name] for name in softmax) / GIB == pytest.approx(known, rel=0.01)


def test_how_layouts_change_the_parts() -> None:
    shapes = shapes_of(_small())
    counted = {
        name: footprint(_step(_small(), TRANSFER), layout)
        for name, layout in {
            "one": Layout(),
            "nf4": Layout(nf4=True),
            "full": Layout(ranks=4, shared_by=4),
            "offload": Layout(ranks=4, shared_by=4, offload=True),
        }.items()
    }
    assert counted["one"].parts["weights"] == 2 * shapes.parameters
    assert counted["full"].parts["weights"] == 2 * shapes.parameters / 4
    in_layers = shapes.layers * shapes.layer_parameters
    assert pytest.approx(0.5159, abs=1e-4) == NF4_BYTES
    assert counted["nf4"].parts["weights"] == base_bytes(shapes) - (2 - NF4_BYTES) * in_layers
    assert counted["offload"].parts["weights"] == 0
    assert counted["offload"].host == counted["full"].parts["weights"]
    trained = counted["one"].parts["optimizer"] / 8
    assert counted["full"].parts["optimizer"] == 16 * trained / 4


def test_cross_entropy_and_tied_embeddings_need_more() -> None:
    config = _small(intermediate_size=64)
    plain = footprint(_step(config, TRANSFER), Layout())
    cross = footprint(_step(config, replace(TRANSFER, xent_weight=1.0)), Layout())
    assert cross.total > plain.total
    assert cross.moment == "student of a layer"
    tied = _small(tie_word_embeddings=True)
    found = simulate(tied, STUDENT, LORA, seq_len=TOKENS, ranks=4)
    layout = Layout(ranks=4, shared_by=4)
    assert footprint(_step(tied, LORA), layout).total == pytest.approx(found.peak, rel=0.10)


def test_the_state_during_generation() -> None:
    shapes = shapes_of(find_config("meta-llama/Llama-3.1-405B"))
    far, window = state_bytes(shapes, StudentConfig())
    assert far == 4 * 126 * 128 * 128 * (128 + 1)
    assert window == 2 * 2 * 126 * 8 * 128 * 128
    shared = state_bytes(shapes, StudentConfig(key_maps="per_kv_head"))[0]
    assert shared == far / 16
    assert state_bytes(shapes, StudentConfig(name="linear"))[1] == 0


def test_simulation_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="10 processes do not divide into nodes of 4"):
        simulate(_small(), STUDENT, TRANSFER, seq_len=TOKENS, ranks=10, shard="node", node_size=4)
    with pytest.raises(UserError, match=r"reads whole rows.*lora\.piece_len=null"):
        simulate(_small(), STUDENT, LoraConfig(piece_len=64), seq_len=TOKENS)
    assert not dist.is_initialized()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="without torchrun"):
        simulate(_small(), STUDENT, TRANSFER, seq_len=TOKENS)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_simulation_has_the_fsdp_units_of_a_run(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        monkeypatch.setattr(distributed, "_world", distributed.World(0, 4, 0, 4, "cpu"))
        found = []
        for way in ("run", "simulation"):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(_small(tie_word_embeddings=tied))
            if way == "run":
                sharding.shard_base(model, decoder_of(model).layers, ParallelConfig())
            else:
                sharding.shard_units(
                    model, decoder_of(model).layers, mesh=distributed.flat_mesh(), ignored_params=set()
                )
            found.append({name for name, module in model.named_modules() if isinstance(module, FSDPModule)})
        assert found[0] == found[1]
        assert "model.layers.5" in found[0]
    finally:
        dist.destroy_process_group()

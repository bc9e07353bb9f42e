"""Launch settings tuned on a device: found on recorded launches, stored by device name, used by the next call; an
invalid file is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernel_kit import DEVICE, KernelCase, group
from operator_kit import budget, error
from trenchcoat.bench import tiles as tuning
from trenchcoat.bench.layer import Layer, LayerSizes
from trenchcoat.bench.registry import run_benchmark
from trenchcoat.config import UserError
from trenchcoat.ops.triton import attention, check, launch, tiles
from trenchcoat.ops.triton.tiles import Choices, Tile


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "tiles.json"
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    tiles.choices.cache_clear()
    return path


@pytest.fixture(autouse=True)
def _forget() -> object:
    yield
    tiles.choices.cache_clear()


SIZES = LayerSizes(heads=1, kv_heads=1, dim=6, columns=4, window=3)
CASE = KernelCase(tokens=9, window=3, batch=1, heads=1, key_maps=1)


def _run() -> torch.Tensor:
    leaves = {name: t.detach() for name, t in CASE.leaves(torch.float32).items()}
    return attention.attend(CASE.qkv(leaves), CASE.maps(leaves), CASE.weights(leaves), CASE.rule)[0]


def test_the_fastest_is_stored_and_used(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for which 8 warps at depth 2 are fastest, and a device on which 16 warps do not fit."""
    real = launch.Launch.again
    tried: list[Tile] = []

    def again(self: launch.Launch, tile: Tile) -> None:
        tried.append(tile)
        if tile.warps == 16:
            raise launch.OutOfResources(1, 0, "shared memory")
        real(self, tile)

    def clock(work: object) -> float:
        tried.clear()
        work()  # type: ignore[operator]
        return 1.0 if tried and tried[-1] == Tile(8, 2) else 2.0

    monkeypatch.setattr(launch.Launch, "again", again)
    found = tuning.tune([_run], clock, device=torch.device(DEVICE))
    assert found["tiles"] == {"outputs": [8, 2, 0.5]}
    entry = json.loads(own_file.read_text())[launch.device_name(torch.device(DEVICE))]
    assert list(entry) == [found["shape"]]
    with launch.recorded() as launches:
        y = _run()
    assert launches[0].tile == Tile(8, 2)
    exact, independent = (CASE.reference(dtype)["y"] for dtype in (torch.float64, torch.float32))
    assert error(y, exact) <= budget(error(independent, exact), CASE.terms)


def test_other_shapes_devices_and_versions_do_not_use_it(own_file: Path) -> None:
    tuning.keep("some GPU", "a shape", Choices(programs=4, tiles={"outputs": Tile(8, 3)}), "9.9")
    assert tiles.choices("some GPU", "a shape", "9.9").tiles["outputs"] == Tile(8, 3)
    assert tiles.choices("some GPU", "a shape", "9.9").programs == 4
    for device, shape, version in (
        ("another", "a shape", "9.9"),
        ("some GPU", "b", "9.9"),
        ("some GPU", "a shape", "1"),
    ):
        assert tiles.choices(device, shape, version) == Choices()
    tuning.keep("another", "b", Choices(), "9.9")
    assert list(json.loads(own_file.read_text())) == ["some GPU", "another"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"cpu": {"s": {"triton": "1", "programs": 2, "tiles": {"x": [3, 1]}}}}'])
def test_the_error_names_an_invalid_file(text: str, own_file: Path) -> None:
    own_file.parent.mkdir()
    own_file.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json is not a file of tuned settings.*bench tiles"):
        tiles.choices("cpu", "s", "1")


def test_every_kernel_is_launched_by_launch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each kernel is tuned: only running totals are launched without it. All use the same entry."""
    monkeypatch.setattr(check, "check", lambda device: None)
    group(monkeypatch, 2)
    with launch.recorded() as launches:
        work = Layer(SIZES, "triton", 9, DEVICE)
        work.training()
        work.cross_entropy()
        work.decoding()()
    assert {one.name for one in launches} == {
        "outputs", "far_sums", "query_gradients", "gradient_sums", "key_gradients", "map_gradients",
        "near_query_gradients", "near_key_gradients", "stored_features", "query_side", "key_side", "prepare", "read",
    }  # fmt: skip
    assert {repr(one.arguments[-1]) for one in launches} == {repr(launches[0].arguments[-1])}


def test_without_a_gpu_tuning_is_an_error() -> None:
    with pytest.raises(UserError, match="--device cuda"):
        run_benchmark("tiles", device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_quick_run(own_file: Path) -> None:
    text = run_benchmark("tiles", quick=True, device="cuda")
    assert own_file.exists()
    assert "warps" in text

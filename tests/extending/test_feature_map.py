"""A new feature map: one `Activation` in `students/feature_maps.py`, one name in `config.KNOWN_FEATURE_MAPS`.

It also selects the kernels: with `kernel=None`, as here, `auto` falls back to chunkwise and logs the reason. Outside
the repository, `register_feature_map` does both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trenchcoat
from trenchcoat.cli import app as cli
from trenchcoat.config import KNOWN_FEATURE_MAPS, FeatureMapConfig, StudentConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.models.attach import students_of
from trenchcoat.students import ACTIVATIONS, Activation, FeatureMap, build_student, fused, register_feature_map


# what a contributor writes
def softplus(u: Tensor, out: Tensor) -> Tensor:
    """log(1 + exp(u)), which is never 0."""
    return out.copy_(nn.functional.softplus(u))


def softplus_backward(f: Tensor, df: Tensor) -> Tensor:
    """sigmoid(u) is 1 - exp(-f)."""
    return df * -torch.expm1(-f)


SOFTPLUS = Activation(softplus, softplus_backward, paired=False)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_feature_map("example_softplus", SOFTPLUS)
    yield
    del ACTIVATIONS["example_softplus"]
    KNOWN_FEATURE_MAPS.remove("example_softplus")


def test_features_and_gradients_match_the_formula() -> None:
    phi = FeatureMap(
        FeatureMapConfig(name="example_softplus", feature_dim=5, init="kaiming"), num_heads=2, head_dim=4
    ).double()
    x = torch.randn(3, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    wanted = nn.functional.softplus(x @ phi.weight).clamp_min(phi.cfg.eps)
    torch.testing.assert_close(phi(x), wanted)
    projection = torch.randn_like(wanted)
    leaves = [x, phi.weight]
    found, expected = (torch.autograd.grad((y * projection).sum(), leaves) for y in (phi(x), wanted))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_recipes_know_it_and_the_help_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("demo", ["student.feature_map.name=example_softplus"])
    assert recipe.student.feature_map.name == "example_softplus"
    with pytest.raises(UserError, match="did you mean example_softplus"):
        load_recipe("demo", ["student.feature_map.name=example_softpluss"])
    with pytest.raises(SystemExit):
        cli.main(["linearize", "--help"])
    assert "elu | example_softplus" in capsys.readouterr().out


def test_linearize_trains_and_saves_it(tiny_overrides: list[str]) -> None:
    folder = Path(tiny_overrides[-1].removeprefix("run.dir="))
    more = [
        "student.feature_map.name=example_softplus",
        "student.feature_map.init=kaiming",
        "transfer.max_steps=2",
        "lora=null",
    ]
    assert cli.main(["linearize", "demo", *tiny_overrides, *more]) == 0
    model, _ = trenchcoat.load(folder / "adapter", device="cpu")
    assert all(student.query_map.act is SOFTPLUS for student in students_of(model).values() if student.query_map)


class Pretended:
    """A CUDA device of capability 9.0."""

    type, index = "cuda", 0

    def __str__(self) -> str:
        return "cuda:0"


def test_it_selects_the_kernels(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(fused, "_reported", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = "the kernels do not support the feature map 'example_softplus'"
    maps = FeatureMapConfig(name="example_softplus")
    student = build_student(StudentConfig(feature_map=maps), num_heads=2, num_kv_heads=1, head_dim=128)
    with caplog.at_level(logging.INFO, logger="trenchcoat"):
        assert student.implementation(torch.bfloat16, Pretended()) == "chunkwise"  # type: ignore[arg-type]
    assert reason in caplog.text
    asked = StudentConfig(feature_map=maps, impl="triton")
    student = build_student(asked, num_heads=2, num_kv_heads=1, head_dim=128)
    with pytest.raises(ValueError, match=re.escape(f"student.impl is triton, but {reason}")):
        student.implementation(torch.bfloat16, Pretended())  # type: ignore[arg-type]


def test_a_name_already_in_use_is_refused() -> None:
    with pytest.raises(ValueError, match="'elu' exists already"):
        register_feature_map("elu", SOFTPLUS)

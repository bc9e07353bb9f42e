"""A new student attention: one class in `students/`, one line in STUDENTS.

The example is the one in CONTRIBUTING; `tests/test_docs.py` runs the text of that page. Outside the repository, use
`register_student` instead of the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trenchcoat
from trenchcoat.cli import app as cli
from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.models.attach import students_of
from trenchcoat.students import STUDENTS, SumAttention, build_student, register_student


class TerraceSinksAttention(SumAttention):
    """Softmax over the terrace window and four sinks, linear attention over everything older."""

    kind = "terrace"

    def __init__(self, cfg: StudentConfig, **sizes: Any) -> None:
        super().__init__(replace(cfg, sinks=max(cfg.sinks, 4)), **sizes)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_student("terrace_sinks", TerraceSinksAttention)
    yield
    del STUDENTS["terrace_sinks"]


def test_it_matches_the_reference_with_four_sinks() -> None:
    cfg = StudentConfig(name="terrace_sinks", window=4, feature_map=FeatureMapConfig(feature_dim=5))
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    student = build_student(cfg, **sizes).double()
    reference = build_student(replace(cfg, name="terrace", sinks=4, impl="reference"), **sizes).double()
    reference.load_state_dict(student.state_dict())
    q, k, v = (torch.randn(2, heads, 23, 6, dtype=torch.float64) for heads in (4, 2, 2))
    y, _ = student(q, k, v, scale=0.4)
    torch.testing.assert_close(y, reference(q, k, v, scale=0.4)[0])
    state = student.empty_state(2, dtype=torch.float64)
    steps = [student.decode(*(x[:, :, t : t + 1] for x in (q, k, v)), state=state, scale=0.4) for t in range(23)]
    torch.testing.assert_close(torch.cat(steps, 2), y)


def test_linearize_finds_it_by_name(tiny_overrides: list[str]) -> None:
    folder = Path(tiny_overrides[-1].removeprefix("run.dir="))
    more = ["name=terrace_sinks", "feature_map.init=kaiming"]
    more = [*(f"student.{item}" for item in more), "transfer.max_steps=2", "lora=null"]
    assert cli.main(["linearize", "demo", *tiny_overrides, *more]) == 0
    assert "name: terrace_sinks" in (folder / "recipe.yaml").read_text()
    model, _ = trenchcoat.load(folder / "adapter", device="cpu")
    assert all(type(student) is TerraceSinksAttention for student in students_of(model).values())


def test_it_is_suggested_for_a_mistyped_name(tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["linearize", "demo", *tiny_overrides, "student.name=terrace_sink"]) == 2
    assert "did you mean terrace_sinks?" in capsys.readouterr().err

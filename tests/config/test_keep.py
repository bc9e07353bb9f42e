"""`student.keep`: what a recipe may say, and which groups of a layer that keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from trenchcoat.config import StudentConfig, UserError, dump_recipe
from trenchcoat.config.keep import (
    kept_groups,
    kept_total,
    named_layers,
    needs_selection,
    number_of_groups,
    requested_groups,
    restricted,
    whole_layers,
)
from trenchcoat.config.recipe_io import load_recipe


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("none", ()),
        ("null", ()),
        ("[]", ()),
        ("0", ()),
        ("13%", ("13%",)),
        ("12.50 %", ("12.5%",)),
        ("12", ("12 groups",)),
        ("[12]", ("12",)),
        ("[23, 18.2, 7.10, 7.1, 18.2]", ("7.1", "7.10", "18.2", "23")),
    ],
)
def test_what_a_recipe_may_say(written: str, read: tuple[str, ...], tmp_path: Path) -> None:
    """The same from a file, from an override, and from the recipe that a run writes."""
    overridden = load_recipe("demo", [f"student.keep={written}"])
    assert overridden.student.keep == read
    (tmp_path / "recipe.yaml").write_text(f"student:\n  keep: {written}\n")
    assert load_recipe(tmp_path / "recipe.yaml").student.keep == read
    (tmp_path / "again.yaml").write_text(dump_recipe(overridden))
    assert load_recipe(tmp_path / "again.yaml").student.keep == read


@pytest.mark.parametrize("written", ["18.2", "[a]", "[1.2.3]", "[-1]", "[2, true]", "few", "[13%, 4]"])
def test_nonsense_is_refused(written: str) -> None:
    with pytest.raises(UserError, match=r"student\.keep must be a list of layers and groups such as \[23, 18\.2\]"):
        load_recipe("demo", [f"student.keep={written}"])


@pytest.mark.parametrize("written", ["0%", "100%", "150%"])
def test_shares_that_are_none_or_all(written: str) -> None:
    with pytest.raises(UserError, match="must be a share above 0 and below 100 %"):
        load_recipe("demo", [f"student.keep={written}"])


def test_kept_groups_of_a_layer() -> None:
    student = StudentConfig(keep=("2.1", "2.0", "5"), keep_softmax=(7,))
    assert [kept_groups(student, layer, 3) for layer in (0, 2, 5, 7)] == [(), (0, 1), (0, 1, 2), (0, 1, 2)]
    assert named_layers(student) == {2, 5, 7}
    assert whole_layers(student, 3) == {5, 7}
    assert whole_layers(student, 2) == {2, 5, 7}
    assert kept_total(student, layers=8, groups=3) == 8
    with pytest.raises(UserError, match=r"names group 2\.1, but layer 2 has the key/value groups 2\.0 to 2\.0"):
        kept_groups(student, 2, 1)


def test_a_share_asks_for_a_selection() -> None:
    student = StudentConfig(keep=("13%",))
    assert needs_selection(student)
    assert not needs_selection(StudentConfig(keep=("3.1",)))
    assert requested_groups(student, 90) == kept_total(student, layers=30, groups=3) == 12
    assert (number_of_groups(0.001, 90), number_of_groups(0.999, 8)) == (1, 7)
    with pytest.raises(
        UserError, match=r"student\.keep=13% does not say which groups to keep: run `trenchcoat select`"
    ):
        kept_groups(student, 0, 3)
    with pytest.raises(UserError, match=r"student\.keep=90 must be below the number of key/value groups of the model"):
        requested_groups(StudentConfig(keep=("90 groups",)), 90)


def test_restricted_to_some_layers() -> None:
    student = StudentConfig(keep=("2.1", "5", "6.0"), keep_softmax=(1, 7))
    inside = restricted(student, range(5, 8))
    assert (inside.keep, inside.keep_softmax) == (("5", "6.0"), (7,))
    assert restricted(StudentConfig(keep=("13%",)), range(2)).keep == ("13%",)

"""Comparing runs: differences are paired where the rows are the same, and absent where they are not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from report_kit import made_results, made_scores, made_tasks
from trenchcoat.cli import app as cli
from trenchcoat.evaluation.report.compare import (
    RUN_HEADINGS,
    Run,
    loss_table,
    probe_table,
    read_runs,
    same_rows,
    task_table,
    write_comparison,
)
from trenchcoat.evaluation.report.html import write_page
from trenchcoat.evaluation.report.plots import LOOK
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.statistics import Estimate, interval
from trenchcoat.evaluation.task_results import TaskResults, paired


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOOK, "savefig.dpi", 40)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs: a good one, a worse one on the same rows, one on other rows; two have tasks."""
    folders = [tmp_path / name for name in ("a", "b", "c|d")]
    for folder, offset in zip(folders, (0.04, 0.30, 0.04), strict=True):
        folder.mkdir()
        results = made_results()
        results.rows["transfer_lora"] = made_scores(offset, offset, 0.5, seed=len(folder.name) + int(100 * offset))
        if folder is folders[2]:
            for name, scores in results.rows.items():
                moved = [value * 1.1 for value in scores.all.sums]
                results.rows[name] = type(scores)(**{**vars(scores), "all": type(scores.all)(moved, scores.all.counts)})
        results.save(folder / "results.json")
    made_tasks(0.7).save(folders[0] / "tasks.json")
    made_tasks(0.5, seed=1).save(folders[1] / "tasks.json")
    return folders


def test_differences_are_over_the_same_rows_only(runs: list[Path]) -> None:
    found = read_runs(runs)
    first, second, third = loss_table(found).cells
    assert first[6:] == ["–", "–"]
    gap = [float(number) for number in re.findall(r"[+-]\d+\.\d+", second[6])]
    assert gap[1] < gap[0] < gap[2]
    assert gap[0] == pytest.approx(0.26 * 447 / 511 + 0.26 * 32 / 511, abs=0.02)  # tokens after the first W
    assert gap[2] - gap[1] < 0.05
    assert third[6:] == ["–", "–"]
    assert not same_rows(found[0].results, found[2].results)
    assert third[4] != "–"


def test_tasks_are_compared_where_the_rows_are_the_same() -> None:
    a, b, other = made_tasks(0.7), made_tasks(0.5, seed=1), made_tasks(0.5, rows_id="others", seed=1)
    gap = paired(b, a, "piqa", "acc", ("student", "student"))
    assert gap is not None
    right = [x - y for x, y in zip(*(r.tasks["piqa"].scores["student"].rows["acc"] for r in (b, a)), strict=True)]
    assert gap.value == pytest.approx(sum(right) / 200)
    unpaired = (0.5 * 0.5 / 200 + 0.7 * 0.3 / 200) ** 0.5
    assert 0 < gap.error < 0.8 * unpaired
    assert paired(other, a, "piqa", "acc", ("student", "student")) is None
    ((_, _, first, second, third),) = task_table([Run("a", tasks=a), Run("b", tasks=b), Run("c", tasks=other)]).cells
    assert "points" in second
    assert "points" not in first + third


def test_the_page_is_self_contained(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    text, page = (out / "comparison.md").read_text(), (out / "comparison.html").read_text()
    assert text.startswith("# 3 runs side by side")
    assert "c\\|d" in text
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<tr>") == text.count("\n| ") + 0
    assert "needle" in text


def test_runs_of_one_name_are_shown_by_their_paths_and_a_file_of_tasks_is_a_run(tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place / "run").mkdir(parents=True)
        made_results().save(tmp_path / place / "run" / "results.json")
    made_tasks(0.5).save(tmp_path / "only.json")
    runs = read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "only.json"])
    assert len({run.name for run in runs}) == 3
    assert loss_table(runs).cells[2][1:] == ["–"] * (len(RUN_HEADINGS) - 1)
    assert probe_table(runs).cells == [["needle", "only.json", "1x 50 %, 2x 50 %"]]


def test_runs_with_nothing_in_common_still_give_a_report(tmp_path: Path) -> None:
    empty = Run("empty", Results(window=4, seq_len=8))
    path = write_comparison([empty, Run("tasks", tasks=made_tasks(0.5))], tmp_path)
    assert "## Tasks" in path.read_text()


def test_intervals() -> None:
    assert interval(Estimate(0.0, 0.0), [0.0] * 20) == (pytest.approx(0, abs=1e-9), pytest.approx(0.161, abs=1e-3))
    assert interval(Estimate(2.0, 0.5)) == (pytest.approx(1.02, abs=1e-3), pytest.approx(2.98, abs=1e-3))
    assert interval(Estimate(2.0)) is None


def test_text_cannot_break_the_page(tmp_path: Path) -> None:
    write_page(tmp_path / "x.html", "# <script>x</script>\n\n<details><summary>S</summary>\n\na\n\n</details>\n\n"
               "```text\n<details> ![y](z.png)\n```\n", tmp_path)  # fmt: skip
    page = (tmp_path / "x.html").read_text()
    assert "<script" not in page
    assert "<details><summary>S</summary>" in page
    assert page.count("<details>") == page.count("</details>") == 1


def test_pictures_come_from_the_report_s_own_folder(tmp_path: Path) -> None:
    own = tmp_path / "run"
    own.mkdir()
    for place in (own / "a b.png", tmp_path / "other.png"):
        place.write_bytes(b"\x89PNG")
    (own / "link.png").symlink_to(tmp_path / "other.png")
    elsewhere = ["../other.png", str(tmp_path / "other.png"), "%2e%2e/other.png", "link.png", "http://a.example/b.png",
                 "//a.example/b.png", "file:///etc/x.png", "absent.png", "http://a.example/b.svg"]  # fmt: skip
    lines = [f"![shown instead {i}](<{source}> 'title')" for i, source in enumerate(elsewhere)]
    write_page(own / "x.html", "![own](<a b.png>)\n\n" + "\n\n".join(lines), own)
    page = (own / "x.html").read_text()
    assert page.count("<img") == page.count("data:image/png;base64,") == 1
    assert all(f"shown instead {i}" in page for i in range(len(elsewhere)))


def test_saved_is_loaded(tmp_path: Path) -> None:
    tasks = made_tasks(0.6)
    tasks.tasks["piqa"].scores["student"].metrics["ppl"] = Estimate(float("nan"))
    tasks.save(tmp_path / "tasks.json")
    json.loads((tmp_path / "tasks.json").read_text())
    again = TaskResults.load(tmp_path / "tasks.json")
    assert again.tasks["piqa"].scores["student"].rows == tasks.tasks["piqa"].scores["student"].rows
    assert again.probes == tasks.probes


def test_scores_of_the_same_rows_join_and_others_replace() -> None:
    before, student = made_tasks(0.6), made_tasks(0.5, seed=1)
    del student.tasks["piqa"].scores["teacher"]
    rows = student.tasks["piqa"].scores["student"].rows
    before.add(student)
    assert before.tasks["piqa"].scores["student"].rows == rows
    assert "teacher" in before.tasks["piqa"].scores
    other = made_tasks(0.5, rows_id="others")
    del other.tasks["piqa"].scores["teacher"]
    before.add(other)
    assert "teacher" not in before.tasks["piqa"].scores

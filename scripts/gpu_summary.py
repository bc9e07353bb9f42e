"""One table of what scripts/gpu_check.sh has done so far, from the files in its folder.

    python scripts/gpu_summary.py gpu_check

`steps.tsv` has a line for each step: its name, how it ended and its seconds. The figures come from the step's log or
from the file of its benchmark, which are written while the step runs: a step that was stopped has those it reached.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEPARATE = {"sdpa", "flash", "cudnn", "fla"}
"""Other attentions that the operator is compared with."""


def _log(out: Path, step: str) -> str:
    file = out / f"{step}.log"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _selfcheck(out: Path) -> list[str]:
    return [line for line in _log(out, "selfcheck").splitlines() if "tolerance" in line]


OUTCOME = "(?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
ALONE = re.compile(rf"(?P<test>tests/.*\S) {OUTCOME}\b")
BESIDE = re.compile(rf"\[gw\d+\] \[ *\d+%\] {OUTCOME} (?P<test>tests/.*\S)")
COLLECTED = re.compile(r"(?P<outcome>ERROR) (?P<test>tests/[^:\s]+)(?: - .*)?$")
"""How pytest reports a test in one process and in one of several, and a file that it cannot import."""


def _tests(step: str) -> Callable[[Path], list[str]]:
    def lines(out: Path) -> list[str]:
        """How many passed so far, and the first that did not."""
        matched = (form.match(line) for line in _log(out, step).splitlines() for form in (ALONE, BESIDE, COLLECTED))
        seen = [found for found in matched if found]
        counted = Counter(found["outcome"] for found in seen)
        wrong = sorted({found["test"] for found in seen if found["outcome"] in ("FAILED", "ERROR")})
        return [", ".join(f"{count} {name.lower()}" for name, count in counted.items()), *wrong[:8]] if seen else []

    return lines


def _launches(step: str) -> Callable[[Path], list[str]]:
    def lines(out: Path) -> list[str]:
        """The sanitizer's own sum, and how many launches there were."""
        text = _log(out, step)
        ended = text.count(": done")
        return [*re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", text), f"{ended} combinations launched"]

    return lines


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _measured(step: str) -> Callable[[Path], list[str]]:
    def lines(out: Path) -> list[str]:
        """Every measurement of a part of `bench kernels`."""
        file = out / f"kernels_{step}.json"
        if not file.is_file():
            return []
        record = json.loads(file.read_text(encoding="utf-8"))
        return [f"{name}: {_row(row)}" for name, row in record["parts"].get(step, {}).items()]

    return lines


def _row(row: dict[str, Any]) -> str:
    if "out_of_memory" in row:
        return "out of memory"
    said = []
    if "seconds" in row:
        said.append(_milliseconds(row["seconds"]))
    if "share" in row:
        said.append(f"{row['share']:.0%} of the roofline")
    others = {name: taken for name, taken in row.get("others", {}).items() if name in SEPARATE}
    said += [f"{name} {_milliseconds(taken)} ({taken / row['seconds']:.2f}x)" for name, taken in others.items()]
    said += [f"{name} {row[name]:.4g}" for name in ("teacher", "softmax", "ours", "ratio") if name in row]
    said += [f"{name} {row[name]:.4g}" for name in ("rows", "tokens_per_second") if name in row]
    return ", ".join(said)


def _reference(out: Path) -> list[str]:
    log = _log(out, "reference")
    return re.findall(r"^scored .*", log, re.MULTILINE) or log.strip().splitlines()[-1:]


FIGURES: dict[str, Callable[[Path], list[str]]] = {
    "selfcheck": _selfcheck,
    **{step: _tests(step) for step in ("tests", "fla")},
    **{step: _launches(step) for step in ("memcheck", "racecheck", "initcheck")},
    **{step: _measured(step) for step in ("operator", "layer", "model", "decode")},
    "reference": _reference,
}


def summary(out: Path) -> str:
    """The table."""
    lines = [f"{'step':<11}{'seconds':>8}  result"]
    for row in (out / "steps.tsv").read_text(encoding="utf-8").splitlines():
        step, result, taken = row.split("\t")
        lines.append(f"{step:<11}{taken:>8}  {result}" + ("" if result == "passed" else f" ({out / step}.log)"))
        lines += [" " * 21 + line for line in FIGURES[step](out)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))

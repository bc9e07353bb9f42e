"""The tasks and probes that do not need the harness, by name."""

from __future__ import annotations

from trenchcoat.evaluation.mmlu import MmluLetters
from trenchcoat.evaluation.probes import Copy, Needle, Recall
from trenchcoat.evaluation.task import EvalTask

OWN_TASKS: dict[str, EvalTask] = {
    task.name: task
    for task in (
        MmluLetters(),
        Needle(),
        Recall(),
        Copy(),
    )
}
"""Add yours here."""

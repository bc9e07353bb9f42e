"""A student to score and random questions in the benchmarks' formats, for the tests of tasks."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.evaluation.mmlu import task_folder
from trenchcoat.models.attach import attach_students, set_mode

SUBJECTS = sorted(path.stem for path in (task_folder() / "mmlu").glob("[!_]*.yaml"))
WORDS = "coat sum window token state chunk linear small model bone star".split()

SHORTEST_RUN = ["lora=null", "transfer.max_steps=1", "eval.baselines=false", "eval.decode_lengths=[]"]
"""Overrides for a minimal run."""
TOLERANCE = 2e-5
"""Nats: five tokens whose log-probabilities, of size up to about 10, are float32 sums in a different order."""


def model_of(folder: Path, name: str = "terrace", **settings: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    attach_students(model, StudentConfig(name=name, window=8, feature_map=FeatureMapConfig(feature_dim=8), **settings))
    set_mode(model, "student")
    return model


def write_task_files(root: Path) -> Path:
    """MMLU's CSV files and the JSONL files, in the benchmarks' formats, with random questions."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    for split, count in (("dev", 5), ("test", 3)):
        (root / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with (root / "mmlu" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                rows = [
                    [words(5) + '?\n"Now", then', *(words(2) for _ in "ABCD"), rng.choice("ABCD")] for _ in range(count)
                ]
                csv.writer(file).writerows(rows)
    (root / "commonsense").mkdir()
    for name in (
        "piqa_valid",
        "arc_easy_test",
        "arc_challenge_test",
        "openbookqa_test",
        "hellaswag_val",
        "winogrande_dev",
    ):
        rows = [
            {"question": f"{words(3)} _ {words(2)}.", "choices": [words(k + 1) for k in range(2)], "label": i % 2}
            for i in range(5)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "commonsense" / f"{name}.jsonl").write_text(text)
    return root

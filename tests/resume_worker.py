"""Trains both stages of a tiny model in a folder, slowly enough to be killed: ``resume_worker.py RUN DELAY``.

Writes ``weights.json`` into the folder when it finishes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from training_kit import two_stages

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_dir = Path(sys.argv[1])
    outcome = two_stages(run_dir, delay=float(sys.argv[2]))
    (run_dir / "weights.json").write_text(json.dumps(outcome))
    sys.exit(130 if outcome["stopped"] else 0)

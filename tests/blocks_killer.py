"""Runs a blockwise transfer in child processes that are killed (SIGKILL) at random moments, until one finishes.

    python blocks_killer.py SEED DELAY KILLS OVERRIDE...

Prints how many were killed. Children are forked, so they start immediately; DELAY seconds are added to every
micro-batch, to leave time for the kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion.blocks import data as blockdata
from trenchcoat.conversion.blocks import stages as blockstages


def slow(delay: float) -> None:
    """Slow down every micro-batch."""
    make = blockdata.HiddenBatches._make

    def slower(self: Any, wanted: Any) -> Any:
        time.sleep(delay)
        return make(self, wanted)

    blockdata.HiddenBatches._make = slower  # type: ignore[method-assign]


def main(seed: str, delay: str, kills: str, *overrides: str) -> None:
    """Run as described above."""
    torch.set_num_threads(1)
    slow(float(delay))
    moments = random.Random(int(seed))
    recipe = load_recipe("lolcats_llama3_1_8b", list(overrides))
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            blockstages.run_blocks(recipe)
            os._exit(0)
        if killed < int(kills):
            time.sleep(moments.uniform(0.0, 1.2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        sys.stdout.write(f"{killed}\n")
        sys.exit(os.WEXITSTATUS(status))


main(*sys.argv[1:])

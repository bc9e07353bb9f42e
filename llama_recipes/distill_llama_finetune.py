"""Stage 2, LoRA on the transferred model, with the command line of the original research code; see docs/COMPAT.md.

torchrun --nnodes 1 --nproc_per_node 8 llama_recipes/distill_llama_finetune.py (the arguments of distill_llama.py)
"""

import sys
from pathlib import Path

from trenchcoat.cli.compat.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("finetune", configs=Path(__file__).resolve().parents[1] / "configs"))

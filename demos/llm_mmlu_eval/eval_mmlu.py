"""Score a checkpoint of the original research code on MMLU, by its command line; see docs/COMPAT.md.

python demos/llm_mmlu_eval/eval_mmlu.py --model_config ... --finetune_checkpoint_path ...
"""

import sys
from pathlib import Path

from trenchcoat.cli.compat.used import run_use

if __name__ == "__main__":
    sys.exit(run_use("mmlu", configs=Path(__file__).resolve().parents[2] / "configs"))

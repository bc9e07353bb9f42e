"""Score a checkpoint of the original research code on a task, by its command line; see docs/COMPAT.md.

python lm_eval_harness/eval_lm_harness.py --attn_mlp_checkpoint_path ... --finetune_checkpoint_path ... --task piqa
"""

import sys
from pathlib import Path

from trenchcoat.cli.compat.used import run_use

if __name__ == "__main__":
    sys.exit(run_use("eval", configs=Path(__file__).resolve().parents[1] / "configs"))

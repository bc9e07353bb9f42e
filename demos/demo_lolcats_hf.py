"""Talk with a checkpoint of the original research code, by its command line; see docs/COMPAT.md.

python demos/demo_lolcats_hf.py --model_config_path ... --attn_mlp_checkpoint_path ... --finetune_checkpoint_path ...
"""

import sys
from pathlib import Path

from trenchcoat.cli.compat.used import run_use

if __name__ == "__main__":
    sys.exit(run_use("demo", configs=Path(__file__).resolve().parents[1] / "configs"))

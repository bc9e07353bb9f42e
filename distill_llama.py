"""Both stages in one call, with the command line of the original research code; see docs/COMPAT.md.

python distill_llama.py --model_config ... --distill_config ... --finetune_config ...
"""

import sys
from pathlib import Path

from trenchcoat.cli.compat.scripts import run_script

if __name__ == "__main__":
    sys.exit(run_script("both", configs=Path(__file__).resolve().parent / "configs"))

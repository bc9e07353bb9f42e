#!/usr/bin/env bash
# Llama 3.1 8B, the baseline: feature maps, mix and LoRA, without attention transfer before. Settings as in scripts/stages.sh.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export DISTILL_CONFIG=${DISTILL_CONFIG:-no_distill_alpaca_clean}
export FINETUNE_CONFIG=${FINETUNE_CONFIG:-finetune_lora_fqkvo_alpaca_clean}
export STAGES=2
exec "$here/8b_e2e_xent0_mse1000.sh" "$@"

#!/usr/bin/env bash
# Llama 3.1 70B on one GPU: what it will take, then attention transfer, one block after another.
#
#   scripts/llama3_1_70b/trenchcoat/one_gpu.sh
#   HIDDEN_DIR=hidden scripts/llama3_1_70b/trenchcoat/one_gpu.sh blocks.hidden=disk
#
# Settings: scripts/blocks.sh. STEPS="plan transfer" by default. LoRA then takes GPUs that hold the model: finetune.sh.
set -euo pipefail

RECIPE=${RECIPE:-llama3_1_70b_blocks}
# shellcheck source=scripts/blocks.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../blocks.sh"
steps "plan transfer" "$@"

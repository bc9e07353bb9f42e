#!/usr/bin/env bash
# Llama 3.1 8B on one node: attention transfer (squared error alone), then LoRA. scripts/stages.sh lists the settings.
set -euo pipefail

MODEL_CONFIG=${MODEL_CONFIG:-distill_llama3_1_8b_lk_smd_wtk64_fd64_w01}
DISTILL_CONFIG=${DISTILL_CONFIG:-distill_alpaca_clean_xent0_mse1000_lr1e-2}
FINETUNE_CONFIG=${FINETUNE_CONFIG:-finetune_lora_qkvo_alpaca_clean}
# shellcheck source=scripts/stages.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../stages.sh"

both_stages "$@"

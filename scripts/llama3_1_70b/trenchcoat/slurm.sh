#!/usr/bin/env bash
# Llama 3.1 70B under Slurm, from a node that may submit jobs: the inputs of all blocks, a job for each block, then LoRA.
#
#   QUEUE=partition=gpu,account=lab scripts/llama3_1_70b/trenchcoat/slurm.sh
#
# Settings: scripts/blocks.sh. STEPS="collect blocks finetune" by default; each waits for the one before.
set -euo pipefail

RECIPE=${RECIPE:-llama3_1_70b_blocks}
# shellcheck source=scripts/blocks.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../blocks.sh"
steps "collect blocks finetune" "$@"

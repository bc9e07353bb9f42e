#!/usr/bin/env bash
#SBATCH --job-name=trenchcoat-405b-baseline
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --output=slurm-%x-%j.out
# Llama 3.1 405B on N nodes under Slurm, the baseline: feature maps, mix and LoRA, without attention transfer before. Submitted and set as
# 405b_e2e_xent1_mse1000.sh is.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=${ROOT:-${SLURM_SUBMIT_DIR:-$here/../..}}
export DISTILL_CONFIG=${DISTILL_CONFIG:-no_distill_alpaca_clean}
export FINETUNE_CONFIG=${FINETUNE_CONFIG:-finetune_lora_fqkvo_alpaca_clean_llama3_1_405b}
export STAGES=2
exec "$root/scripts/llama3_1_405b/405b_e2e_xent1_mse1000.sh" "$@"

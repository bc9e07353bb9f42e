#!/usr/bin/env bash
#SBATCH --job-name=trenchcoat-405b
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --output=slurm-%x-%j.out
# Llama 3.1 405B on N nodes under Slurm: attention transfer (squared error and cross-entropy), then LoRA.
#
#   sbatch scripts/llama3_1_405b/405b_e2e_xent1_mse1000.sh             from the repository's folder; three nodes
#   sbatch --nodes=8 scripts/llama3_1_405b/405b_e2e_xent1_mse1000.sh
#
# Besides the settings in scripts/stages.sh: ROOT (the repository, where it is not the folder sbatch was called in),
# PORT (of the rendezvous), MAX_RESTARTS (3), ACCUMULATION (micro-batches an optimizer step; one a process). A job that is
# started again continues where it was.
set -euo pipefail

# Slurm runs a copy of this file, so its own place says nothing inside a job.
root=${ROOT:-${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/../..}}
MODEL_CONFIG=${MODEL_CONFIG:-distill_llama3_1_405b_lk_smd_wtk64_fd64_w01}
DISTILL_CONFIG=${DISTILL_CONFIG:-distill_alpaca_clean_xent1_mse1000_lr1e-2}
FINETUNE_CONFIG=${FINETUNE_CONFIG:-finetune_lora_qkvo_alpaca_clean_llama3_1_405b}
if [[ ! -f $root/scripts/stages.sh ]]; then
  echo "$root is not the repository: call sbatch from its folder, or set ROOT" >&2
  exit 2
fi
# shellcheck source=scripts/stages.sh
source "$root/scripts/stages.sh"

slurm_launcher 3
both_stages --fsdp_activation_checkpointing --gradient_accumulation_steps "${ACCUMULATION:-$((nodes * GPUS))}" "$@"

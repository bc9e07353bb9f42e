#!/usr/bin/env bash
#SBATCH --job-name=trenchcoat-70b-lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --output=slurm-%x-%j.out
# Llama 3.1 70B, the last step: LoRA on the transferred blocks, the frozen base shared by all GPUs of the job.
#
#   sbatch scripts/llama3_1_70b/trenchcoat/finetune.sh          from the repository's folder
#
# Settings: scripts/blocks.sh, and ROOT (the repository, where it is not the folder sbatch was called in), PORT (of the
# rendezvous), MAX_RESTARTS (3). A job that is started again continues where it was.
set -euo pipefail

# Slurm runs a copy of this file, so its own place says nothing inside a job.
root=${ROOT:-${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/../../..}}
RECIPE=${RECIPE:-llama3_1_70b_blocks}
if [[ ! -f $root/scripts/blocks.sh ]]; then
  echo "$root is not the repository: call sbatch from its folder, or set ROOT" >&2
  exit 2
fi
# shellcheck source=scripts/blocks.sh
source "$root/scripts/blocks.sh"
finetune 1 "$@"

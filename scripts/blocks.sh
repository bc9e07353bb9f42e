# Sourced by the scripts in llama3_1_*/trenchcoat: attention transfer block by block, then LoRA, in one run's folder, from
# settings that the environment overrides.
#
#   RECIPE            a recipe with blocks: one that ships, or a file
#   MODEL             the pretrained model, where it is not the recipe's: a hub id or a folder
#   RUN_DIR           the run's folder, where it is not the recipe's; every node must see it
#   HIDDEN_DIR        where hidden states go (blocks/hidden in the run's folder)
#   QUEUE             options of every Slurm job, as names and values: partition=gpu,account=lab
#   GPUS              GPUs a node, for the inputs of the blocks and for LoRA (8)
#   TRENCHCOAT, TORCHRUN   the commands (trenchcoat, torchrun)
#   STEPS             which steps to take, where it is not all of a script's
#   DRY_RUN=1         print the commands and run nothing
#
# Arguments are overrides (transfer.xent_weight=0), handed on to every command. A script that is called again continues.
# shellcheck shell=bash

TRENCHCOAT=${TRENCHCOAT:-trenchcoat}
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/run.sh
source "$root/scripts/run.sh"

# settings OVERRIDE ...: what all commands are given goes into `overrides`, Slurm's options into `queue`
settings() {
  overrides=()
  queue=()
  [[ -z ${MODEL:-} ]] || overrides+=("model.path=$MODEL")
  [[ -z ${RUN_DIR:-} ]] || overrides+=("run.dir=$RUN_DIR")
  [[ -z ${HIDDEN_DIR:-} ]] || overrides+=("blocks.hidden_dir=$HIDDEN_DIR")
  overrides+=("$@")
  local option options=()
  IFS=, read -ra options <<<"${QUEUE:-}"
  for option in "${options[@]}"; do
    queue+=("--$option")
  done
}

# step NAME: one step of a script, by the name that STEPS takes
step() {
  case $1 in
    plan) run "$TRENCHCOAT" blocks plan "$RECIPE" "${overrides[@]}" ;;
    transfer) run "$TRENCHCOAT" blocks run "$RECIPE" "${overrides[@]}" ;;
    collect)
      run srun --job-name=trenchcoat-collect --nodes=1 --ntasks=1 "--gpus-per-node=$GPUS" "${queue[@]}" \
        "$TORCHRUN" --nproc_per_node "$GPUS" -m trenchcoat blocks collect "$RECIPE" "${overrides[@]}"
      ;;
    blocks)
      run "$TRENCHCOAT" blocks run "$RECIPE" --parallel --launcher slurm "blocks.slurm=[${QUEUE:-}]" "${overrides[@]}"
      ;;
    finetune)
      local folder
      folder=$(cd -- "$(dirname -- "$0")" && pwd)
      run sbatch --wait "--export=ALL,ROOT=$root" "${queue[@]}" "$folder/finetune.sh" "${overrides[@]}"
      ;;
    *)
      echo "STEPS has '$1'; expected plan, transfer, collect, blocks or finetune" >&2
      return 2
      ;;
  esac
}

# steps DEFAULT OVERRIDE ...: the steps that STEPS names (else those of DEFAULT), in its order, until one fails
steps() {
  local name names=${STEPS:-$1}
  settings "${@:2}"
  for name in $names; do
    step "$name"
  done
}

# finetune NODES OVERRIDE ...: LoRA by all GPUs of this Slurm job
finetune() {
  local nodes launcher
  slurm_launcher "$1"
  settings "${@:2}"
  run "${launcher[@]}" -m trenchcoat finetune "$RECIPE" "${overrides[@]}"
}

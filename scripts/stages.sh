# Sourced by the scripts in the folders beside it: both stages of one run, from settings that the environment overrides.
#
#   MODEL_CONFIG, DISTILL_CONFIG, FINETUNE_CONFIG, EVAL_CONFIG   named configurations, or paths of files
#   MODEL             the pretrained model, where it is not the configuration's: a hub id or a folder
#   DATA_DIR          a local data file, or the folder that holds the data
#   CHECKPOINT_DIR    where the run's folder goes (./checkpoints)
#   GPUS              processes a node (8)
#   SEED, REPLICATE   0
#   STAGES            "1 2", or one of them
#   TORCHRUN          the launcher (torchrun)
#   DRY_RUN=1         print the commands and run nothing
#
# Arguments are handed on to both stages, after everything else.
# shellcheck shell=bash

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/run.sh
source "$root/scripts/run.sh"
launcher=("$TORCHRUN" --nnodes 1 --nproc_per_node "$GPUS")

# both_stages ARGUMENTS ...: the two scripts, by `launcher`
both_stages() {
  local stage script arguments=(
    --model_config "$MODEL_CONFIG"
    --distill_config "$DISTILL_CONFIG"
    --finetune_config "$FINETUNE_CONFIG"
    --eval_config "${EVAL_CONFIG:-eval_alpaca_clean}"
    --lk_zero_init --verbose --replicate "${REPLICATE:-0}" --seed "${SEED:-0}"
    --enable_fsdp --low_cpu_fsdp
  )
  [[ -z ${MODEL:-} ]] || arguments+=(--pretrained_model_name_or_path "$MODEL")
  [[ -z ${DATA_DIR:-} ]] || arguments+=(--data_dir "$DATA_DIR")
  [[ -z ${CHECKPOINT_DIR:-} ]] || arguments+=(--checkpoint_dir "$CHECKPOINT_DIR")
  for stage in ${STAGES:-1 2}; do
    case $stage in
      1) script=distill_llama.py ;;
      2) script=distill_llama_finetune.py ;;
      *)
        echo "STAGES is '$STAGES'; expected 1, 2 or both" >&2
        return 2
        ;;
    esac
    run "${launcher[@]}" "$root/llama_recipes/$script" "${arguments[@]}" "$@"
  done
}

# Sourced by blocks.sh, stages.sh and gpu_check.sh.
# shellcheck shell=bash

TORCHRUN=${TORCHRUN:-torchrun}
GPUS=${GPUS:-8}

# run COMMAND ...: run it, or print it
run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# slurm_launcher NODES: makes `launcher` one torchrun a node of this Slurm job. They meet at the first node under the
# job's number, so no node needs to be given its rank. `nodes` becomes the job's number of nodes (NODES in a dry run).
slurm_launcher() {
  local hosts job=${SLURM_JOB_ID:-0}
  nodes=${SLURM_NNODES:-${NODES:-$1}}
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  elif [[ ${DRY_RUN:-0} == 1 ]]; then
    hosts=(first-node)
  else
    echo "this is a Slurm batch file: sbatch --nodes=N $0 (or DRY_RUN=1 to see its commands)" >&2
    return 2
  fi
  # shellcheck disable=SC2034
  launcher=(
    srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1
    "$TORCHRUN" --nnodes "$nodes" --nproc_per_node "$GPUS" --max_restarts "${MAX_RESTARTS:-3}"
    --rdzv_id "$job" --rdzv_backend c10d --rdzv_endpoint "${hosts[0]}:${PORT:-$((29500 + job % 1000))}"
  )
}

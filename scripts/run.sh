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
# job's number, so no node needs to be given its rank. Outside Slurm, with HEAD=host, the same command on each of the
# NODES machines starts its part and they meet at that host. `nodes` becomes the job's number of nodes (NODES in a dry run).
# shellcheck disable=SC2034
slurm_launcher() {
  local hosts job=${SLURM_JOB_ID:-0}
  nodes=${SLURM_NNODES:-${NODES:-$1}}
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  elif [[ -n ${HEAD:-} ]]; then
    launcher=(
      "$TORCHRUN" --nnodes "$nodes" --nproc_per_node "$GPUS" --max_restarts "${MAX_RESTARTS:-3}"
      --rdzv_id "$job" --rdzv_backend c10d --rdzv_endpoint "$HEAD:${PORT:-29500}"
    )
    return
  elif [[ ${DRY_RUN:-0} == 1 ]]; then
    hosts=(first-node)
  else
    echo "this is a Slurm batch file: sbatch --nodes=N $0; without Slurm: HEAD=localhost NODES=1 bash $0 on one machine," \
      "or HEAD=FIRST_HOST NODES=N bash $0 on each of N (DRY_RUN=1 shows the commands)" >&2
    return 2
  fi
  launcher=(
    srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1
    "$TORCHRUN" --nnodes "$nodes" --nproc_per_node "$GPUS" --max_restarts "${MAX_RESTARTS:-3}"
    --rdzv_id "$job" --rdzv_backend c10d --rdzv_endpoint "${hosts[0]}:${PORT:-$((29500 + job % 1000))}"
  )
}

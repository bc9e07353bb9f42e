#!/usr/bin/env bash
# What a GPU has to say about the Triton kernels, in one command of eight minutes: smallest sizes first, each step with a
# limit of its own, the results of a step written while it runs. After each step summary.txt holds one table of all.
#
#   OUT         folder for logs and figures (gpu_check)
#   STEPS       some of: selfcheck tests memcheck operator layer decode reference racecheck initcheck model fla
#               (the first seven, in this order)
#   LIMIT       seconds for all steps (480); with more, each step's own limit grows in proportion
#   PYTHON      an interpreter with torch, triton, transformers, peft, safetensors and pytest (python3)
#   TESTS       what pytest is given (the kernels' test files); WORKERS its processes, through pytest-xdist
#   SANITIZER   compute-sanitizer, which comes with the CUDA toolkit
#   MODEL, DATA, VALIDATION   for `reference`: SmolLM2's folder or .gguf file, and books to train and to validate on
#   WHEELS      folder of wheels that PYTHON lacks; `reference` needs omegaconf and datasets
#   DEVICE=cpu  a rehearsal without a GPU: everything at toy sizes in Triton's interpreter, without the sanitizer
#   DRY_RUN=1   print the commands and run nothing
#
# It needs neither omegaconf nor datasets, except for `reference`. Arguments are passed on to the benchmark: --quick,
# --layers 16, --repeats 5.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/run.sh
source "$root/scripts/run.sh"
OUT=${OUT:-gpu_check}
PYTHON=${PYTHON:-python3}
SANITIZER=${SANITIZER:-compute-sanitizer}
DEVICE=${DEVICE:-cuda}
LIMIT=${LIMIT:-480}
STEPS=${STEPS:-selfcheck tests memcheck operator layer decode reference}
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [[ $DEVICE == cpu ]]; then
  export TRITON_INTERPRET=1
  TESTS=${TESTS:-tests/ops/test_triton_decode.py}
fi

# The limit of each step in seconds, where all have 480.
declare -A seconds=(
  [selfcheck]=120 [tests]=180 [memcheck]=60 [operator]=90 [layer]=40 [decode]=100 [reference]=150
  [racecheck]=120 [initcheck]=120 [model]=180 [fla]=300
)
for step in $STEPS; do
  if [[ -z ${seconds[$step]:-} ]]; then
    echo "STEPS has '$step'; expected some of ${!seconds[*]}" >&2
    exit 2
  fi
done

if [[ ${DRY_RUN:-0} != 1 ]]; then
  if [[ $DEVICE != cpu ]]; then
    "$PYTHON" -c 'import sys, torch
if not torch.cuda.is_available(): sys.exit("no CUDA device was found; DEVICE=cpu rehearses without")'
  fi
  mkdir -p "$OUT"
  OUT=$(cd -- "$OUT" && pwd)
  : >"$OUT/steps.tsv"
  if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$OUT/site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$OUT/site"
  fi
fi
for name in MODEL DATA VALIDATION; do
  if [[ -n ${!name:-} ]]; then
    printf -v "$name" '%s' "$(realpath -- "${!name}")"
  fi
done
cd "$root"

# bounded COMMAND ...: run it for at most the step's seconds, or print it
bounded() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    run "$@"
  else
    timeout --kill-after 10 "$own" "$@"
  fi
}

# checked TOOL: a launch of every kernel, every allocation apart from the others so that what lies beyond one is seen
checked() {
  local before=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$1" --error-exitcode 1)
  [[ $DEVICE != cpu ]] || before=()
  bounded "${before[@]}" "$PYTHON" scripts/launch_kernels.py --device "$DEVICE"
}

# tested FILE ...: pytest-benchmark would end it with a warning beside xdist's processes
tested() {
  bounded "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -p no:benchmark ${WORKERS:+-n "$WORKERS"} "$@"
}

measured() {
  local part=$1
  shift
  bounded "$PYTHON" -m trenchcoat bench kernels --device "$DEVICE" --only "$part" --out "$OUT/kernels_$part.json" "$@"
}

# SmolLM2's conversion (make reference) on ten times its tokens, in rows of ten
reference() {
  local settings=(
    "model.path=$MODEL" "data.path=$DATA" "run.dir=$OUT/reference"
    "data.cache_dir=$OUT/cache" data.max_rows=null run.progress=plain
  )
  if [[ -n ${VALIDATION:-} ]]; then
    settings+=("data.validation_path=$VALIDATION")
  else
    settings+=(data.validation_fraction=0.1)
  fi
  if [[ $DEVICE == cpu ]]; then
    settings+=(
      model.device=cpu student.keep='[]' student.window=8 data.max_rows=1 data.seq_len=32 lora.seq_len=32
      transfer.max_steps=1 lora.max_steps=1 eval.rows=1 eval.seq_len=32 'eval.length_factors=[1]' eval.copy_rows=1
      'eval.decode_lengths=[16]'
    )
  else
    settings+=(
      model.device=cuda model.dtype=bfloat16 student.impl=triton transfer.batch_size=10 lora.batch_size=10
      eval.batch_size=8
    )
  fi
  bounded "$PYTHON" -m trenchcoat linearize smollm2_135m "${settings[@]}"
}

command_of() {
  local step=$1
  shift
  case $step in
    selfcheck) bounded "$PYTHON" scripts/launch_kernels.py --device "$DEVICE" --selfcheck ;;
    tests)
      # shellcheck disable=SC2086
      tested ${TESTS:-tests/ops/test_triton*.py tests/bench/test_bench_kernels.py}
      ;;
    fla) tested tests/ops/test_fla_gpu.py ;;
    memcheck | racecheck | initcheck) checked "$step" ;;
    operator | layer | model | decode) measured "$step" "$@" ;;
    reference) reference ;;
  esac
}

# skipped STEP: why it cannot be run, or nothing
skipped() {
  if [[ $1 == fla && $DEVICE == cpu ]]; then
    echo "these kernels need a GPU"
  elif [[ $1 == fla ]] && ! "$PYTHON" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("fla") is None)' >"$OUT/fla.log"; then
    echo "fla-core is missing: WHEELS=folder"
  fi
  if [[ $1 == reference ]]; then
    if [[ -z ${MODEL:-} || -z ${DATA:-} ]]; then
      echo "MODEL and DATA were not given"
    elif ! "$PYTHON" -c 'import omegaconf, datasets' 2>/dev/null; then
      echo "omegaconf and datasets are missing: WHEELS=folder"
    fi
  fi
}

failed=0
for step in $STEPS; do
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    if [[ $step != reference || -n ${MODEL:-} ]]; then
      command_of "$step" "$@"
    fi
    continue
  fi
  left=$((LIMIT - SECONDS))
  own=$((seconds[$step] * LIMIT / 480))
  own=$((own > 2 ? own : 2))
  own=$((own < left ? own : left))
  start=$SECONDS
  why=$(skipped "$step")
  if [[ -n $why ]]; then
    result="not run: $why"
  elif ((own < 2)); then
    result="not run: no time left"
    failed=1
  else
    code=0
    command_of "$step" "$@" >"$OUT/$step.log" 2>&1 || code=$?
    case $code in
      0) result=passed ;;
      124 | 137) result="stopped at its limit" failed=1 ;;
      *) result=FAILED failed=1 ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$step" "$result" "$((SECONDS - start))" >>"$OUT/steps.tsv"
  "$PYTHON" scripts/gpu_summary.py "$OUT" | tee "$OUT/summary.txt"
done
exit "$failed"

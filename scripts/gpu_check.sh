#!/usr/bin/env bash
# Everything about the Triton kernels that needs a GPU, in one command: their tests, compute-sanitizer over a launch of
# every kernel, and their benchmark. Each step's output goes into a file, and what passed into summary.txt.
#
#   OUT         folder for logs and figures (gpu_check)
#   STEPS       "tests memcheck racecheck initcheck operator model decode", or some of them
#   PYTHON      an interpreter with the package's requirements and pytest (python3)
#   SANITIZER   compute-sanitizer, which comes with the CUDA toolkit
#   DRY_RUN=1   print the commands and run nothing
#
# Arguments are passed on to the benchmark: --quick, --layers 16, --repeats 5.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/run.sh
source "$root/scripts/run.sh"
OUT=${OUT:-gpu_check}
PYTHON=${PYTHON:-python3}
SANITIZER=${SANITIZER:-compute-sanitizer}
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"

if [[ ${DRY_RUN:-0} != 1 ]]; then
  "$PYTHON" -c 'import sys, torch; sys.exit("no CUDA device was found" * (not torch.cuda.is_available()))'
  mkdir -p "$OUT"
  OUT=$(cd -- "$OUT" && pwd)
  : >"$OUT/summary.txt"
fi
cd "$root"

# checked TOOL: a launch of every kernel, every allocation apart from the others so that what lies beyond one is seen
checked() {
  run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$1" --error-exitcode 1 \
    "$PYTHON" scripts/launch_kernels.py
}

measured() {
  local part=$1
  shift
  run "$PYTHON" -m trenchcoat bench kernels --device cuda --only "$part" --out "$OUT/kernels_$part.json" "$@"
}

command_of() {
  local step=$1
  shift
  case $step in
    tests) run "$PYTHON" -m pytest -q tests/ops/test_triton*.py tests/bench/test_bench_kernels.py ;;
    memcheck | racecheck | initcheck) checked "$step" ;;
    operator | model | decode) measured "$step" "$@" ;;
    *)
      echo "STEPS has '$step'; expected tests, memcheck, racecheck, initcheck, operator, model or decode" >&2
      return 2
      ;;
  esac
}

failed=0
for step in ${STEPS:-tests memcheck racecheck initcheck operator model decode}; do
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    command_of "$step" "$@"
    continue
  fi
  if command_of "$step" "$@" >"$OUT/$step.log" 2>&1; then
    result=passed
  else
    result="FAILED, see $OUT/$step.log"
    failed=1
  fi
  echo "$step: $result" | tee -a "$OUT/summary.txt"
done
exit "$failed"

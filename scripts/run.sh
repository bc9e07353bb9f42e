# Sourced by blocks.sh and stages.sh.
# shellcheck shell=bash

# run COMMAND ...: run it, or print it
run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

#!/usr/bin/env bash
# Llama 3.1 70B, the baseline: LoRA without attention transfer before it. Settings as in scripts/stages.sh.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export DISTILL_CONFIG=${DISTILL_CONFIG:-no_distill_alpaca_clean}
export STAGES=2
exec "$here/70b_e2e_xent0_mse1000.sh" "$@"

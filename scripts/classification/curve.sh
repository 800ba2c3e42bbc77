#!/usr/bin/env bash
# The papers' headline figure for one model and data set: accuracy against memory and FLOPs for the last 1, 2, ... layers,
# one curve a method, and beside them the published points where there are any. Run again, it does only what is missing.
#
# Usage: bash scripts/classification/curve.sh MODEL DATASET [--help] [--dry-run] [-- ARGUMENT ...]
# Environment:
#   SETUP      a or b (default: a)
#   LAYERS     depths (default: 1-14, as published for MCUNet on pets)
#   METHODS    (default: vanilla gradient_filter_r2 hosvd_0.8 asi; of a transformer those of run.sh)
#   BUDGET     (default: hosvd, since budgets are published for 2 and 4 layers only)
#   SEEDS, EPOCHS, WEIGHTS, DATA_DIR, RUNS_DIR   see scripts/classification/run.sh
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../root.bash"
if [[ " $* " == *" --help "* || $# -lt 2 ]]; then
    usage scripts/classification/curve.sh
    [[ " $* " == *" --help "* ]] && exit 0 || exit 2
fi

model="$1"
export LAYERS="${LAYERS:-1-14}" METHODS="${METHODS:-}" BUDGET="${BUDGET:-hosvd}"
if [[ -z "$METHODS" ]] && ! grep -qs "kind: linear" "configs/classification/models/$model.yaml"; then
    METHODS="vanilla gradient_filter_r2 hosvd_0.8 asi"
fi
shift
exec bash scripts/classification/run.sh "${SETUP:-a}" "$model" --report "$@"

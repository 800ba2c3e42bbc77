#!/usr/bin/env bash
# What each part of ASI brings, on the digits (MCUNet, setup B): without the warm start; the published algorithm in place
# of the sequential one; ranks of one energy for all modes of a layer, of one energy for all layers, and ranks at random,
# in place of those with an energy for each mode. All at the memory of HOSVD at energy 0.8. Writes the tables; run again,
# it does only what is missing.
#
# Usage: bash scripts/classification/ablations.sh [--help] [--dry-run] [-- ARGUMENT ...]
# Environment:
#   SEEDS      (default: 233 234 235)
#   LAYERS     (default: 2 4)
#   EPOCHS, RUNS_DIR   see scripts/classification/run.sh
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../root.bash"
if [[ " $* " == *" --help "* ]]; then
    usage scripts/classification/ablations.sh
    exit 0
fi

export LAYERS="${LAYERS:-2 4}" SEEDS="${SEEDS:-233 234 235}"
export METHODS="vanilla hosvd_0.8 asi asi_cold asi_published asi_per_layer asi_one_energy asi_random"
exec bash scripts/classification/run.sh b mcunet digits --report "$@"

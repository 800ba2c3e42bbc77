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
root="$(dirname "${BASH_SOURCE[0]}")/../.."
for name in RUNS_DIR DATA_DIR WEIGHTS VENV; do # a relative path is one of the caller's folder
    [[ -z "${!name:-}" || "${!name}" == /* || "${!name}" == *://* || . -ef "$root" ]] || export "$name=$PWD/${!name}"
done
CDPATH="" cd "$root"
if [[ " $* " == *" --help "* ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/classification/ablations.sh
    exit 0
fi

export LAYERS="${LAYERS:-2 4}" SEEDS="${SEEDS:-233 234 235}"
export METHODS="vanilla hosvd_0.8 asi asi_cold asi_published asi_per_layer asi_one_energy asi_random"
exec bash scripts/classification/run.sh b mcunet digits --report "$@"

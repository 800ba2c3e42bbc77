#!/usr/bin/env bash
# MCUNet in setup B: pretrained on one half of a data set, its last layers fine-tuned on the other half.
#
# Usage: bash scripts/classification/setup_b/mcunet.sh [--help] [--dry-run] [--report] [DATASET ...] [-- ARGUMENT ...]
# Environment: METHODS, LAYERS, SEEDS, EPOCHS, BUDGET, WEIGHTS, DATA_DIR, RUNS_DIR; see scripts/classification/run.sh
set -euo pipefail
[[ " $* " != *" --help "* ]] || sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../run.sh" b mcunet "$@"

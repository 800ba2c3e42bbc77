#!/usr/bin/env bash
# ResNet-18 in setup A: pretrained on ImageNet, its last layers fine-tuned on each data set.
#
# Usage: bash scripts/classification/setup_a/resnet18.sh [--help] [--dry-run] [--report] [DATASET ...] [-- ARGUMENT ...]
# Environment: METHODS, LAYERS, SEEDS, EPOCHS, BUDGET, WEIGHTS, DATA_DIR, RUNS_DIR; see scripts/classification/run.sh
set -euo pipefail
[[ " $* " != *" --help "* ]] || sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../run.sh" a resnet18 "$@"

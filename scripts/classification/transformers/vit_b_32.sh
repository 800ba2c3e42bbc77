#!/usr/bin/env bash
# ViT-B/32 in setup A: pretrained on ImageNet, the last linear layers of its MLPs fine-tuned on each data set with vanilla, HOSVD,
# ASI, WSI and WASI.
#
# Usage: bash scripts/classification/transformers/vit_b_32.sh [--help] [--dry-run] [--report] [DATASET ...] [-- ARGUMENT ...]
# Environment: METHODS, LAYERS, SEEDS, EPOCHS, BUDGET, WEIGHTS, DATA_DIR, RUNS_DIR; see scripts/classification/run.sh
set -euo pipefail
[[ " $* " != *" --help "* ]] || sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
export LAYERS="${LAYERS:-2 4}"
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../run.sh" a vit_b_32 "$@"

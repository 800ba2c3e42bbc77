#!/usr/bin/env bash
# TinyLlama-1.1B-Chat for the classification of texts: the last linear layers of its MLPs fine-tuned with vanilla, ASI at
# rank 20 and WASI at energy 0.1, as in the papers. Its weights come from the hub, or from a folder: WEIGHTS=FOLDER, and
# behind -- also --data.tokenizer FOLDER. Needs some 10 GiB of memory.
#
# Usage: bash scripts/classification/transformers/tinyllama.sh [--help] [--dry-run] [--report] [DATASET ...] [-- ARGUMENT ...]
#        (default: boolq)
# Environment: METHODS, LAYERS, SEEDS, EPOCHS, WEIGHTS, DATA_DIR, RUNS_DIR; see scripts/classification/run.sh
set -euo pipefail
[[ " $* " != *" --help "* ]] || sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
export DATASETS="${DATASETS:-boolq}" LAYERS="${LAYERS:-1-5}" METHODS="${METHODS:-vanilla asi_rank20 wasi_0.1_rank20}"
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../run.sh" a tinyllama "$@"

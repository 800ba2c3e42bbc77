#!/usr/bin/env bash
# TinyLlama-1.1B-Chat for the classification of texts: the last linear layers of its MLPs are fine-tuned with vanilla,
# ASI at rank 20 and WASI at energy 0.1, as in the papers. Run again, it does only what is missing. The weights come from
# the hub, or from a folder: EXTRA="--model.weights FOLDER --data.tokenizer FOLDER". Needs some 10 GiB of memory.
#
# Usage: bash scripts/classification/transformers/tinyllama.sh [--help] [--dry-run] [DATASET ...]     (default: boolq)
# Environment:
#   LAYERS     numbers of trailing layers, or all (default: "1 2 3 4 5")
#   METHODS    configs in configs/classification/methods (default: "vanilla asi_rank20 wasi_0.1_rank20")
#   SEEDS      seeds (default: "233")
#   RUNS_DIR   folder for runs (default: runs)
#   EXTRA      further options for every training run, such as "--data.root /data"
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
dry_run=()
case "${1:-}" in
    --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --dry-run)
        dry_run=(--dry_run)
        shift
        ;;
esac

bash scripts/setup.sh
read -ra layers <<< "${LAYERS:-1 2 3 4 5}"
read -ra methods <<< "${METHODS:-vanilla asi_rank20 wasi_0.1_rank20}"
read -ra seeds <<< "${SEEDS:-233}"
read -ra extra <<< "${EXTRA:-}"
[[ $# -gt 0 ]] || set -- boolq
for dataset in "$@"; do
    "${VENV:-.venv}/bin/python" -m classification sweep --setup a --model tinyllama --dataset "$dataset" \
        --layers "${layers[@]}" --methods "${methods[@]}" --seeds "${seeds[@]}" \
        --runs_dir "${RUNS_DIR:-runs}" "${dry_run[@]}" "${extra[@]}"
done

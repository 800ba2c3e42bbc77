#!/usr/bin/env bash
# Swin-T, setup A: the last linear layers of its MLPs are fine-tuned from ImageNet weights with vanilla, HOSVD, ASI, WSI
# and WASI, per data set and seed. Run again, it does only what is missing. The weights are downloaded once by torchvision.
#
# Usage: bash scripts/classification/transformers/swin_t.sh [--help] [--dry-run] [DATASET ...]     (default: digits)
# Environment:
#   LAYERS     numbers of trailing layers, or all (default: "2 4")
#   METHODS    configs in configs/classification/methods (default: "vanilla hosvd_0.8 asi wsi_0.9 wasi_0.9")
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
read -ra layers <<< "${LAYERS:-2 4}"
read -ra methods <<< "${METHODS:-vanilla hosvd_0.8 asi wsi_0.9 wasi_0.9}"
read -ra seeds <<< "${SEEDS:-233}"
read -ra extra <<< "${EXTRA:-}"
[[ $# -gt 0 ]] || set -- digits
for dataset in "$@"; do
    "${VENV:-.venv}/bin/python" -m classification sweep --setup a --model swin_t --dataset "$dataset" \
        --layers "${layers[@]}" --methods "${methods[@]}" --seeds "${seeds[@]}" \
        --runs_dir "${RUNS_DIR:-runs}" "${dry_run[@]}" "${extra[@]}"
done

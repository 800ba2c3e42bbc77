#!/usr/bin/env bash
# The suite's main job on real images, with no download: setup B with ResNet-18 on handwritten digits. Pretrains on one
# half of the data, measures perplexity, trains vanilla, gradient filter, HOSVD and, at a twentieth of vanilla's memory,
# ASI with factors in float32 and in int8 on the last 2 and 4 layers of the other half, and writes the table and the
# Pareto plot. Run again, it does only what is missing.
#
# Usage: bash scripts/quickstart.sh [--help] [--dry-run] [SEED ...]     (default seed: 233)
# Environment:
#   RUNS_DIR   folder for runs and report (default: runs)
#   METHODS, LAYERS, BUDGET   in place of these
#   EPOCHS, WEIGHTS, DATA_DIR, WORKERS, LAUNCHER   see scripts/classification/run.sh
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/root.bash"
dry_run=()
case "${1:-}" in
    --help)
        usage scripts/quickstart.sh
        exit 0
        ;;
    --dry-run)
        dry_run=(--dry-run)
        shift
        ;;
esac
for word in "$@"; do
    if [[ ! "$word" =~ ^[0-9]+$ ]]; then
        echo "error: unknown argument $word; allowed: --help or --dry-run ahead of all, and seeds, such as 233" >&2
        exit 2
    fi
done

[[ $# -eq 0 ]] || export SEEDS="$*"
export METHODS="${METHODS:-vanilla gradient_filter_r2 hosvd_0.8 asi asi_int8}" LAYERS="${LAYERS:-2 4}" BUDGET="${BUDGET:-1/20}"
exec bash scripts/classification/run.sh b resnet18 "${dry_run[@]}" --report digits

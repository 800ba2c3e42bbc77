#!/usr/bin/env bash
# Regenerate everything that the README shows: both quickstarts with three seeds, and their tables and pictures in
# figures/.
#
# Usage: bash scripts/figures.sh [--help]
# Environment: see scripts/quickstart.sh and scripts/segmentation/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ "${1:-}" == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

bash scripts/quickstart.sh 233 234 235
source="${RUNS_DIR:-runs}/report/classification/B/mcunet/digits"
for file in table.md table.csv pareto.png pareto.svg; do
    cp "$source/$file" "figures/digits_$file"
done
SEEDS="233 234 235" bash scripts/segmentation/quickstart.sh
source="${RUNS_DIR:-runs}/report/segmentation/finetune/pspnet_small/digit_scenes"
for file in table.md table.csv pareto.png predictions.png; do
    cp "$source/$file" "figures/digit_scenes_$file"
done
echo "figures/ holds the README's tables and pictures"

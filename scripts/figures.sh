#!/usr/bin/env bash
# Regenerate everything that the README shows: the quickstart with three seeds, and its table and plot in figures/.
#
# Usage: bash scripts/figures.sh [--help]
# Environment: see scripts/quickstart.sh
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
echo "figures/ holds the README's table and plot"

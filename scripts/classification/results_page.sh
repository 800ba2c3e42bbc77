#!/usr/bin/env bash
# Write figures/setup_b_digits.md and .csv from the runs there are: setup B on the digits, all networks, and ablations of
# ASI. What is planned and not finished is in the tables as missing.
#
# Usage: bash scripts/classification/results_page.sh [--help]
# Environment:
#   RUNS_DIR   folder that holds all runs (default: runs)
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ "${1:-}" == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/classification/results_page.sh
    exit 0
fi

bash scripts/setup.sh
runs="${RUNS_DIR:-runs}"
report="$runs/report/classification/B"
"${VENV:-.venv}/bin/python" -m report "$runs" > /dev/null
for part in "$report/table.md" "$report"/*/digits/table.md; do
    cat "$part"
    echo
done > figures/setup_b_digits.md
cp "$report/table.csv" figures/setup_b_digits.csv
echo "figures/setup_b_digits.md and .csv written"

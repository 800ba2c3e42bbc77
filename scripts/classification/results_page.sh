#!/usr/bin/env bash
# Write figures/setup_b_digits.md and .csv from the runs there are: setup B on the digits, all networks, and ablations of
# ASI. What is planned and not finished is in the tables as missing.
#
# Usage: bash scripts/classification/results_page.sh [--help] [--dry-run]
# Environment:
#   RUNS_DIR   folder that holds all runs (default: runs)
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../root.bash"
runs="${RUNS_DIR:-runs}"
report="$runs/report/classification/B"
case "$*" in
    "") ;;
    --help)
        usage scripts/classification/results_page.sh
        exit 0
        ;;
    --dry-run)
        echo "would write the report of $runs, and from it figures/setup_b_digits.md and .csv"
        exit 0
        ;;
    *)
        echo "error: unknown arguments $*; allowed: --help, --dry-run" >&2
        exit 2
        ;;
esac

bash scripts/setup.sh
"${VENV:-.venv}/bin/python" -m report "$runs" > /dev/null
parts=("$report/table.md" "$report"/*/digits/table.md)
for part in "${parts[@]}" "$report/table.csv"; do
    if [[ ! -s "$part" ]]; then
        echo "error: there is no $part, so figures/setup_b_digits stays as it is: $runs has no runs of setup B on the" \
            "digits; do them first, by scripts/figures.sh, or give another RUNS_DIR" >&2
        exit 2
    fi
done
# Both are whole before either takes its place.
page=figures/setup_b_digits
trap 'rm -f "$page".{md,csv}.part' EXIT
for part in "${parts[@]}"; do
    cat "$part"
    echo
done > "$page.md.part"
cp "$report/table.csv" "$page.csv.part"
mv "$page.md.part" "$page.md"
mv "$page.csv.part" "$page.csv"
echo "$page.md and .csv written"

#!/usr/bin/env bash
# Measure memory and step time of every way to train in less memory, side by side against ordinary training of the same
# layers: table and plot in figures/. Run again, it measures only what the table lacks.
#
# Usage: bash scripts/benchmark.sh [--help] [ARGUMENT ...]     (arguments of python -m benchmarks.memory, such as
#        --networks resnet18 --layers 2 4; all of it takes hours on two CPU cores)
# Environment:
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ "${1:-}" == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

bash scripts/setup.sh
"${VENV:-.venv}/bin/python" -m benchmarks.memory "$@"

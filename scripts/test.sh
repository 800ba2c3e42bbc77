#!/usr/bin/env bash
# Everything that must hold: lint, format, types, shell scripts, all tests; one of them builds the pages of docs/.
#
# Usage: bash scripts/test.sh [--help] [PYTEST ARGUMENT ...]
# Environment:
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ "${1:-}" == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

bash scripts/setup.sh
bin="${VENV:-.venv}/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
shopt -s globstar
"$bin/shellcheck" .ci/run scripts/**/*.sh
"$bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

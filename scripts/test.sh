#!/usr/bin/env bash
# Everything that must hold: lint, format, types, shell scripts, all tests; one of them builds the pages of docs/.
#
# Usage: bash scripts/test.sh [--help] [--dry-run] [PYTEST ARGUMENT ...]
# Environment:
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/root.bash"
dry_run=""
case "${1:-}" in
    --help)
        usage scripts/test.sh
        exit 0
        ;;
    --dry-run)
        dry_run=yes
        shift
        ;;
esac

bin="${VENV:-.venv}/bin"
# Runs a command; a dry run prints its words alone.
run() {
    if [[ -n "$dry_run" ]]; then echo "${*@Q}"; else "$@"; fi
}
run bash scripts/setup.sh
# Refuses an option that pytest does not know ahead of the minutes that the rest takes.
[[ -n "$dry_run" || $# -eq 0 ]] || "$bin/python" -m pytest --version --version "$@" > /dev/null 2>&1 || {
    echo "error: pytest does not take the arguments $*; see pytest --help" >&2
    exit 2
}
run "$bin/ruff" check .
run "$bin/ruff" format --check .
run "$bin/mypy"
shopt -s globstar
run "$bin/shellcheck" .ci/run scripts/**/*.{bash,sh}
run "$bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Make the virtual environment with every pinned package, and the suite itself in it. Does nothing when it is up to date.
#
# Usage: bash scripts/setup.sh [--help] [--dry-run]
# Environment:
#   VENV     folder of the virtual environment (default: .venv)
#   PYTHON   Python 3.11 or newer to make it with (default: python3)
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/root.bash"
case "$*" in
    "" | --dry-run) ;;
    --help)
        usage scripts/setup.sh
        exit 0
        ;;
    *)
        echo "error: unknown arguments $*; allowed: --help, --dry-run" >&2
        exit 2
        ;;
esac

venv="${VENV:-.venv}"
python="${PYTHON:-python3}"
shim=scripts/torchvision_on_cpu # makes torchvision importable beside a torch without CUDA
wanted="$(cat requirements.txt pyproject.toml "$shim"/*.toml "$shim"/*.py | cksum)"
if [[ -f "$venv/.installed" && "$(cat "$venv/.installed")" == "$wanted" ]]; then
    [[ "${1:-}" != --dry-run ]] || echo "$venv is up to date"
    exit 0
fi
if [[ "${1:-}" == --dry-run ]]; then
    echo "would install the packages of requirements.txt into $venv"
    exit 0
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is older than Python 3.11; give another one as PYTHON" >&2
    exit 2
fi
echo "installing the packages of requirements.txt into $venv (some minutes, about 2 GB) ..."
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -e . "./$shim"
echo "$wanted" > "$venv/.installed.part"
mv "$venv/.installed.part" "$venv/.installed"

#!/usr/bin/env bash
# FCN with ResNet-18: every method at 5 and 10 layers, and the tables.
#
# Usage: bash scripts/segmentation/fcn.sh [--help] [--dry-run] [DATASET]
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/sweep.sh" fcn "$@"

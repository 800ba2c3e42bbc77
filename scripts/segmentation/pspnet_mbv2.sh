#!/usr/bin/env bash
# PSPNet with MobileNetV2: every method at 5 and 10 layers, and the tables.
#
# Usage: bash scripts/segmentation/pspnet_mbv2.sh [--help] [--dry-run] [DATASET]
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/sweep.sh" pspnet_mbv2 "$@"

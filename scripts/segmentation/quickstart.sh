#!/usr/bin/env bash
# Segmentation on real images, with no download: a small network on digit scenes. Pretrains on scenes of the digits 0 to
# 4, calibrates to the digits 5 to 9, measures perplexity, trains vanilla, gradient filter, HOSVD and ASI on the last
# layers, and writes the table and a picture of input, truth and every method's prediction. Run again, it does only what
# is missing.
#
# Usage: bash scripts/segmentation/quickstart.sh [--help] [--dry-run]
# Environment:
#   NETWORK                  pspnet_small (default) or deeplabv3_mbv2_small
#   METHODS, LAYERS, SEEDS   what to train (default: vanilla gradient_filter hosvd_0.8 asi; 10; 233)
#   DATA_DIR, RUNS_DIR       folders of data sets, and of runs and report (default: data, runs)
#   BUDGET                   ASI's memory (default: 1/20, of vanilla's; see sweep.sh)
#   ITERATIONS               length of the fine-tuning runs (default: 200)
#   WORKERS, LAUNCHER        see sweep.sh; with slurm no picture is drawn
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../root.bash"
case "$*" in
    "" | --dry-run) ;;
    --help)
        usage scripts/segmentation/quickstart.sh
        exit 0
        ;;
    *)
        echo "error: unknown arguments $*; allowed: --help, --dry-run" >&2
        exit 2
        ;;
esac

network="${NETWORK:-pspnet_small}"
export BUDGET="${BUDGET:-1/20}"
export METHODS="${METHODS:-vanilla gradient_filter hosvd_0.8 asi}" LAYERS="${LAYERS:-10}" SEEDS="${SEEDS:-233}"
# Whoever ends the script ends the run, from its first moment on, and waits for what it saves.
trap 'kill "${!-}" 2> /dev/null || exit 143' TERM
trap : INT # a terminal's Ctrl-C reaches the run as well, where that does not ignore it, as what is begun by & does
(trap - INT && exec bash scripts/segmentation/sweep.sh "$network" "$@" digit_scenes) &
sweep=$!
code=0
wait "$sweep" || code=$?
while kill -0 "$sweep" 2> /dev/null; do
    code=0
    wait "$sweep" || code=$?
done
trap - INT TERM
[[ "$code" -eq 0 ]] || exit "$code"
[[ "${1:-}" != --dry-run && "${LAUNCHER:-local}" != slurm ]] || exit 0
runs="${RUNS_DIR:-runs}"
read -rd '' -a methods <<< "$METHODS" || true
finished=()
# A method that takes ranks has its budget in its name, such as asi_1of20 or asi_hosvd_0.8.
budget="${BUDGET%%[[:space:]]*}"
budget="${budget/\//of}"
for method in "${methods[@]}"; do
    for name in "$method" "${method}_${budget/#hosvd/hosvd_0.8}"; do
        folder="$runs/segmentation/finetune/$network/digit_scenes/$name/layers${LAYERS%%[[:space:]]*}/seed${SEEDS%%[[:space:]]*}"
        [[ ! -e "$folder/result.json" ]] || finished+=("$folder")
    done
done
picture="$runs/report/segmentation/finetune/$network/digit_scenes/predictions.png"
"${VENV:-.venv}/bin/python" -m segmentation picture "${finished[@]}" --output "$picture"
echo "$picture"

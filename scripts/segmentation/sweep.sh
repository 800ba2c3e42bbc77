#!/usr/bin/env bash
# Calibrate a pretrained network to a data set, measure perplexity, train every method at 5 and 10 layers, and write the
# tables. Run again, it does only what is missing. The scripts beside this one name the network.
#
# Usage: bash scripts/segmentation/sweep.sh NETWORK [--help] [--dry-run] [DATASET] [-- ARGUMENT ...]
#   DATASET   voc12aug (default), cityscapes, digit_scenes or digit_scenes_96; behind -- arguments of every run, such as
#             --amp
# Environment:
#   METHODS      methods to train (default: all of configs/segmentation/methods)
#   LAYERS       depths: 5, 10, all (default: 5 10)
#   SEEDS        seeds (default: 233)
#   DATA_DIR     folder of the data sets (default: data)
#   RUNS_DIR     folder for runs and report (default: runs)
#   ITERATIONS   length of the fine-tuning runs (default: the papers' 20000; of digit scenes 200 and 800)
#   BUDGET       memory of ASI and other methods that take ranks, each of several trained: published, hosvd for that of
#                the HOSVD run, such as 1/22 for that part of the vanilla run's, or such as 0.5mib (default: published
#                where it is known, else hosvd)
#   WEIGHTS      weights to start from, a file or an address (default: those published for Cityscapes; of digit scenes
#                a pretraining run; with cityscapes they must be given)
#   WORKERS      runs at a time (default: 1)
#   LAUNCHER     local or slurm (default: local); what sbatch needs goes behind --, such as -- --slurm.partition gpu
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../root.bash"
network="${1:---help}"
shift || true
dry_run=()
if [[ "$network" == --help || "${1:-}" == --help ]]; then
    shown="$network.sh"
    [[ "$network" != --help ]] || shown="sweep.sh NETWORK"
    sed -n "2,/^set /{/^set /d;s/^# \{0,1\}//;s/sweep.sh NETWORK/$shown/;p}" scripts/segmentation/sweep.sh
    exit 0
elif [[ "${1:-}" == --dry-run ]]; then
    dry_run=(--dry-run)
    shift
fi
for word in "$network" "$@"; do
    [[ "$word" != -- ]] || break
    if [[ "$word" == -* && ("$word" != --dry-run || "$word" == "$network") ]]; then
        echo "error: unknown argument $word; allowed: --help, --dry-run, and behind -- arguments of every run" >&2
        exit 2
    fi
done

bash scripts/setup.sh
python="${VENV:-.venv}/bin/python"
runs="${RUNS_DIR:-runs}"
# Lists may be of several lines, as `seq` writes them.
read -rd '' -a methods <<< "${METHODS:-}" || true
read -rd '' -a layers <<< "${LAYERS:-5 10}" || true
read -rd '' -a seeds <<< "${SEEDS:-233}" || true
read -rd '' -a budgets <<< "${BUDGET:-}" || true
dataset=voc12aug
if [[ $# -gt 0 && "$1" != -- ]]; then
    dataset="$1"
    shift
fi
options=(--model "$network" --dataset "$dataset" --layers "${layers[@]}" --seeds "${seeds[@]}")
options+=(--runs-dir "$runs" --data-dir "${DATA_DIR:-data}" "${dry_run[@]}")
[[ ${#methods[@]} -eq 0 ]] || options+=(--methods "${methods[@]}")
[[ -z "${ITERATIONS:-}" ]] || options+=(--iterations "$ITERATIONS")
[[ ${#budgets[@]} -eq 0 ]] || options+=(--budget "${budgets[@]}")
[[ -z "${WEIGHTS:-}" ]] || options+=(--weights "$WEIGHTS")
[[ -z "${WORKERS:-}" ]] || options+=(--workers "$WORKERS")
[[ -z "${LAUNCHER:-}" ]] || options+=(--launcher "$LAUNCHER")
exec "$python" -m segmentation sweep "${options[@]}" --report "$@"

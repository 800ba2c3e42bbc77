#!/usr/bin/env bash
# Train one model in one setup on data sets, one after the other: measure perplexity, then train every method at every
# depth and seed (in setup B, first pretrain on one half of the data). A run that fails stops those alone that need it;
# failures are listed at the end with their logs, and the exit code is not zero. Run again, it does only what is
# missing; stopped or killed, it loses at most the epoch under way.
#
# Usage: bash scripts/classification/run.sh SETUP MODEL [--help] [--dry-run] [--report] [DATASET ...] [-- ARGUMENT ...]
#        (SETUP: a or b; MODEL: a name in configs/classification/models; --report: afterwards write the tables and
#        plots of all runs; behind -- arguments of every run, such as --data.batch_size 16)
#
# DATASET is the name of a file in configs/classification/data. Default in setup A: pets flowers102 cub200 cifar10
# cifar100; in setup B: imagenet.
#
# Environment:
#   DATASETS   in place of DATASET
#   METHODS    names in configs/classification/methods
#              (default: vanilla gradient_filter_r2 gradient_filter_r4 gradient_filter_r7 hosvd_0.8 asi; of a
#              transformer: vanilla hosvd_0.8 asi wsi_0.9 wasi_0.9)
#   LAYERS     numbers of trailing layers, ranges such as 1-14, or all (default: 2 4, and vanilla on all as well)
#   SEEDS      (default: 233)
#   EPOCHS     of every training run (default: the setup's)
#   BUDGET     memory of ASI and other methods that take ranks, each of several trained: published, hosvd for that of the
#              HOSVD run, such as 1/22 for that part of the vanilla run's, or such as 0.5mib (default: published where it
#              is known, else hosvd)
#   WEIGHTS    file to start from, in place of pretraining (setup B) or of a download (setup A)
#   DATA_DIR   folder that holds all data sets (default: data)
#   RUNS_DIR   folder that holds all runs (default: runs)
#   WORKERS    runs at a time (default: 1)
#   LAUNCHER   local or slurm (default: local); what sbatch needs goes behind --, such as -- --slurm.partition gpu
#   VENV, PYTHON   see scripts/setup.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../root.bash"
for word in "$@"; do
    [[ "$word" != -- ]] || break
    if [[ "$word" == --help ]]; then
        usage scripts/classification/run.sh
        exit 0
    fi
done
if [[ $# -lt 2 ]]; then
    usage scripts/classification/run.sh >&2
    exit 2
fi

options=(--setup "$1" --model "$2" --runs-dir "${RUNS_DIR:-runs}")
setup="$1"
shift 2
datasets=()
while [[ $# -gt 0 && "$1" != -- ]]; do
    case "$1" in
        --dry-run | --report) options+=("$1") ;;
        -*)
            echo "error: unknown argument $1; allowed: --help, --dry-run, --report, and behind -- arguments of every run" >&2
            exit 2
            ;;
        *) datasets+=("$1") ;;
    esac
    shift
done
if [[ ${#datasets[@]} -eq 0 ]]; then
    usual="pets flowers102 cub200 cifar10 cifar100"
    [[ "$setup" != b ]] || usual=imagenet
    read -rd '' -a datasets <<< "${DATASETS:-$usual}" || true
fi
options+=(--dataset "${datasets[@]}")
for name in METHODS LAYERS SEEDS EPOCHS BUDGET WEIGHTS DATA_DIR WORKERS LAUNCHER; do
    # Lists are words with blanks or ends of lines between them, as `seq` writes them; a path may hold blanks.
    case "$name" in
        METHODS | LAYERS | SEEDS | BUDGET) read -rd '' -a words <<< "${!name:-}" || true ;;
        *) words=(${!name:+"${!name}"}) ;;
    esac
    option="${name,,}"
    [[ ${#words[@]} -eq 0 ]] || options+=("--${option/_/-}" "${words[@]}")
done

bash scripts/setup.sh
python="${VENV:-.venv}/bin/python"
# The run takes the place of this shell, so that whoever stops or kills the script reaches it.
exec "$python" -m classification sweep "${options[@]}" "$@"

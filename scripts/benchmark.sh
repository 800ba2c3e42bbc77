#!/usr/bin/env bash
# Measure side by side against ordinary training of the same layers, into figures/. Run again, it measures only what the
# tables lack. All of it takes hours on two CPU cores.
#
# Usage: bash scripts/benchmark.sh [--help] [--dry-run] [memory|speed|gradient_error|fashion|review_sentences] [ARGUMENT ...]
#        memory: kept, peak and resident bytes of every way to train in less memory
#        speed:  compression, layers, whole networks, growth, perplexity and the allocator, as ratios of times
#        gradient_error, fashion: gradients and accuracy at equal memory, on Fashion-MNIST (prepare it first), such as
#        gradient_error --weights efficientnet_lite0=FILE, or fashion --weights FILE
#        review_sentences: MiniLM by every method on sentences of film reviews (prepare them first): --weights FOLDER
#        without any, memory and speed; arguments are those of python -m benchmarks.memory or benchmarks.speed, such as
#        --networks resnet18 --batch 32
# Environment:
#   VENV, PYTHON   see scripts/setup.sh
#   OMP_PROC_BIND  default true: each thread stays on its core; two that share one wait for each other, 16 ms at a time
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/root.bash"
parts=(memory speed)
dry_run=""
if [[ "${1:-}" == --dry-run ]]; then
    dry_run=yes
    shift
fi
case "${1:-}" in
    --help)
        usage scripts/benchmark.sh
        exit 0
        ;;
    memory | speed | gradient_error | fashion | review_sentences)
        parts=("$1")
        shift
        ;;
esac
if [[ -n "$dry_run" ]]; then
    for part in "${parts[@]}"; do
        words=(-m "benchmarks.$part" "$@")
        echo "python ${words[*]@Q}"
    done
    exit 0
fi

bash scripts/setup.sh
export OMP_PROC_BIND="${OMP_PROC_BIND:-true}"
for part in "${parts[@]}"; do
    "${VENV:-.venv}/bin/python" -m "benchmarks.$part" "$@"
done

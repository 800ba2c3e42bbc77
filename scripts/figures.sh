#!/usr/bin/env bash
# Regenerate everything that the README shows of results, in figures/: digits with MCUNet and the quickstart of
# segmentation, with three seeds, their tables and pictures; long training on larger scenes; the experiment on digits
# with two small transformers, with weights as factors too; five networks at a twentieth; the three larger networks at
# more settings, and the ablations of ASI, as one page of tables. Run again, it does only what is missing. All of it
# takes hours on two CPU cores.
#
# Usage: bash scripts/figures.sh [--help] [--dry-run]
# Environment: see scripts/classification/run.sh and scripts/segmentation/quickstart.sh
set -euo pipefail
# shellcheck source=scripts/root.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/root.bash"
dry_run=()
case "${1:-}" in
    --help)
        usage scripts/figures.sh
        exit 0
        ;;
    --dry-run)
        dry_run=(--dry-run)
        shift
        ;;
esac
if [[ $# -gt 0 ]]; then
    echo "error: unknown argument $1; allowed: --help, --dry-run" >&2
    exit 2
fi

# Copies FOLDER/FILE to figures/NAME, for each pair of FILE and NAME: none of them unless all were copied whole.
publish() {
    local folder="$1" pairs=("${@:2}") at
    [[ ${#dry_run[@]} -eq 0 ]] || return 0
    for ((at = 0; at < ${#pairs[@]}; at += 2)); do
        if ! cp "$folder/${pairs[at]}" "figures/${pairs[at + 1]}.part"; then
            rm -f figures/*.part
            echo "error: $folder/${pairs[at]} cannot be copied, so no file of it in figures/ is replaced" >&2
            exit 1
        fi
    done
    for ((at = 1; at < ${#pairs[@]}; at += 2)); do
        mv "figures/${pairs[at]}.part" "figures/${pairs[at]}"
    done
}

runs="${RUNS_DIR:-runs}"
report="$runs/report/classification/B"
METHODS="vanilla gradient_filter_r2 hosvd_0.8 asi asi_int8 asi_int8_derived" LAYERS="2 4" SEEDS="233 234 235" BUDGET=1/20 \
    RUNS_DIR="$runs" bash scripts/classification/setup_b/mcunet.sh digits --report "${dry_run[@]}"
publish "$report/mcunet/digits" \
    table.md digits_table.md table.csv digits_table.csv pareto.png digits_pareto.png pareto.svg digits_pareto.svg

for network in pspnet deeplabv3_mbv2; do
    NETWORK="${network}_small" SEEDS="233 234 235" bash scripts/segmentation/quickstart.sh "${dry_run[@]}"
    name=digit_scenes
    [[ "$network" == pspnet ]] || name+="_$network"
    publish "$runs/report/segmentation/finetune/${network}_small/digit_scenes" \
        table.md "${name}_table.md" table.csv "${name}_table.csv" \
        pareto.png "${name}_pareto.png" predictions.png "${name}_predictions.png"
done

digit_scenes=(-m benchmarks.digit_scenes --runs-dir "$runs" --data-dir "${DATA_DIR:-data}")
if [[ ${#dry_run[@]} -eq 0 ]]; then
    "${VENV:-.venv}/bin/python" "${digit_scenes[@]}"
else
    echo "python ${digit_scenes[*]@Q}"
fi

for model in vit_mini swin_mini; do
    seeds="233 234 235"
    [[ "$model" == vit_mini ]] || seeds+=" 236 237 238"
    METHODS="vanilla hosvd_0.8 asi asi_int8 wasi_0.9" LAYERS=all SEEDS="$seeds" BUDGET=1/20 RUNS_DIR="$runs" \
        bash scripts/classification/run.sh b "$model" digits --report "${dry_run[@]}"
    publish "$report/$model/digits" table.md "${model}_digits.md" table.csv "${model}_digits.csv" \
        pareto.png "${model}_digits_pareto.png"
done

# Five networks at a twentieth, in a folder of their own: a page has all runs of one.
export METHODS="vanilla asi asi_int8 asi_int8_derived_20000" SEEDS="233 234 235" BUDGET=1/20
for model in mcunet mobilenet_v2 resnet18 resnet34; do
    LAYERS=4 RUNS_DIR="$runs/twentieth" bash "scripts/classification/setup_b/$model.sh" digits "${dry_run[@]}"
done
METHODS="vanilla asi asi_int8" LAYERS=all RUNS_DIR="$runs/twentieth" \
    bash scripts/classification/run.sh b vit_mini digits --report "${dry_run[@]}"
publish "$runs/twentieth/report/classification/B" table.md digits_twentieth.md table.csv digits_twentieth.csv
unset BUDGET

export METHODS="vanilla gradient_filter_r2 svd_0.8 hosvd_0.8 asi" LAYERS="2 4" SEEDS="233 234 235"
for model in mobilenet_v2 resnet18 resnet34; do
    bash "scripts/classification/setup_b/$model.sh" digits "${dry_run[@]}"
done
bash scripts/classification/ablations.sh "${dry_run[@]}"
bash scripts/classification/results_page.sh "${dry_run[@]}"

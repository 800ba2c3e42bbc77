#!/usr/bin/env bash
# Regenerate everything that the README shows of results, in figures/: digits with MCUNet and the quickstart of
# segmentation, with three seeds, their tables and pictures; long training on larger scenes; the experiment on digits
# with two small transformers, with weights as factors too; five networks at a twentieth; the three larger networks at
# more settings, and the ablations of ASI, as one page of tables. Run again, it does only what is missing. All of it
# takes hours on two CPU cores.
#
# Usage: bash scripts/figures.sh [--help]
# Environment: see scripts/classification/run.sh and scripts/segmentation/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ "${1:-}" == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

runs="${RUNS_DIR:-runs}"
report="$runs/report/classification/B"
METHODS="vanilla gradient_filter_r2 hosvd_0.8 asi asi_int8 asi_int8_derived" LAYERS="2 4" SEEDS="233 234 235" BUDGET=1/20 \
    RUNS_DIR="$runs" bash scripts/classification/setup_b/mcunet.sh digits --report
for file in table.md table.csv pareto.png pareto.svg; do
    cp "$report/mcunet/digits/$file" "figures/digits_$file"
done

for network in pspnet deeplabv3_mbv2; do
    NETWORK="${network}_small" SEEDS="233 234 235" bash scripts/segmentation/quickstart.sh
    name=digit_scenes
    [[ "$network" == pspnet ]] || name+="_$network"
    for file in table.md table.csv pareto.png predictions.png; do
        cp "$runs/report/segmentation/finetune/${network}_small/digit_scenes/$file" "figures/${name}_$file"
    done
done

"${VENV:-.venv}/bin/python" -m benchmarks.digit_scenes --runs-dir "$runs" --data-dir "${DATA_DIR:-data}"

for model in vit_mini swin_mini; do
    seeds="233 234 235"
    [[ "$model" == vit_mini ]] || seeds+=" 236 237 238"
    METHODS="vanilla hosvd_0.8 asi asi_int8 wasi_0.9" LAYERS=all SEEDS="$seeds" BUDGET=1/20 RUNS_DIR="$runs" \
        bash scripts/classification/run.sh b "$model" digits --report
    for kind in md csv; do
        cp "$report/$model/digits/table.$kind" "figures/${model}_digits.$kind"
    done
    cp "$report/$model/digits/pareto.png" "figures/${model}_digits_pareto.png"
done

# Five networks at a twentieth, in a folder of their own: a page has all runs of one.
export METHODS="vanilla asi asi_int8 asi_int8_derived_20000" SEEDS="233 234 235" BUDGET=1/20
for model in mcunet mobilenet_v2 resnet18 resnet34; do
    LAYERS=4 RUNS_DIR="$runs/twentieth" bash "scripts/classification/setup_b/$model.sh" digits
done
METHODS="vanilla asi asi_int8" LAYERS=all RUNS_DIR="$runs/twentieth" \
    bash scripts/classification/run.sh b vit_mini digits --report
for kind in md csv; do
    cp "$runs/twentieth/report/classification/B/table.$kind" "figures/digits_twentieth.$kind"
done
unset BUDGET

export METHODS="vanilla gradient_filter_r2 svd_0.8 hosvd_0.8 asi" LAYERS="2 4" SEEDS="233 234 235"
for model in mobilenet_v2 resnet18 resnet34; do
    bash "scripts/classification/setup_b/$model.sh" digits
done
bash scripts/classification/ablations.sh
bash scripts/classification/results_page.sh

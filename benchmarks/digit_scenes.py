"""A small PSPNet on digit scenes of 96 pixels for 800 steps: what ASI loses at a twentieth of the memory, and in parts.

    python -m benchmarks.digit_scenes [--seeds 233 234 235] [--parts 2 4] [--help]

The runs are those of `python -m segmentation sweep` with the recipe in configs/segmentation; what is done is not run
again. In parts, the gradients of a batch of 16 are summed up over 2 or 4 parts, one at a time, so that at the same
bytes each may keep 2 or 4 times as much of what it takes; with frozen statistics the sum is the gradient of the batch.
"""

from __future__ import annotations

import itertools
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from benchmarks.rows import spread, table
from experiment import Record
from experiment.files import write_whole
from experiment.history import METRICS
from experiment.record import RESULT, TABLE
from segmentation.cli import main as command
from segmentation.sweep import Sweep, parse

NETWORK, DATASET, LAYERS, BATCH, STEPS, DIVISOR = "pspnet_small", "digit_scenes_96", "10", 16, 800, 20
EXACT, WHOLE = "vanilla", ("asi", "asi_int8", "asi_int8_derived_20000")
KEY = ["layers", "method", "parts", "seed"]


def in_parts(sweep: Sweep, method: str, count: int, seed: int) -> Iterator[tuple[list[str], Path]]:
    """The commands of a run that trains a batch in so many parts, and the file that each leaves.

    It starts from the weights of the other runs; its ranks are chosen on a part, for the same bytes.
    """
    folder = sweep.runs_dir / f"parts_{count}"
    measured = sweep.run(DATASET, "perplexity", LAYERS, sweep.table_seed(seed))
    trained = sweep.run(DATASET, f"{method}_1of{DIVISOR}", LAYERS, seed)
    vanilla = sweep.run(DATASET, EXACT, LAYERS, seed).folder(sweep.runs_dir)
    found = measured.folder(folder) / TABLE
    cut = (f"train_dataloader.batch_size={BATCH // count}", f"optim_wrapper.accumulative_counts={count}")
    budget = ["--budget-table", str(found), "--budget-run", str(vanilla), "--budget-divisor", str(DIVISOR)]
    places = [*sweep.start(DATASET, seed), "--runs-dir", str(folder)]  # the last of a repeated option counts
    yield [*sweep.arguments("measure", measured, EXACT), *places, "--cfg-options", *cut], found
    length = ["--iterations", str(STEPS * count)]
    words = [*sweep.arguments("fit", trained, method), *places, *length, *budget, "--cfg-options", *cut]
    yield words, trained.folder(folder) / RESULT


def row(folder: Path, record: Record, method: str, count: int) -> dict[str, object]:
    """Of a finished run: accuracies in percent, the mean loss of the last eighth of its steps, bytes of a part."""
    return {
        **{"layers": record.run.layers, "method": method, "parts": count, "seed": record.run.seed},
        **{key: 100 * value for key, value in record.accuracy.items()},
        "train_loss": float(pd.read_csv(folder / METRICS).train_loss.iloc[-1]),
        "formula_bytes": record.memory_bytes["activation_formula"],
        "kept_bytes": record.memory_bytes["saved_measured"],
    }


def summary(rows: pd.DataFrame) -> str:
    """Per method: accuracy and its gap to vanilla of the same seed, last training loss, bytes."""
    exact = rows[rows.method == EXACT].set_index(["layers", "seed"])
    for column in ("miou_best", "miou_last", "formula_bytes", "kept_bytes"):
        rows = rows.join(exact[column].rename(f"exact_{column}"), on=["layers", "seed"])
    heads = ["layers", "method", "parts", "seeds", "mIoU, %", "gap", "gap, last", "training loss"]
    heads += ["formula", "kept, MiB"]
    lines = []
    for key, group in rows.groupby(["layers", "method", "parts"], sort=False):
        gaps = [spread(group[name] - group[f"exact_{name}"], "+") for name in ("miou_best", "miou_last")]
        gaps = ["-", "-"] if key[1] == EXACT else gaps
        less = (group.exact_formula_bytes / group.formula_bytes).mean()
        kept, times = group.kept_bytes.mean() / 2**20, (group.exact_kept_bytes / group.kept_bytes).mean()
        cells = [f"{group.train_loss.mean():.3f}", f"1/{less:.1f}", f"{kept:.2f}, {times:.1f} times less"]
        lines.append([*key, len(group), spread(group.miou_best), *gaps, *cells])
    return (
        table(heads, lines)
        + f"""
`python -m benchmarks.digit_scenes`: {NETWORK}, last {LAYERS} layers, {STEPS} steps of AdamW in batches of {BATCH}
scenes of 96 pixels, 120 scenes to validate on. mIoU is the best of eight validations, as in the papers, mean over the
seeds ± the standard error of the mean; the gap is to vanilla of the same seed, `last` that after the last step. Parts:
a batch's gradients are summed up over so many, and bytes are of one of them. Formula: of the trained layers' inputs, as
a part of vanilla's.
"""
    )


def main() -> None:
    """Train what is missing, and write the table of all runs that are done."""
    parser = ArgumentParser(prog="python -m benchmarks.digit_scenes", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[233, 234, 235])
    parser.add_argument("--parts", type=int, nargs="*", default=[4], help=f"divisors of the batch of {BATCH}")
    parser.add_argument("--methods", nargs="+", default=list(WHOLE), choices=WHOLE)
    parser.add_argument("--runs-dir", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--out", type=Path, default=Path("figures/digit_scenes_96.csv"))
    options = parser.parse_args()
    words = ["--model", NETWORK, "--dataset", DATASET, "--layers", LAYERS, "--budget", f"1/{DIVISOR}"]
    words += ["--methods", EXACT, *options.methods, "--seeds", *map(str, options.seeds)]
    words += ["--runs-dir", options.runs_dir, "--data-dir", options.data_dir]
    done(["sweep", *words])
    sweep, _ = parse(words)
    wholes = [(name, 1) for name in (EXACT, *options.methods)]
    ways = [*wholes, *itertools.product(("asi_int8",), options.parts)]
    rows = []
    for seed, (method, count) in itertools.product(options.seeds, ways):
        tag = method if method == EXACT else f"{method}_1of{DIVISOR}"
        result = sweep.run(DATASET, tag, LAYERS, seed).folder(sweep.runs_dir) / RESULT
        for call, result in in_parts(sweep, method, count, seed) if count > 1 else []:  # noqa: B007
            done(call)
        rows.append(row(result.parent, Record.load(result), method, count))
    frame = pd.DataFrame(rows).sort_values(KEY)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, frame.to_csv(index=False))
    write_whole(options.out.with_suffix(".md"), summary(frame))


def done(call: list[str]) -> None:
    """Do a command of `python -m segmentation`; one that fails ends this."""
    if command(call) != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

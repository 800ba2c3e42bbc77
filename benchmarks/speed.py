"""Speed as ratios of times within one process on one machine: the median of pairs that alternate, lowest and highest.

    python -m benchmarks.speed [--help]

The table and the plot are written anew after each comparison, and comparisons that the table has already are not made
again. Weights are random; images are scikit-learn's digits, enlarged.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.batches import batch_steps, channels_last
from benchmarks.comparisons import CONVOLUTIONAL, METHODS, Comparison, Setting
from benchmarks.comparisons import SECTIONS as LARGER
from benchmarks.pairs import ratio
from benchmarks.plots import draw_batches, draw_speed
from experiment.allocator import keep_freed_memory
from experiment.files import write_whole

SECTIONS = {**LARGER, "batch": batch_steps, "channels-last": channels_last}
KEY = ["section", "case", "first", "second", "batch", "size", "threads"]


def run(comparisons: Iterable[Comparison], setting: Setting, pairs: int, table: Path) -> pd.DataFrame:
    """Make the comparisons that the table lacks; returns the whole table."""
    rows: list[dict[str, Any]] = pd.read_csv(table).to_dict("records") if table.exists() else []
    done = {tuple(row[key] for key in KEY) for row in rows}
    sizes = {"batch": setting.batch, "size": setting.size, "threads": torch.get_num_threads()}
    for comparison in comparisons:
        names = {key: getattr(comparison, key) for key in KEY[:4]}
        if (*names.values(), *sizes.values()) in done:
            continue
        torch.manual_seed(233)
        first, second = comparison.build()
        found = ratio(first, second, pairs, comparison.clock)
        del first, second
        gc.collect()
        print(f"{', '.join(names.values())}: {found.median:.3g} [{found.low:.3g}, {found.high:.3g}]", flush=True)
        rows.append({**names, **sizes, "ratio": found.median, "low": found.low, "high": found.high, "pairs": pairs})
        table.parent.mkdir(parents=True, exist_ok=True)
        write_whole(table, pd.DataFrame(sorted(rows, key=_place)).to_csv(index=False))
    return pd.DataFrame(sorted(rows, key=_place), columns=[*KEY, "ratio", "low", "high", "pairs"])


def _place(row: dict[str, Any]) -> tuple[float, ...]:
    """Where a row stands: steps of models first, by network, depth and way; the others as they were measured."""
    if row["section"] != "model step":
        return (math.inf,)
    network, _, depth = row["case"].partition(", last ")
    return CONVOLUTIONAL.index(network), math.inf if depth == "all" else int(depth), list(METHODS).index(row["first"])


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Per section and pair of ways: how many cases, and the geometric mean, least and greatest of their medians."""
    groups = frame.groupby(["section", "first", "second"], sort=False)["ratio"]
    means = groups.agg(lambda ratios: math.exp(statistics.fmean(map(math.log, ratios))))
    return pd.DataFrame(
        {"cases": groups.size(), "geometric mean": means, "least": groups.min(), "greatest": groups.max()}
    ).reset_index()


def exponents(frame: pd.DataFrame) -> pd.Series:
    """How time grows with each size: the exponent p of a fit time ~ size^p through the smallest size."""
    rows = frame[frame.section == "growth"]
    what, size = (rows["first"].str.split().str[place] for place in (0, 1))
    grown = size.astype(float) / rows["second"].str.split().str[1].astype(float)
    logs = pd.DataFrame({"what": what, "x": grown.map(math.log), "y": rows["ratio"].map(math.log)})
    logs["xy"], logs["xx"] = logs.x * logs.y, logs.x**2
    sums = logs.groupby("what", sort=False)[["xy", "xx"]].sum()
    return (sums.xy / sums.xx).astype(float)


def markdown(frame: pd.DataFrame) -> str:
    """The summary, the exponents and every comparison, as Markdown tables."""
    exponent = exponents(frame).round(2).rename("exponent").reset_index()
    parts = [
        ("Sections", summary(frame).round(2)),
        ("Growth: time ~ size^exponent", exponent),
        ("Every comparison", frame.round(3)),
    ]
    return "\n".join(f"## {title}\n\n{table.to_markdown(index=False)}\n" for title, table in parts if len(table))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--networks", nargs="+", choices=CONVOLUTIONAL, default=list(CONVOLUTIONAL), metavar="NETWORK")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="only these ways, such as asi, against what they have")
    parser.add_argument("--batch", type=int, nargs="+", default=[64], help="one or several, such as 1 2 4 8 32 64")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="one or several")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("figures"))
    options = parser.parse_args()
    keep_freed_memory()
    for threads, batch in product(options.threads, options.batch):
        torch.set_num_threads(threads)
        setting = Setting(batch, options.size, tuple(options.networks))
        comparisons = [comparison for name in options.sections for comparison in SECTIONS[name](setting)]
        chosen = [comparison for comparison in comparisons if not options.ways or comparison.first in options.ways]
        if not chosen:
            parser.error(f"--ways: there are {', '.join(dict.fromkeys(each.first for each in comparisons))}")
        frame = run(chosen, setting, options.pairs, options.output / "speed.csv")
    write_whole(options.output / "speed.md", markdown(frame))
    for path in (options.output / "speed.md", *draw_speed(frame, options.output), *draw_batches(frame, options.output)):
        print(path)


if __name__ == "__main__":
    main()

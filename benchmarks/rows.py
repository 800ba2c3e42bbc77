"""A table of runs, written anew as each ends; what it has is not run again."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiment.files import write_whole


class Rows:
    """The table in a file, and beside it as text.

    Args:
        out: the CSV file; what it has already is kept.
        key: columns that name a run.
        summary: of all rows, for the `.md` file.
        text: columns that are text, also where a number stands in them.
    """

    def __init__(
        self, out: Path, key: Sequence[str], summary: Callable[[pd.DataFrame], str], text: Sequence[str] = ()
    ) -> None:
        self.out, self.key, self.summary = out, list(key), summary
        there = out.exists()
        self.frame = pd.read_csv(out, dtype=dict.fromkeys(text, str)) if there else pd.DataFrame(columns=self.key)

    def has(self, *run: Any) -> bool:
        """Whether there is a row of these values of the key."""
        return bool((self.frame[self.key].astype(str) == [str(value) for value in run]).all(axis=1).any())

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Take rows, write both files, and print them."""
        self.frame = pd.DataFrame([*self.frame.to_dict("records"), *rows]).sort_values(self.key)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.out, self.frame.to_csv(index=False))
        write_whole(self.out.with_suffix(".md"), self.summary(self.frame))
        for row in rows:
            print(dict(row), flush=True)


def table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def spread(values: pd.Series, sign: str = "") -> str:
    """Mean over runs and, of several, the standard error of the mean; a "+" shows the sign."""
    mean = f"{values.mean():{sign}.2f}"
    return mean if len(values) < 2 else f"{mean} ± {values.sem():.2f}"


def device_name(device: torch.device) -> str:
    """As a table names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def parser_of(name: str, description: str | None, out: str, weights: str | None = None) -> ArgumentParser:
    """Arguments of a benchmark on a data set: where that is, where it is computed, and where results go.

    Args:
        name, description: of the benchmark.
        out: where results go by default.
        weights: the network whose weights file has to be given.
    """
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds all data sets")
    parser.add_argument("--out", type=Path, default=Path(out), help="CSV file; a Markdown file is put beside it")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    if weights is not None:
        parser.add_argument("--weights", required=True, help=f"ImageNet weights of {weights}")
    return parser

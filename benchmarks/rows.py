"""A table of results that is written as each is known, as CSV and as Markdown; what it has is not measured again."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd

from experiment.files import write_whole


class Rows:
    """The rows of a file that may be there already.

    Args:
        path: the CSV file; the Markdown one is beside it.
        key: columns that say what a row is of, and that rows are sorted by.
        summary: makes the Markdown of all rows.
    """

    def __init__(self, path: Path, key: list[str], summary: Callable[[pd.DataFrame], str]) -> None:
        self.path, self.key, self.summary = path, key, summary
        self.frame = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=key)

    def has(self, **values: object) -> bool:
        """Whether there is a row with these values."""
        return bool((self.frame[list(values)] == list(values.values())).all(axis=1).any())

    def add(self, results: Iterable[Mapping[str, object]]) -> None:
        """Add rows, and write the files."""
        self.frame = pd.DataFrame([*self.frame.to_dict("records"), *results]).sort_values(self.key, kind="stable")
        write_whole(self.path, self.frame.to_csv(index=False))
        write_whole(self.path.with_suffix(".md"), self.summary(self.frame))


def parser_of(name: str, description: str | None, out: str) -> ArgumentParser:
    """Arguments of a benchmark on a data set: where that is, and where results go."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds all data sets")
    parser.add_argument("--out", type=Path, default=Path(out), help="CSV file; a Markdown file is put beside it")
    return parser

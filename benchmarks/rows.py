"""A table of runs, written anew as each ends; what it has is not run again."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

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


def parser_of(name: str, description: str | None, out: str) -> ArgumentParser:
    """Arguments of a benchmark on a data set: where that is, and where results go."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds all data sets")
    parser.add_argument("--out", type=Path, default=Path(out), help="CSV file; a Markdown file is put beside it")
    return parser

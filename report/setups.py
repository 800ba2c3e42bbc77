"""The papers' tables: one for a setup, with a row for each model, depth and method and a block for each data set."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pandas as pd

from report.methods import method_order
from report.metrics import METRICS
from report.summary import Group
from report.tables import (
    ABSENT,
    MISSING,
    RECIPE_NOTE,
    Column,
    Row,
    every_column,
    latex_body,
    markdown_body,
    notes,
    recipes_differ,
)

WIDEST = 12  # columns of one table
SHOWN = {
    **{"Reported (%)": "reported", "Δ reported (points)": "Δ"},
    **{"Test (%)": "test", "mIoU (%)": "mIoU", "Formula (MiB)": "MiB"},
}


@dataclass(frozen=True)
class SetupTable:
    """The tables of one setup, put together.

    Attributes:
        task, setup: which setup.
        tables: summary of each model and data set.
    """

    task: str
    setup: str
    tables: Mapping[Group, pd.DataFrame]

    @property
    def folder(self) -> PurePath:
        """Folder of its outputs, relative to the folder of all outputs."""
        return PurePath(self.task, self.setup)

    @property
    def title(self) -> str:
        """The heading."""
        return f"Setup {self.setup} ({self.task})"

    @property
    def parts(self) -> list[tuple[Column, ...]]:
        """Columns of each table, as many as fit on a page.

        In each what tells rows apart, then for one or more data sets what the papers show, and what was measured.
        """
        names = ("model", "layers", "method", *(["recipe"] if self.recipes_differ else []))
        keys = [Column(name.capitalize(), "", name.capitalize(), _key(name)) for name in names]
        parts: list[list[Column]] = []
        for dataset in dict.fromkeys(group.dataset for group in self.tables):
            block = self._block(dataset)
            if not parts or len(parts[-1]) + len(block) > WIDEST:
                parts.append(list(keys))
            parts[-1] += block
        return [tuple(part) for part in parts]

    @property
    def recipes_differ(self) -> bool:
        """Whether one of the tables has runs that were trained in different ways."""
        return any(map(recipes_differ, self.tables.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the numbers are."""
        return (*NOTES, RECIPE_NOTE) if self.recipes_differ else NOTES

    def _block(self, dataset: str) -> list[Column]:
        shown = [column for column in every_column(METRICS[self.task]) if column.title in SHOWN]
        tables = [table for group, table in self.tables.items() if group.dataset == dataset]
        if not any(table["reported_accuracy_percent"].notna().any() for table in tables):
            shown = [column for column in shown if "eported" not in column.title]
        return [
            Column(f"{dataset}: {column.title}", dataset, SHOWN[column.title], _cell(dataset, column))
            for column in shown
        ]

    @property
    def rows(self) -> list[Row]:
        """By model, then by layers ("all" last), then by method; per data set its row of the summary."""
        rows: dict[tuple[str, int | str, str, str], dict[str, Any]] = {}
        for group, table in self.tables.items():
            for row in table.to_dict("records"):
                key = (group.model, row["layers"], row["method"], row["recipe"])
                rows.setdefault(key, {})[group.dataset] = row
        order = sorted(
            rows, key=lambda key: (key[0], key[1] == "all", str(key[1]).zfill(4), method_order(key[2]), key[3])
        )
        names = ("model", "layers", "method", "recipe")
        counts = {key: sum(row["n"] for row in rows[key].values()) for key in order}
        return [{**dict(zip(names, key, strict=True)), "n": counts[key], "datasets": rows[key]} for key in order]

    def to_markdown(self) -> str:
        """A heading, the tables and what their numbers are."""
        bodies = "\n\n".join(markdown_body(self.rows, part) for part in self.parts)
        return f"# {self.title}\n\n{bodies}\n\n{notes(self.notes)}\n"

    def to_latex(self) -> str:
        """A `tabular` for each table, a rule after each model and depth."""
        depth = operator.itemgetter("model", "layers")
        return "\n".join(latex_body(self.rows, part, self.title, depth) for part in self.parts)

    def to_csv(self) -> str:
        """All numbers of all summaries."""
        parts = [
            table.assign(
                model=group.model, dataset=group.dataset, seeds=[" ".join(map(str, seeds)) for seeds in table["seeds"]]
            )
            for group, table in self.tables.items()
        ]
        whole = pd.concat(parts, ignore_index=True)
        first = ["model", "dataset"]
        return whole[[*first, *(name for name in whole if name not in first)]].to_csv(index=False, lineterminator="\n")


NOTES = (
    "reported: accuracy as published, on a validation split; Δ: validation accuracy here less that one.",
    "test, mIoU: accuracy here, mean ± standard deviation over seeds; MiB: memory of the trained layers' "
    "inputs by formula.",
    f"{ABSENT}: planned, and not finished yet. {MISSING}: no number.",
    "All further numbers are in the table of each model and data set, and in the CSV file.",
)


def _key(name: str) -> Any:
    return lambda row: str(row[name]) or MISSING


def _cell(dataset: str, column: Column) -> Any:
    return lambda row: column.cell(row["datasets"][dataset]) if dataset in row["datasets"] else MISSING


def setup_tables(tables: Mapping[Group, pd.DataFrame]) -> list[SetupTable]:
    """The table of each setup."""
    keys = dict.fromkeys((group.task, group.setup) for group in tables)
    return [
        SetupTable(*key, {group: table for group, table in tables.items() if (group.task, group.setup) == key})
        for key in keys
    ]

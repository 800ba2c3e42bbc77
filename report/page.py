"""Everything on one HTML page that needs no other file: tables, and plots inlined."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from report.setups import SetupTable
from report.summary import BASELINE, Group
from report.tables import LEFT, Column, Row, columns, footnotes

TEMPLATE = Path(__file__).parent / "page.html.jinja"


@dataclass(frozen=True)
class Cells:
    """A table as texts.

    Attributes:
        groups: of neighbouring columns, "" for none, each with its number of columns.
        titles: of the columns.
        left: whether a column's texts start at the left.
        rows: texts of each row.
        kinds: of each row "baseline", "missing" or "".
        starts: whether a row is the first of its model and depth.
    """

    groups: tuple[tuple[str, int], ...]
    titles: tuple[str, ...]
    left: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    starts: tuple[bool, ...]


@dataclass(frozen=True)
class Section:
    """One model and data set: heading, table, notes and pictures (SVG, with a description)."""

    title: str
    cells: Cells
    notes: Sequence[str]
    pictures: Sequence[tuple[str, str]]


def section(table: pd.DataFrame, group: Group, baseline: str, pictures: Mapping[str, bytes]) -> Section:
    """The section of one summary; `pictures` are SVG files by their descriptions."""
    inlined = [(f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}", text) for text, svg in pictures.items()]
    rows = table.to_dict("records")
    return Section(str(group), _cells(rows, columns(table), baseline), footnotes(table, baseline), inlined)


def _cells(rows: Sequence[Row], shown: Sequence[Column], baseline: str) -> Cells:
    keys = [(row.get("model"), row["layers"]) for row in rows]
    return Cells(
        groups=tuple((name, len(list(members))) for name, members in groupby(shown, key=lambda column: column.group)),
        titles=tuple(column.title.removeprefix(f"{column.group}: ") for column in shown),
        left=tuple(column.title in LEFT for column in shown),
        rows=tuple(tuple(column.cell(row) for column in shown) for row in rows),
        kinds=tuple(_kind(row, baseline) for row in rows),
        starts=tuple(place > 0 and key != keys[place - 1] for place, key in enumerate(keys)),
    )


def _kind(row: Row, baseline: str) -> str:
    if row["n"] == 0:
        return "missing"
    return "baseline" if row["method"] == baseline else ""


def page(setups: Sequence[tuple[SetupTable, Sequence[Section]]], baseline: str = BASELINE) -> str:
    """The page: for each setup its table, then the section of each model and data set."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = [(setup.title, _cells(setup.rows, setup.columns, baseline), setup.notes, part) for setup, part in setups]
    return environment.get_template(TEMPLATE.name).render(setups=parts)

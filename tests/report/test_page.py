"""The page: whole HTML that needs no other file, with every number of the tables."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from report.page import page, section
from report.setups import setup_tables
from report.summary import Reported, group_of, group_records, summarise

VOID = {"meta", "img"}
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


class Reader(HTMLParser):
    """Checks that every element is closed where it should be; collects texts of cells, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tables, self.attributes, self.loads = [], [], {}, []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.attributes.setdefault(tag, []).append(given)
        self.loads += [value for name, value in given.items() if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", int(given.get("colspan", 1))])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1][0] += data


@pytest.fixture
def read(write):
    """The page of two data sets: one with a published row and a missing run, one with neither."""
    records = [write("vanilla", 2), write("asi", 2), write("asi", "all"), write("vanilla", 2, dataset="digits")]
    missing = replace(records[0].run, method="hosvd_0.8")
    reported = {(2, "asi"): Reported(48.5)}
    tables = {
        group: summarise(found, reported=reported if group.dataset == "pets" else None, planned=planned)
        for group, found in group_records(records).items()
        for planned in [[missing] if group == group_of(missing) else []]
    }
    sections = [section(table, group, "vanilla", {f"picture of <{group}>": SVG}) for group, table in tables.items()]
    (setup,) = setup_tables(tables)
    text = page([(setup, sections)])
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return text, reader


def test_it_loads_nothing_from_elsewhere(read):
    text, reader = read
    assert all(address.startswith(("#", "data:image/svg+xml;base64,")) for address in reader.loads)
    assert "http" not in text.replace("data:image", "")
    ids = {given["id"] for given in [*reader.attributes["h2"], *reader.attributes["h3"]]}
    assert {address[1:] for address in reader.loads if address.startswith("#")} == ids


def test_it_is_made_for_phones_and_the_dark(read):
    text, reader = read
    assert any(given.get("name") == "viewport" for given in reader.attributes["meta"])
    assert "prefers-color-scheme: dark" in text
    assert reader.attributes["html"] == [{"lang": "en"}]
    assert all(given["alt"] for given in reader.attributes["img"])


def test_every_row_of_every_table_has_the_same_width(read):
    _, reader = read
    assert len(reader.tables) == 3
    for table in reader.tables:
        assert len({sum(width for _, width in row) for row in table}) == 1


def test_cells_are_those_of_the_tables(read):
    _, reader = read
    whole, digits, pets = ([[text for text, _ in row] for row in table] for table in reader.tables)
    assert whole[0] == ["", "digits", "pets"]
    digits_columns, pets_columns = whole[1][3:5], whole[1][5:]
    assert whole[1][:3] == ["Model", "Layers", "Method"]
    assert digits_columns == ["Test (%)", "Formula (MiB)"]
    assert pets_columns == ["Reported (%)", "Δ reported (points)", "Test (%)", "Formula (MiB)"]
    assert whole[2] == ["mcunet", "2", "vanilla", "50.0", "1.00", "—", "—", "50.0", "1.00"]
    assert whole[3] == ["mcunet", "2", "hosvd_0.8", "—", "—", "—", "—", "missing", "—"]
    assert whole[4] == ["mcunet", "2", "asi", "—", "—", "48.5", "+2.5", "50.0", "1.00"]
    assert [row[1] for row in digits[2:]] == ["vanilla"]
    assert [row[1] for row in pets[2:]] == ["vanilla", "hosvd_0.8", "asi", "asi"]


def test_rows_are_told_apart(read):
    _, reader = read
    kinds = [given.get("class", "").split() for given in reader.attributes["tr"]]
    assert sum("missing" in kind for kind in kinds) == 2  # in the setup's table and in that of pets
    assert sum("baseline" in kind for kind in kinds) == 3
    assert sum("start" in kind for kind in kinds) == 2  # "all" in both tables


def test_names_are_escaped(read):
    text, reader = read
    assert "&lt;mcunet on pets" in text
    assert any("<mcunet on pets" in given["alt"] for given in reader.attributes["img"])

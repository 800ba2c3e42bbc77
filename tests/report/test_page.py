"""The page as a file: one that needs no other, with every number of the tables, in which no run's text is markup."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from report.page import page
from report.payload import compose, listed_runs
from report.published import Point
from report.summary import Reported, find_runs, group_of, group_records, summarise

EVIL = "</script><img src=x onerror=alert(1)>&amp;"


class Reader(HTMLParser):
    """Texts of elements by their id, and every address that an element names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.loads, self.tags, self._open = {}, [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.loads += [value for name, value in given.items() if name in ("src", "href")]
        self._open = given.get("id", tag)

    def handle_data(self, data):
        self.texts[self._open] = self.texts.get(self._open, "") + data


@pytest.fixture
def content(write, runs):
    """What the page shows of three runs, of which one has a text that would be markup, and of one that is missing."""
    records = [
        write("vanilla", 2, recipe={"epochs": 5}),
        write("asi", 2, recipe={"epochs": EVIL}),
        write("vanilla", 2, dataset="digits"),
    ]
    missing = replace(records[0].run, method="hosvd_0.8")
    folder = missing.folder(runs)
    folder.mkdir(parents=True)
    (folder / "failure.log").write_text(EVIL)
    found = find_runs(runs)
    groups = group_records(record for _, record in found)
    (digits, pets) = groups
    tables = {digits: summarise(groups[digits]), pets: summarise(groups[pets], planned=[missing])}
    points = {pets: [Point(4, "asi", Reported(61.5, 2.0**20))]}
    return compose(tables, listed_runs(found, {missing: folder}), points, "vanilla", ("there", tables)), tables


def rows_of(content, setup=0):
    return [dict(zip(content["keys"], row, strict=True)) for row in content["setups"][setup]["rows"]]


def details_of(content):
    return [one for chunk in content["details"] for one in json.loads(gzip.decompress(base64.b64decode(chunk)))]


def test_nothing_is_loaded_and_nothing_may_be(content):
    reader = Reader(page(content[0]))
    assert all(address.startswith("#") for address in reader.loads)
    text = page(content[0])
    assert """content="default-src 'none';""" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_the_data_come_back_whole_and_no_text_of_a_run_is_markup(content):
    text = page(content[0])
    reader = Reader(text)
    assert json.loads(reader.texts["data"]) == json.loads(json.dumps(content[0]))
    assert EVIL[:40] in str(rows_of(content[0]))  # it is there to be shown
    assert "img" not in reader.tags
    assert "alert(1)>" not in text


def test_the_library_is_there_once_and_as_it_was_published(content):
    import plotly.offline

    packed = Reader(page(content[0])).texts["plotly"]
    assert gzip.decompress(base64.b64decode(packed)).decode() == plotly.offline.get_plotlyjs()
    assert len(packed) < 2_100_000


def test_rows_have_the_numbers_of_the_summaries(content):
    payload, tables = content
    told = {(row["dataset"], row["method"]): row for row in rows_of(payload)}
    expected = {
        (group.dataset, row["method"]): row for group, table in tables.items() for row in table.to_dict("records")
    }
    assert told.keys() == expected.keys()
    for key, row in told.items():
        assert row["saved_measured_bytes"] == (None if row["n"] == 0 else expected[key]["saved_measured_bytes"])
        assert row["main"] == (None if row["n"] == 0 else expected[key]["test_mean_percent"])
    assert told["pets", "hosvd_0.8"]["missing"] == 1


def test_a_run_has_its_state_and_its_details(content):
    payload, _ = content
    runs = {
        (row[2], row[3]): (row[6], details) for row, details in zip(payload["runs"], details_of(payload), strict=True)
    }
    assert runs["pets", "hosvd_0.8"] == ("failed", {"log": EVIL})
    state, details = runs["pets", "asi"]
    assert state == "done"
    assert details["recipe"]["epochs"] == EVIL
    assert details["memory_bytes"]["saved_measured"] == 2**21


def test_numbers_that_are_none_and_lists_of_other_things_take_no_other_run_along(write, runs):
    record = write("asi", 2, recipe={"x": float("inf"), "y": [float("nan")]})
    folder = record.run.folder(runs)
    (folder / "metrics.csv").write_text("epoch,val_loss\n0,nan\n1,-inf\n2,0.5\n")
    (folder / "ranks.json").write_text('{"layers": [null, {"name": "x"}]}')
    found = find_runs(runs)
    tables = {group_of(record.run): summarise([record])}
    (details,) = details_of(compose(tables, listed_runs(found, {}), {}, "vanilla"))
    assert details["curves"] == {"epoch": [0, 1, 2], "val_loss": [None, None, 0.5]}
    assert (details["recipe"]["x"], details["recipe"]["y"]) == (None, [None])
    assert "ranks" not in details


def test_published_points_are_there(content):
    (point,) = content[0]["setups"][0]["published"]
    assert point == ["mcunet", "pets", "asi", 4, 61.5, 2**20, None]


def test_two_folders_are_compared_row_by_row(content):
    rows = content[0]["compared"]["rows"]
    assert [(row[3], row[5]) for row in rows] == [("digits", "vanilla"), ("pets", "vanilla"), ("pets", "asi")]
    assert all(row[7:] == [1, 1, 50.0, 50.0, 2**21, 2**21, 0.1, 0.1] for row in rows)

"""A figure is drawn again where it would show something else or its files are not what they were, and only there."""

import pandas as pd
import pytest

from report.drawn import NOTES, Figures
from report.output import write_all
from report.summary import Group

GROUP = Group("classification", "B", "mcunet", "digits")
TABLE = pd.DataFrame({"layers": [2, 4], "accuracy": [0.1, 1 / 3]})


@pytest.fixture
def figure(tmp_path):
    """Writes a figure of a table as a report does; returns whether it was drawn for that."""
    drawn = []

    def draw(table, group, *more):
        drawn.append(table)
        return {"svg": f"{table.to_csv()}{group}{more}".encode(), "png": b"picture"}

    def write(table=TABLE, *more, group=GROUP):
        before = len(drawn)
        figures = Figures(tmp_path)
        files = figures.of(group.folder / "pareto", draw, table, group, *more)
        assert files == {"svg": f"{table.to_csv()}{group}{more}".encode(), "png": b"picture"}
        write_all({tmp_path / group.folder / f"pareto.{end}": files[end] for end in files} | figures.notes)
        return len(drawn) > before

    return write


def test_what_shows_the_same_is_drawn_once(figure):
    assert [figure(), figure(), figure(TABLE.copy())] == [True, False, False]


@pytest.mark.parametrize(
    "change",
    [
        {"table": TABLE.assign(accuracy=[0.1, 1 / 3 + 1e-15])},
        {"table": TABLE.rename(columns={"layers": "depth"})},
        {"group": Group("classification", "A", "mcunet", "digits")},
    ],
)
def test_what_shows_something_else_is_drawn(figure, change):
    figure()
    assert figure(**change)


def test_points_beside_it_count(figure):
    assert [figure(TABLE, (1, 2)), figure(TABLE, (1, 3)), figure(TABLE, (1, 3))] == [True, True, False]


@pytest.mark.parametrize("name", ["classification/B/mcunet/digits/pareto.svg", NOTES])
@pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"classification/B/mcunet/digits/pareto": {"of": 1}}'])
def test_files_that_are_gone_or_not_what_they_were_are_drawn(figure, tmp_path, name, content):
    figure()
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    assert [figure(), figure()] == [True, False]

"""Settings that records have noted and that are markup, or of several lines: in tables they are text in one cell."""

from __future__ import annotations

import pytest

from experiment.record import FURTHER
from report.__main__ import main
from report.summary import Group, summarise
from report.tables import to_latex, to_markdown

VALUES = ["a|b</td><img src=x>", "two\n\nlines", "two lines", "half of a letter \ud800", "x" * 60 + "\ud800"]


def _records(write):
    return [write("asi", 2, seed=seed, provenance={FURTHER: {"a|b": value}}) for seed, value in enumerate(VALUES)]


def test_a_setting_is_text_in_one_cell_of_a_table(write):
    table = summarise(_records(write))
    assert len(table) == len(VALUES)  # none is taken for another
    group = Group("classification", "B", "mcunet", "digits")
    lines = [line for line in to_markdown(table, group).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(VALUES)
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert not any("<" in line for line in lines)
    rows = to_latex(table, group).rpartition(r"\midrule")[2].splitlines()
    assert [line.endswith(r" \\") for line in rows if "asi" in line] == [True] * len(VALUES)


@pytest.mark.slow
def test_half_a_letter_in_one_record_hides_no_table(write, runs):
    _records(write)
    assert main([str(runs), "--published", str(runs)]) == 0

# ruff: noqa: RUF001 - the signs that the tables use
"""What the tables show, and that LaTeX and CSV can be read by others."""

from __future__ import annotations

import io
import itertools
import math
import re

import pandas as pd
import pytest

from report.summary import Group, Reported, summarise
from report.tables import (
    columns,
    engineering,
    latex,
    mebibytes,
    seed_list,
    signed,
    significant,
    spread,
    to_csv,
    to_latex,
    to_markdown,
)

GROUP = Group("classification", "A", "mcunet", "pets_37")


def markdown_rows(text):
    """The cells of a Markdown table, by heading."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.013712, "0.0137"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (25.34, "25.3"),
        (123.4, "123"),
        (3303.67, "3304"),
    ],
)
def test_significant(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12, "12.0"),
        (999.6, "1.00 k"),
        (303_100, "303 k"),
        (487.68e6, "488 M"),
        (1.1449e9, "1.14 G"),
        (2e20, "200 E"),
    ],
)
def test_engineering(value, text):
    assert engineering(value) == text


def test_spread_only_with_a_standard_deviation():
    assert spread(97.24, math.nan) == "97.2"
    assert spread(97.24, 0.36) == "97.2 ± 0.4"
    assert spread(97.24, 0.0) == "97.2 ± 0.0"


@pytest.mark.parametrize(("value", "text"), [(0.26, "+0.3"), (-1.2, "−1.2"), (-0.01, "0.0"), (0.0, "0.0")])
def test_signed(value, text):
    assert signed(value) == text


@pytest.mark.parametrize(
    ("seeds", "text"), [((4,), "4"), ((1, 2), "1, 2"), ((233, 234, 235), "233–235"), ((1, 7, 8, 9, 11), "1, 7–9, 11")]
)
def test_seed_list(seeds, text):
    assert seed_list(seeds) == text


def test_mebibytes():
    assert mebibytes(27.56 * 2**20) == "27.6"


def test_markdown_row(write):
    records = [write("vanilla", 2, seed=seed, test=0.9, memory=2**25, flops=10**9) for seed in (1, 2)]
    records += [
        write("asi", 2, seed=seed, test=test, memory=2**20, kept=2**23, flops=4 * 10**8, step=0.2)
        for seed, test in ((1, 0.84), (2, 0.86))
    ]
    table = summarise(records, reported={(2, "asi"): Reported(84.25)})
    vanilla, asi = markdown_rows(to_markdown(table, GROUP, shown=columns(table)))
    assert asi == {
        "Layers": "2",
        "Method": "asi",
        "n": "2",
        "Reported (%)": "84.2",
        "Δ reported (points)": "+1.8",
        "Test (%)": "85.0 ± 1.4",
        "Δ test (points)": "−5.0",
        "Validation (%)": "86.0 ± 1.4",
        "Formula (MiB)": "1.00",
        "Formula, × less": "32.0×",
        "Formula at equal accuracy, × less": "32.0×",
        "Kept (MiB)": "8.00",
        "Kept, × less": "8.00×",
        "Peak (MiB)": "3.00",
        "FLOPs, papers": "200 M",
        "FLOPs, corrected": "400 M",
        "FLOPs, × less": "2.50×",
        "FLOPs at equal accuracy, × less": "2.50×",
        "Step (ms)": "200",
        "Step, × less": "0.500×",
    }
    assert vanilla["Reported (%)"] == "—"
    few = markdown_rows(to_markdown(table, GROUP))[1]
    assert len(few) == 12
    assert few == {title: cell for title, cell in asi.items() if title in few}


def test_markdown_shows_missing_cells_as_missing(write):
    table = summarise([write("asi", "all", accuracy={}, memory_bytes={})])
    (row,) = markdown_rows(to_markdown(table, GROUP, shown=columns(table)))
    shown = {key for key, cell in row.items() if cell != "—"}
    assert shown == {"Layers", "Method", "n", "FLOPs, papers", "FLOPs, corrected", "Step (ms)"}
    assert row["Layers"] == "all"


def test_weights_in_training_are_shown_beside_an_emulation_where_some_are_factors(write):
    state = {"weight_measured": 2**20, "weight_gradient_measured": 2**20, "weight_optimizer_measured": 0}
    before = write("hosvd_0.8", "all")  # a record of before these were measured
    vanilla = write("vanilla", "all", memory_bytes={"saved_measured": 1, **state})
    factored = {"saved_measured": 1, **{key: value // 4 for key, value in state.items()}}
    wasi = write("wasi_0.9", "all", memory_bytes={**factored, "weight_emulated_formula": 5 * 2**19})
    table = summarise([before, vanilla, wasi])
    text = to_markdown(table, GROUP, shown=columns(table))
    cells = {
        row["Method"]: (row["Weights in training (MiB)"], row["Weights, emulated (MiB)"]) for row in markdown_rows(text)
    }
    assert cells == {"vanilla": ("2.00", "—"), "hosvd_0.8": ("—", "—"), "wasi_0.9": ("0.500", "2.50")}
    assert "Weights, emulated:" in text
    table = summarise([before, vanilla])
    without = to_markdown(table, GROUP, shown=columns(table))
    assert "Weights" not in without


def test_seeds_are_a_column_only_where_they_differ(write):
    same = [write("vanilla", 2, seed=seed) for seed in (1, 2, 3)]
    text = to_markdown(summarise(same), GROUP)
    assert "Seeds" not in markdown_rows(text)[0]
    assert "n = 3 seeds: 1–3." in text
    text = to_markdown(summarise([*same, write("asi", 2, seed=9)]), GROUP)
    assert [(row["n"], row["Seeds"]) for row in markdown_rows(text)] == [("3", "1–3"), ("1", "9")]
    assert "differ in their seeds" in text


def test_footnote_names_the_baseline(write):
    table = summarise([write("asi", 2)])
    assert "of which there is no finished run" in to_markdown(table, GROUP)
    table = summarise([write("asi", 4)], baseline="asi")
    few, every = (to_markdown(table, GROUP, "asi", shown) for shown in (None, columns(table)))
    assert "the number of asi" in few
    assert "formula memory of asi" in every
    assert not any(word in few for word in ("At equal accuracy", "FLOPs"))  # no column of it


def test_csv_keeps_every_digit(write):
    records = [write("vanilla", 2, seed=seed, memory=memory) for seed, memory in ((1, 10**12), (2, 10**12 + 1))]
    records += [write("asi", "all", test=1 / 3, memory=7, step=1 / 7)]
    table = summarise(records)
    read = pd.read_csv(io.StringIO(to_csv(table)), dtype={"layers": str, "seeds": str})
    assert list(read.columns) == list(table.columns)
    assert list(read["layers"]) == ["2", "all"]
    assert list(read["seeds"]) == ["1 2", "0"]
    assert read["activation_formula_bytes"][0] == 10**12 + 0.5
    assert read["test_mean_percent"][1] == pytest.approx(100 / 3, abs=1e-9)
    assert math.isnan(read["test_std_percent"][1])
    assert math.isnan(read["activation_formula_times_less"][1])


def test_latex_escapes():
    assert latex("hosvd_0.8 & 5% #1 $x {y}") == r"hosvd\_0.8 \& 5\% \#1 \$x \{y\}"
    assert latex("a\\b~c^d") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"
    assert latex("1 ± 2, 3×, −4, —, 1–3") == r"1 $\pm$ 2, 3$\times$, $-$4, ---, 1--3"


@pytest.mark.parametrize("seed", [0, 5])
def test_latex_is_a_whole_tabular(write, seed):
    """Same and different seeds: every row spans exactly the declared columns, rules stay within them."""
    records = [write("vanilla", 2), write("gradient_filter_2", 2, seed=seed), write("my_own", "all")]
    source = to_latex(summarise(records), GROUP)
    assert source.isascii()
    lines = [line for line in source.splitlines() if not line.startswith("%")]
    declared = re.fullmatch(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", lines[0])
    assert declared is not None
    count = len(declared.group(1))
    assert lines[-1] == r"\end{tabular}"
    rules = {r"\toprule": 1, r"\midrule": 2, r"\bottomrule": 1}
    assert {rule: lines.count(rule) for rule in rules} == rules
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len(rows) == 2 + 3
    for row in rows:
        spanned = sum(int(span) - 1 for span in re.findall(r"\\multicolumn\{(\d+)\}", row))
        assert len(re.findall(r"(?<!\\)&", row)) + 1 + spanned == count
        assert not re.search(r"(?<!\\)[_%#]", row)
        assert row.count("{") == row.count("}")
    ends = [tuple(map(int, pair)) for pair in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", source)]
    assert ends[-1][1] == count
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(ends))
    assert r"gradient\_filter\_2" in source
    assert r"my\_own" in source

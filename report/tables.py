"""A summary as Markdown for people, as LaTeX for papers, and as CSV with every digit."""

# The tables are for people and use the signs that people write.
# ruff: noqa: RUF001

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd
from tabulate import tabulate

from report.methods import BASELINE
from report.metrics import Metrics, metrics_in
from report.summary import Group

MISSING, ABSENT = "—", "missing"
PREFIXES = ("", " k", " M", " G", " T", " P", " E")
ESCAPES = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "_%&#${}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "Δ": r"$\Delta$",
    "—": "---",
    "–": "--",
}

Row = Mapping[str, Any]


def significant(value: float) -> str:
    """A number with three significant digits, or all of its whole ones: "0.137", "27.6", "3304"."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.{max(2 - exponent, 0)}f}"


def mebibytes(value: float) -> str:
    """Bytes as MiB, without the unit."""
    return significant(value / 2**20)


def engineering(value: float) -> str:
    """A count with three significant digits and the prefix of its power of 1000: "1.14 G"."""
    exponent = max(int(f"{value:.2e}".partition("e")[2]), 0)
    power = min(exponent // 3, len(PREFIXES) - 1)
    return significant(float(f"{value:.2e}") / 1000**power) + PREFIXES[power]


def spread(mean: float, std: float) -> str:
    """A mean and, where there is one, its standard deviation: "97.2 ± 0.4"."""
    return f"{mean:.1f}" if math.isnan(std) else f"{mean:.1f} ± {std:.1f}"


def signed(value: float) -> str:
    """A difference with its sign: "+0.3", "−1.2"."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _small(value: float) -> str:
    """A difference of any size with its sign: "+0.0021"."""
    return f"{value:+.2g}".replace("-", "−") if value else "0"


def seed_list(seeds: tuple[int, ...]) -> str:
    """Seeds with runs of neighbours joined: "1, 233–235"."""
    spans: list[list[int]] = []
    for seed in seeds:
        if spans and seed == spans[-1][-1] + 1:
            spans[-1].append(seed)
        else:
            spans.append([seed])
    return ", ".join(f"{span[0]}–{span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans)


@dataclass(frozen=True)
class Column:
    """One column for people: heading in Markdown, the same in two levels in LaTeX, and the text of a row's cell."""

    title: str
    group: str
    short: str
    cell: Callable[[Row], str]
    if_any: str = ""  # shown only where this column of the summary has a number


def _shown(key: str, text: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: MISSING if math.isnan(row[key]) else text(row[key])


def _accuracy(name: str) -> Callable[[Row], str]:
    return _shown_with_spread(f"{name}_mean_percent", f"{name}_std_percent")


def _shown_with_spread(mean: str, std: str) -> Callable[[Row], str]:
    return lambda row: MISSING if math.isnan(row[mean]) else spread(row[mean], row[std])


def _times(key: str) -> Callable[[Row], str]:
    return _shown(key, lambda value: f"{significant(value)}×")


MEMORY, ACCURACY, LOSS, STEP = "Memory (MiB)", "Accuracy (%)", "Loss", "Step"
RECIPE = Column("Recipe", "", "Recipe", lambda row: row["recipe"] or MISSING)
SEEDS = Column("Seeds", "", "Seeds", lambda row: seed_list(row["seeds"]))
ROW_COLUMNS = (
    Column("Layers", "", "Layers", lambda row: str(row["layers"])),
    Column("Method", "", "Method", lambda row: row["method"]),
    Column("n", "", "n", lambda row: f"{row['n']} of {row['n'] + row['missing']}" if row["missing"] else str(row["n"])),
)
COST_COLUMNS = (
    Column(
        *("Reported (MiB)", MEMORY, "reported"),
        _shown("reported_memory_bytes", mebibytes),
        "reported_memory_bytes",
    ),
    Column("Formula (MiB)", MEMORY, "formula", _shown("activation_formula_bytes", mebibytes)),
    Column("Formula, × less", MEMORY, "× less", _times("activation_formula_times_less")),
    Column("Formula at equal accuracy, × less", MEMORY, "at equal acc.", _times("equal_accuracy_times_less")),
    Column("Kept (MiB)", MEMORY, "kept", _shown("saved_measured_bytes", mebibytes)),
    Column("Kept, × less", MEMORY, "× less", _times("saved_measured_times_less")),
    Column("Peak (MiB)", MEMORY, "peak", _shown("peak_measured_bytes", mebibytes)),
    Column(
        *("Weights in training (MiB)", MEMORY, "weights"),
        _shown("weight_training_bytes", mebibytes),
        "weight_emulated_bytes",
    ),
    Column(
        *("Weights, emulated (MiB)", MEMORY, "weights emul."),
        _shown("weight_emulated_bytes", mebibytes),
        "weight_emulated_bytes",
    ),
    Column("FLOPs, papers", "FLOPs", "papers", _shown("flops_paper", engineering)),
    Column("FLOPs, corrected", "FLOPs", "corrected", _shown("flops_corrected", engineering)),
    Column("FLOPs, × less", "FLOPs", "× less", _times("flops_corrected_times_less")),
    Column("FLOPs at equal accuracy, × less", "FLOPs", "at equal acc.", _times("equal_accuracy_flops_times_less")),
    Column("Step (ms)", STEP, "ms", _shown("step_median_s", lambda value: significant(1000 * value))),
    Column("Step, × less", STEP, "× less", _times("step_median_times_less")),
)


def _accuracy_columns(metrics: Metrics) -> tuple[Column, ...]:
    main, other = metrics.main_title, metrics.other_title
    accuracy = _accuracy(metrics.main)
    return (
        Column(
            *("Reported (%)", ACCURACY, "reported"),
            _shown("reported_accuracy_percent", "{:.1f}".format),
            "reported_accuracy_percent",
        ),
        Column(
            *("Δ reported (points)", ACCURACY, "Δ reported"),
            _shown("reported_difference_points", signed),
            "reported_accuracy_percent",
        ),
        Column(f"{main} (%)", ACCURACY, _lower(main), lambda row: accuracy(row) if row["n"] else ABSENT),
        Column(f"Δ {_lower(main)} (points)", ACCURACY, f"Δ {_lower(main)}", _shown(metrics.difference, signed)),
        Column(
            *(f"{other} reported (%)", ACCURACY, f"{other} reported"),
            _shown("reported_other_percent", "{:.1f}".format),
            "reported_other_percent",
        ),
        Column(f"{other} (%)", ACCURACY, _lower(other), _accuracy(metrics.other)),
        Column("Training loss", LOSS, "training", _shown("train_loss", significant), "train_loss"),
        Column("Δ training loss", LOSS, "Δ", _shown("train_loss_difference", _small), "train_loss"),
    )


def _lower(title: str) -> str:
    """A title inside of a heading: "Test" as "test", but "mIoU" as it is."""
    return title.lower() if title.istitle() else title


def columns(table: pd.DataFrame) -> tuple[Column, ...]:
    """The columns for people; seeds and recipe are among them only where they differ between rows."""
    chosen = every_column(metrics_in(table))
    if recipes_differ(table):
        chosen = (*chosen[:2], RECIPE, *chosen[2:])
    if not same_seeds(table):
        place = chosen.index(ROW_COLUMNS[-1]) + 1
        chosen = (*chosen[:place], SEEDS, *chosen[place:])
    return tuple(column for column in chosen if not column.if_any or table[column.if_any].notna().any())


def few_columns(table: pd.DataFrame) -> tuple[Column, ...]:
    """The columns that matter most, as many as fit on a page."""
    return tuple(column for column in columns(table) if column.title in FEW)


def fewer_columns(table: pd.DataFrame) -> tuple[Column, ...]:
    """Those of them that fit on a page of a paper, and in a terminal."""
    return tuple(column for column in few_columns(table) if column.group != LOSS)


def every_column(metrics: Metrics) -> tuple[Column, ...]:
    """All columns for people, whether a table has numbers for them or not."""
    return (*ROW_COLUMNS, *_accuracy_columns(metrics), *COST_COLUMNS)


def recipes_differ(table: pd.DataFrame) -> bool:
    """Whether the rows are of runs that were trained in different ways."""
    return bool((table["recipe"] != "").any())


def same_seeds(table: pd.DataFrame) -> bool:
    """Whether all rows that have runs are means over the same seeds."""
    return len(set(table["seeds"]) - {()}) <= 1


def to_csv(table: pd.DataFrame) -> str:
    """The summary as it is: raw numbers, units in the column names, empty where missing."""
    seeds = [" ".join(map(str, seeds)) for seeds in table["seeds"]]
    return table.assign(seeds=seeds).to_csv(index=False, lineterminator="\n")


def to_markdown(
    table: pd.DataFrame, group: Group, baseline: str = BASELINE, shown: Sequence[Column] | None = None
) -> str:
    """A heading, the table of few columns, or of those given, and what its numbers are."""
    chosen = few_columns(table) if shown is None else shown
    body = markdown_body(table.to_dict("records"), chosen)
    return f"# {group} ({group.task})\n\n{body}\n\n{notes(footnotes(table, chosen, baseline))}\n"


def notes(lines: Sequence[str]) -> str:
    """Notes as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def markdown_body(rows: Sequence[Row], shown: Sequence[Column]) -> str:
    """Rows as a Markdown table."""
    cells = [[_in_markdown(column.cell(row)) for column in shown] for row in rows]
    titles = [column.title for column in shown]
    alignment = ["left" if column.title in LEFT else "right" for column in shown]
    return tabulate(cells, titles, tablefmt="pipe", disable_numparse=True, colalign=alignment)


def _in_markdown(text: str) -> str:
    """Text of a setting in a cell, which it neither ends nor is markup in."""
    return text.replace("|", r"\|").replace("<", "&lt;")


RECIPE_NOTE = (
    "Recipe: the runs were trained by different recipes, or with different settings of a method, and this is what "
    "differs in them. Ratios and Δ are between rows of one recipe alone; accuracies of different ones do not compare "
    "the methods."
)
WEIGHTS_NOTE = (
    "Weights in training: the weights of the trained layers, their gradients and the optimizer's state, as measured. "
    "Weights, emulated: the same, by formula, of an emulation that keeps and trains the dense weights and derives the "
    "factors from them, as the public code of WASI does."
)
LOSS_NOTE = (
    "Training loss: mean over the samples of the last epoch, as they were trained on; Δ: less the baseline's. It "
    "orders methods as the errors of their gradients do, with less noise than the accuracy on few images."
)
REPORTED_NOTE = (
    "Reported: as published, on the split that the publication used, which is a validation split. "
    "Δ reported: validation accuracy here less that one."
)
FLOPS_NOTE = "FLOPs: of the trained layers in one training step, in the papers' convention and corrected."
LEFT = ("Model", "Method", "Recipe", "Seeds")
FEW = (
    *("Layers", "Method", "Recipe", "n", "Seeds", "Reported (%)", "Test (%)", "Δ test (points)", "mIoU (%)"),
    *("Δ mIoU (points)", "mAcc reported (%)", "mAcc (%)", "Formula (MiB)", "Formula, × less", "Kept (MiB)"),
    *("Kept, × less", "Peak (MiB)", "Step (ms)", "Training loss"),
)


def to_terminal(table: pd.DataFrame, group: Group) -> str:
    """A heading and fewer columns, as narrow as a terminal."""
    shown = fewer_columns(table)
    titles = [column.title.replace(" (", "\n(").replace(", ", "\n") for column in shown]
    cells = [[column.cell(row) for column in shown] for row in table.to_dict("records")]
    body = tabulate(
        cells,
        titles,
        tablefmt="simple",
        disable_numparse=True,
        colalign=["left" if column.title in LEFT else "right" for column in shown],
    )
    note = f"\n{RECIPE_NOTE}\n" if recipes_differ(table) else ""
    return f"{group} ({group.task})\n\n{body}\n{note}"


def footnotes(table: pd.DataFrame, shown: Sequence[Column], baseline: str = BASELINE) -> list[str]:
    """What the numbers of these columns of a table are."""
    titles = " ".join(column.title for column in shown)
    return [
        metrics_in(table).note,
        *([RECIPE_NOTE] if recipes_differ(table) else []),
        f"{_seeds_note(table)} ± is the sample standard deviation of the accuracy over them; the other numbers "
        "are means.",
        REPORTED_NOTE if table["reported_accuracy_percent"].notna().any() else "Nothing is published of these runs.",
        *([LOSS_NOTE] if "loss" in titles else []),
        f"n: runs, of how many were planned; {ABSENT}: none of them is finished.",
        "Formula: bytes kept of the inputs of the trained layers and of nothing else, by the method's formula; "
        "mean over an epoch, of the epoch where it is largest.",
        "Kept: all bytes that autograd holds from the forward to the backward pass, as measured; parameters and "
        "buffers not counted.",
        "Peak: most bytes of tensors alive at any time of a training step, as measured.",
        *([WEIGHTS_NOTE] if "Weights" in titles else []),
        *([FLOPS_NOTE] if "FLOPs" in titles else []),
        "Step: median time of a training step.",
        *_baseline_notes(table, titles, baseline),
        f"{MISSING}: no number. 1 MiB = 1,048,576 bytes.",
    ]


def _seeds_note(table: pd.DataFrame) -> str:
    if not same_seeds(table):
        return "Means over the n seeds listed in each row; the rows differ in their seeds."
    seeds = max(table["seeds"], key=len)
    if not seeds:
        return "No run is finished."
    return f"Means over n = {len(seeds)} seeds: {seed_list(seeds)}." if len(seeds) > 1 else f"One seed: {seeds[0]}."


def _baseline_notes(table: pd.DataFrame, titles: str, baseline: str) -> list[str]:
    if baseline not in set(table.loc[table["n"] > 0, "method"]):
        return [f"Ratios and Δ refer to {baseline}, of which there is no finished run."]
    words = metrics_in(table).words
    times = (
        f"× less: the number of {baseline} at the same number of layers, divided by that of the row; Δ: {words} less "
    )
    equal = (
        f"At equal accuracy: the least formula memory of {baseline}, at any number of layers, that reaches at least "
        f"the row's mean {words}, divided by the formula memory of the row; FLOPs likewise."
    )
    return [f"{times}that one's.", *([equal] if "equal accuracy" in titles else [])]


def to_latex(table: pd.DataFrame, group: Group, shown: Sequence[Column] | None = None) -> str:
    """A `tabular` of fewer columns, or of those given, rows of one number of layers together; needs booktabs alone."""
    chosen = fewer_columns(table) if shown is None else shown
    return latex_body(table.to_dict("records"), chosen, f"{group} ({group.task})", lambda row: row["layers"])


def latex_body(rows: Sequence[Row], shown: Sequence[Column], comment: str, together: Callable[[Row], Any]) -> str:
    """Rows as a `tabular`, with a rule between rows for which `together` differs."""
    alignment = "".join("l" if column.title in LEFT else "r" for column in shown)
    lines = [
        "% " + " ".join(f"{comment}; needs \\usepackage{{booktabs}}".split()),
        rf"\begin{{tabular}}{{@{{}}{alignment}@{{}}}}",
        r"\toprule",
        *_latex_headings(shown),
    ]
    for _, block in groupby(rows, key=together):
        lines.append(r"\midrule")
        lines.extend(_latex_line([column.cell(row) for column in shown]) for row in block)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_headings(shown: Sequence[Column]) -> list[str]:
    cells, rules, start = [], [], 1
    for group, members in groupby(shown, key=lambda column: column.group):
        count = len(list(members))
        if group:
            cells.append(rf"\multicolumn{{{count}}}{{c}}{{{latex(group)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        else:
            cells.extend([""] * count)
        start += count
    return [" & ".join(cells) + r" \\", " ".join(rules), _latex_line([column.short for column in shown])]


def _latex_line(cells: list[str]) -> str:
    return " & ".join(map(latex, cells)) + r" \\"


def latex(text: str) -> str:
    """Text as LaTeX source that prints it."""
    return "".join(ESCAPES.get(character, character) for character in text)

"""What `python -m report` writes: of each table its files and figures, and one page of everything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiment import ExperimentError, Record, Run
from report.drawn import Figures
from report.methods import BASELINE
from report.output import make_folder, write_report
from report.page import page
from report.payload import compose, listed_runs
from report.plots import pareto_figure, published_figure
from report.published import Point, load_curves, load_published
from report.setups import setup_tables
from report.summary import Group, find_runs, group_of, group_records, read_planned, summarise
from report.tables import columns, to_csv, to_latex, to_markdown, to_terminal

PAGE = "index.html"


def report(
    runs: Path, output: Path, baseline: str, published: Path, other: Path | None = None, every: bool = False
) -> None:
    """Write the tables, figures and page of all runs, and print the tables in short and where everything is.

    Args:
        runs: folder of the runs.
        output: folder to write into.
        baseline: method that ratios refer to.
        published: folder with the published numbers.
        other: another folder of runs, with which the page compares these.
        every: whether Markdown and LaTeX have every column, not only as many as fit on a page.

    Raises:
        ExperimentError: nothing to report, damaged published numbers, an unknown baseline, or an output that
            cannot be written.
    """
    found, waiting = find_runs(runs), read_planned(runs)
    groups, planned = group_records(record for _, record in found), _by_group(waiting)
    _check_baseline(groups, baseline)
    others = None if other is None else (str(other), summaries(other, baseline))
    make_folder(output)
    tasks = {group.task for group in groups.keys() | planned.keys()}
    reported = {task: load_published(published, task) for task in tasks}
    curves = {task: load_curves(published, task) for task in tasks}
    files: dict[Path, bytes] = {}
    figures = Figures(output)
    texts, tables = [], {}
    for group in sorted(groups.keys() | planned.keys()):
        row_reports = reported[group.task].get(group)
        table = tables[group] = summarise(groups.get(group, []), baseline, row_reports, planned.get(group, ()))
        folder, shown = output / group.folder, columns(table) if every else None
        pictures = _pictures(table, group, curves[group.task].get(group, ()), figures)
        outputs = {
            folder / "table.md": to_markdown(table, group, baseline, shown).encode(),
            folder / "table.csv": to_csv(table).encode(),
            folder / "table.tex": to_latex(table, group, shown).encode(),
            **{
                folder / f"{name}.{ending}": picture[ending] for name, picture in pictures.items() for ending in picture
            },
        }
        files |= outputs
        texts.append("\n".join([to_terminal(table, group), *map(str, outputs), ""]))
    for setup in setup_tables(tables):
        for ending, content in (("md", setup.to_markdown()), ("csv", setup.to_csv()), ("tex", setup.to_latex())):
            files[output / setup.folder / f"table.{ending}"] = content.encode()
    points = {group: points for of_task in curves.values() for group, points in of_task.items() if group in tables}
    shown_on_page = compose(tables, listed_runs(found, waiting), points, baseline, others)
    files[output / PAGE] = page(shown_on_page).encode()
    write_report(output, files | figures.notes)
    print("\n".join(texts), f"all on one page: {output / PAGE}", sep="\n")


def summaries(runs: Path, baseline: str) -> dict[Group, pd.DataFrame]:
    """The summary of every group below a folder of runs, without what is published or planned."""
    groups = group_records(record for _, record in find_runs(runs))
    return {group: summarise(records, baseline) for group, records in groups.items()}


def _by_group(runs: Iterable[Run]) -> dict[Group, list[Run]]:
    planned = defaultdict(list)
    for run in runs:
        planned[group_of(run)].append(run)
    return planned


def _pictures(
    table: pd.DataFrame, group: Group, points: Sequence[Point], drawn: Figures
) -> dict[str, dict[str, bytes]]:
    """The figures of a table by file name: files by ending."""
    if not table["n"].any():
        return {}
    figures = {"pareto": drawn.of(group.folder / "pareto", pareto_figure, table, group)}
    if points:
        figures["published"] = drawn.of(group.folder / "published", published_figure, table, group, points)
    return figures


def _check_baseline(groups: Mapping[Group, Sequence[Record]], baseline: str) -> None:
    methods = {record.run.method for records in groups.values() for record in records}
    if baseline != BASELINE and baseline not in methods:
        raise ExperimentError(f"no run of the baseline {baseline}; there are {', '.join(sorted(methods))}")

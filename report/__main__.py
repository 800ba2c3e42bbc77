"""`python -m report`: tables, Pareto figures and one page of all finished runs below a folder."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiment import ExperimentError, Record, Run
from experiment.command import Work, finish
from report.drawn import Figures
from report.output import make_folder, write_all
from report.page import page, section
from report.plots import pareto_figure, published_figure
from report.published import Point, load_curves, load_published
from report.setups import setup_tables
from report.summary import BASELINE, Group, group_of, group_records, read_planned, read_records, summarise
from report.tables import to_csv, to_latex, to_markdown, to_terminal

PAGE = "index.html"
PUBLISHED = Path(__file__).parent.parent / "configs" / "published"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m report",
        description="Read every result.json below a folder; for each task, setup, model and data set write one table "
        "(Markdown, CSV, LaTeX) and Pareto figures (PNG, SVG), for each setup one table of all its models and data "
        "sets, and one HTML page of everything; print the tables in short. Runs that a sweep planned and that are not "
        "finished are shown as missing; a file that is no whole record is left out with a word; runs of different "
        "recipes are told apart.",
    )
    command.add_argument(
        "runs",
        nargs="?",
        type=Path,
        default=Path("runs"),
        metavar="RUNS_DIR",
        help="folder of the runs (default: runs)",
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: RUNS_DIR/report)")
    command.add_argument(
        "--baseline", default=BASELINE, metavar="METHOD", help="method that ratios refer to (default: %(default)s)"
    )
    command.add_argument(
        "--published",
        type=Path,
        default=PUBLISHED,
        metavar="DIR",
        help="folder with the published numbers: <task>.yaml, <task>_curves.yaml (default: configs/published)",
    )
    command.add_argument(
        "--watch", action="store_true", help="show how far the planned runs are, and write nothing; 0 if all are done"
    )
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code; see `experiment.command.finish`."""
    return finish(lambda work: _report(arguments, work))


def _report(arguments: Sequence[str] | None, work: Work) -> int:
    work.title = "report"
    options = parser().parse_args(arguments)
    if options.watch:
        from report.watch import watch

        return watch(options.runs)
    report(options.runs, options.output or options.runs / "report", options.baseline, options.published)
    return 0


def report(runs: Path, output: Path, baseline: str, published: Path) -> None:
    """Write the tables, figures and page of all runs, and print the tables in short and where everything is.

    Raises:
        ExperimentError: nothing to report, damaged published numbers, an unknown baseline, or an output that
            cannot be written.
    """
    groups, planned = group_records(read_records(runs)), _planned(runs)
    _check_baseline(groups, baseline)
    make_folder(output)
    tasks = {group.task for group in groups.keys() | planned.keys()}
    reported = {task: load_published(published, task) for task in tasks}
    curves = {task: load_curves(published, task) for task in tasks}
    files: dict[Path, bytes] = {}
    figures = Figures(output)
    texts, tables, sections = [], {}, defaultdict(list)
    for group in sorted(groups.keys() | planned.keys()):
        row_reports = reported[group.task].get(group)
        table = tables[group] = summarise(groups.get(group, []), baseline, row_reports, planned.get(group, ()))
        folder = output / group.folder
        pictures = _pictures(table, group, curves[group.task].get(group, ()), figures)
        outputs = {
            folder / "table.md": to_markdown(table, group, baseline).encode(),
            folder / "table.csv": to_csv(table).encode(),
            folder / "table.tex": to_latex(table, group).encode(),
            **{
                folder / f"{name}.{ending}": picture[ending]
                for name, (picture, _) in pictures.items()
                for ending in picture
            },
        }
        files |= outputs
        drawn = {text: picture["svg"] for picture, text in pictures.values()}
        sections[group.task, group.setup].append(section(table, group, baseline, drawn))
        texts.append("\n".join([to_terminal(table, group), *map(str, outputs), ""]))
    for setup in setup_tables(tables):
        for ending, content in (("md", setup.to_markdown()), ("csv", setup.to_csv()), ("tex", setup.to_latex())):
            files[output / setup.folder / f"table.{ending}"] = content.encode()
    parts = [(setup, sections[setup.task, setup.setup]) for setup in setup_tables(tables)]
    files[output / PAGE] = page(parts, baseline).encode()
    write_all(files | figures.notes)
    print("\n".join(texts), f"all on one page: {output / PAGE}", sep="\n")


def _planned(runs: Path) -> dict[Group, list[Run]]:
    planned = defaultdict(list)
    for run in read_planned(runs):
        planned[group_of(run)].append(run)
    return planned


def _pictures(
    table: pd.DataFrame, group: Group, points: Sequence[Point], drawn: Figures
) -> dict[str, tuple[dict[str, bytes], str]]:
    """The figures of a table by file name: files by ending, and a description."""
    if not table["n"].any():
        return {}
    pareto = drawn.of(group.folder / "pareto", pareto_figure, table, group)
    figures = {"pareto": (pareto, f"{group}: test accuracy against memory and FLOPs")}
    if points:
        text = f"{group}: validation accuracy against memory and FLOPs, measured and published"
        figures["published"] = (drawn.of(group.folder / "published", published_figure, table, group, points), text)
    return figures


def _check_baseline(groups: Mapping[Group, Sequence[Record]], baseline: str) -> None:
    methods = {record.run.method for records in groups.values() for record in records}
    if baseline != BASELINE and baseline not in methods:
        raise ExperimentError(f"no run of the baseline {baseline}; there are {', '.join(sorted(methods))}")


if __name__ == "__main__":
    sys.exit(main())

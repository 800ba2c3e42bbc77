"""`python -m report`: tables, Pareto figures and one page of all finished runs below a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiment.command import Work, finish, folder_word
from experiment.warned import say_warnings
from report.methods import BASELINE

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
        type=folder_word,
        default=Path("runs"),
        metavar="RUNS_DIR",
        help="folder of the runs (default: runs)",
    )
    command.add_argument("--output", type=folder_word, metavar="DIR", help="where to write (default: RUNS_DIR/report)")
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
    command.add_argument(
        "--compare",
        type=folder_word,
        metavar="RUNS_DIR",
        help="another folder of runs, which the page compares with these",
    )
    command.add_argument(
        "--columns",
        choices=("few", "all"),
        default="few",
        help="of the tables in Markdown and LaTeX: as many as fit on a page, or all; CSV and the page have all "
        "(default: %(default)s)",
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
    from report.writing import report  # loads what draws and computes, which a line of help need not wait for

    output, every = options.output or options.runs / "report", options.columns == "all"
    report(options.runs, output, options.baseline, options.published, options.compare, every)
    return 0


if __name__ == "__main__":
    say_warnings()
    sys.exit(main())

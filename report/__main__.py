"""`python -m report`: tables and Pareto figures of all finished runs below a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiment import ExperimentError, Record
from report.metrics import METRICS
from report.output import make_folder, write_all
from report.plots import pareto_figure
from report.published import load_published
from report.summary import BASELINE, Group, group_records, read_records, summarise
from report.tables import to_csv, to_latex, to_markdown, to_terminal

PUBLISHED = Path(__file__).parent.parent / "configs" / "published"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m report",
        description="Read every result.json below a folder; for each task, setup, model and data set write one table "
        "(Markdown, CSV, LaTeX) and one Pareto figure (PNG, SVG), and print the Markdown table.",
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
        help="folder with the published accuracies, one <task>.yaml a task (default: configs/published)",
    )
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for an error that the user can mend."""
    options = parser().parse_args(arguments)
    try:
        report(options.runs, options.output or options.runs / "report", options.baseline, options.published)
    except ExperimentError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


def report(runs: Path, output: Path, baseline: str, published: Path) -> None:
    """Write the tables and figures of all runs, and print the tables in short and where everything is.

    Raises:
        ExperimentError: nothing to report, a damaged file, an unknown baseline, or an output that cannot be written.
    """
    groups = group_records(read_records(runs))
    _check_baseline(groups, baseline)
    make_folder(output)
    tasks = {group.task for group in groups}
    reported = {task: load_published(published, task) for task in tasks}
    other = {task: load_published(published, task, METRICS[task].reported_other) for task in tasks}
    files: dict[Path, bytes] = {}
    texts = []
    for group, records in groups.items():
        table = summarise(records, baseline, reported[group.task].get(group), other[group.task].get(group))
        folder = output / group.folder
        pictures = pareto_figure(table, group)
        outputs = {
            folder / "table.md": to_markdown(table, group, baseline).encode(),
            folder / "table.csv": to_csv(table).encode(),
            folder / "table.tex": to_latex(table, group).encode(),
            **{folder / f"pareto.{ending}": content for ending, content in pictures.items()},
        }
        files |= outputs
        texts.append("\n".join([to_terminal(table, group), *map(str, outputs), ""]))
    write_all(files)
    print("\n".join(texts), end="")


def _check_baseline(groups: Mapping[Group, Sequence[Record]], baseline: str) -> None:
    methods = {record.run.method for records in groups.values() for record in records}
    if baseline != BASELINE and baseline not in methods:
        raise ExperimentError(f"no run of the baseline {baseline}; there are {', '.join(sorted(methods))}")


if __name__ == "__main__":
    sys.exit(main())

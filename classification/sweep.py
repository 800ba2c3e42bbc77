"""Many runs by one command: pretrain (setup B), measure perplexity, train every method at every depth and seed.

Each run goes through the ordinary command line, so a run of a sweep and a run by hand are the same run: what is done is
skipped, what was interrupted is resumed. A run that fails does not stop the others. Arguments that are not of this
command, such as --data.batch_size 16, go to every run.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from classification.plans import METHODS, TRANSFORMER_METHODS, Sweep, is_transformer, names
from experiment import ExperimentError
from experiment.budget import BUDGET_HELP, budget_word
from experiment.command import finish, one_line, underscored
from experiment.jobs import WAIT, WAIT_HELP, Command, Job, Program, list_jobs, run_jobs

PROGRAM = "python -m classification"


def parse(arguments: Sequence[str]) -> tuple[Sweep, bool]:
    """The sweep that the arguments describe, and whether only to list it."""
    parser = argparse.ArgumentParser(
        prog="python -m classification sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    methods = names("methods")
    parser.add_argument("--setup", choices=("a", "b"), required=True)
    parser.add_argument("--model", choices=names("models"), required=True)
    parser.add_argument("--dataset", nargs="+", choices=names("data"), required=True, metavar="DATASET")
    listed = (
        f"of {', '.join(methods)} (default: {' '.join(METHODS)}; of a transformer: {' '.join(TRANSFORMER_METHODS)})"
    )
    parser.add_argument("--methods", nargs="+", choices=methods, metavar="METHOD", help=listed)
    depths = "whole numbers, ranges such as 1-14, or 'all' (default: 2 and 4, and vanilla on all as well)"
    parser.add_argument("--layers", nargs="+", metavar="N", help=depths)
    parser.add_argument("--seeds", nargs="+", type=int, default=[233], metavar="SEED", help="(default: 233)")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds all data sets (default: data)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of every training run, in place of the setup's")
    parser.add_argument("--budget", type=budget_word, help=BUDGET_HELP)
    weights = "to start from, in place of pretraining (setup B) or of a download (setup A)"
    parser.add_argument("--weights", type=Path, metavar="FILE", help=weights)
    parser.add_argument("--dry_run", action="store_true", help="list the runs, and stop")
    parser.add_argument(WAIT, action="store_true", help=WAIT_HELP)
    options, extra = parser.parse_known_args([word for word in underscored(arguments) if word != "--"])
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs is {options.epochs}; allowed are whole numbers from 1")
    try:
        layers = options.layers and tuple(number for word in options.layers for number in _numbers(word))
    except ValueError as error:
        parser.error(f"--layers has {str(error)!r}; allowed are whole numbers from 1, ranges such as 1-14, or 'all'")
    default = TRANSFORMER_METHODS if is_transformer(options.model) else METHODS
    sweep = Sweep(
        setup=options.setup,
        model=options.model,
        datasets=tuple(dict.fromkeys(options.dataset)),
        methods=tuple(dict.fromkeys(options.methods or default)),
        layers=layers,
        seeds=tuple(dict.fromkeys(options.seeds)),
        runs_dir=options.runs_dir,
        budget=options.budget,
        weights=options.weights,
        epochs=options.epochs,
        extra=(*(["--data.root", options.data_dir] if options.data_dir else []), *extra),
    )
    try:
        jobs = sweep.jobs()
    except ExperimentError as error:
        parser.error(str(error))
    if extra and not all(job.known(sweep.runs_dir) for job in jobs):
        _check_extra(parser, jobs)
    return sweep, options.dry_run


def _check_extra(parser: argparse.ArgumentParser, jobs: Sequence[Job]) -> None:
    """Let the first job of each command parse what is not of a sweep, so that a typo is an error of the sweep."""
    from classification.cli import MENDABLE, check  # takes seconds

    for job in {job.arguments[0]: job for job in reversed(jobs)}.values():
        try:
            check(job.arguments)
        except MENDABLE as error:
            parser.error(one_line(error))


def _numbers(word: str) -> list[str]:
    """The numbers of layers that a word stands for: "4", "all", or each of "1-14"."""
    low, dash, high = word.partition("-")
    if word == "all":
        return [word]
    if not (low.isdecimal() and (high.isdecimal() if dash else True)) or int(low) < 1 or int(high or low) < int(low):
        raise ValueError(word)
    return [str(number) for number in range(int(low), int(high or low) + 1)]


def _run(arguments: Sequence[str]) -> None:
    from classification.cli import run  # not before the first run, as it takes seconds

    gc.collect()  # the run before leaves its network and images in reference cycles
    run(arguments)


def _mendable(error: Exception) -> bool:
    from classification.cli import MENDABLE

    return isinstance(error, MENDABLE)


def main(arguments: Sequence[str], command: Command = _run) -> int:
    """Run a sweep. Returns 0, or 1 after a list of what is not done, or 2 if nothing could be begun."""
    return finish(lambda work: _sweep(arguments, command))


def _sweep(arguments: Sequence[str], command: Command) -> int:
    sweep, dry_run = parse(arguments)
    jobs, root = sweep.jobs(), sweep.runs_dir
    if dry_run:
        list_jobs(jobs, PROGRAM)
        return 0
    return run_jobs(jobs, Program(PROGRAM, command, _mendable), root, WAIT in arguments)

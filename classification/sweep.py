"""Many runs by one command: pretrain (setup B), measure perplexity, train every method at every depth and seed.

Each run goes through the ordinary command line, so a run of a sweep and a run by hand are the same run: what is done is
skipped, what was interrupted is resumed. A run that fails does not stop the others. Arguments that are not of this
command, such as --data.batch_size 16, go to every run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from classification.plans import BUDGETS, METHODS, PERPLEXITY, Job, Sweep, names
from experiment import ExperimentError, add_planned

FAILURE = "failure.log"  # in a run's folder

Command = Callable[[Sequence[str]], None]


def run_all(jobs: Sequence[Job], command: Command, root: Path) -> list[Job]:
    """Run jobs one after the other; a failure is written, with its traceback, into the run's folder.

    Returns:
        The jobs that failed.
    """
    failed, seconds = [], []
    for number, job in enumerate(jobs, start=1):
        waiting = [later for later in jobs[number - 1 :] if not job.result(root).exists()]
        left = f"  (about {_duration(len(waiting) * sum(seconds) / len(seconds))} left)" if seconds else ""
        print(f"[{number}/{len(jobs)}] {job.title}{left}", flush=True)
        gc.collect()  # the run before leaves its network and images in reference cycles
        new, start = not job.result(root).exists(), time.perf_counter()
        if not _succeeds(job, command, root):
            failed.append(job)
        elif new:
            seconds.append(time.perf_counter() - start)
    return failed


def _succeeds(job: Job, command: Command, root: Path) -> bool:
    log = job.run.folder(root) / FAILURE
    try:
        command(job.arguments)
    except (KeyboardInterrupt, SystemExit):
        print(f"\nstopped during {job.title}; the same command goes on after its last whole epoch", file=sys.stderr)
        raise
    except Exception as error:
        from classification.cli import MENDABLE

        cause = str(error) if isinstance(error, MENDABLE) else traceback.format_exc()
        print(f"  failed: {' '.join(str(error).split())}", file=sys.stderr)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{job.title}\npython -m classification {' '.join(job.arguments)}\n{cause}\n", encoding="utf-8")
        return False
    log.unlink(missing_ok=True)
    return True


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


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
    listed = f"of {', '.join(methods)} (default: {' '.join(METHODS)})"
    parser.add_argument("--methods", nargs="+", choices=methods, default=METHODS, metavar="METHOD", help=listed)
    depths = "whole numbers, ranges such as 1-14, or 'all' (default: 2 and 4, and vanilla on all as well)"
    parser.add_argument("--layers", nargs="+", metavar="N", help=depths)
    parser.add_argument("--seeds", nargs="+", type=int, default=[233], metavar="SEED", help="(default: 233)")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds all data sets (default: data)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of every training run, in place of the setup's")
    budget = "ASI's memory: as published, or of the HOSVD run (default: as published where it is known)"
    parser.add_argument("--budget", choices=BUDGETS, help=budget)
    weights = "to start from, in place of pretraining (setup B) or of a download (setup A)"
    parser.add_argument("--weights", type=Path, metavar="FILE", help=weights)
    parser.add_argument("--dry_run", action="store_true", help="list the runs, and stop")
    options, extra = parser.parse_known_args([word for word in arguments if word != "--"])
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs is {options.epochs}; allowed are whole numbers from 1")
    try:
        layers = options.layers and tuple(number for word in options.layers for number in _numbers(word))
    except ValueError as error:
        parser.error(f"--layers has {str(error)!r}; allowed are whole numbers from 1, ranges such as 1-14, or 'all'")
    sweep = Sweep(
        setup=options.setup,
        model=options.model,
        datasets=tuple(dict.fromkeys(options.dataset)),
        methods=tuple(dict.fromkeys(options.methods)),
        layers=layers,
        seeds=tuple(dict.fromkeys(options.seeds)),
        runs_dir=options.runs_dir,
        budget=options.budget,
        weights=options.weights,
        epochs=options.epochs,
        extra=(*(["--data.root", options.data_dir] if options.data_dir else []), *extra),
    )
    try:
        sweep.jobs()
    except ExperimentError as error:
        parser.error(str(error))
    return sweep, options.dry_run


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

    run(arguments)


def main(arguments: Sequence[str], command: Command = _run) -> int:
    """Run a sweep. Returns 0, or 1 after a list of what failed, or 2 if nothing could be begun."""
    sweep, dry_run = parse(arguments)
    jobs, root = sweep.jobs(), sweep.runs_dir
    if dry_run:
        for number, job in enumerate(jobs, start=1):
            print(f"[{number}/{len(jobs)}] {job.title}\n  python -m classification {' '.join(job.arguments)}")
        return 0
    try:
        add_planned(root, (job.run for job in jobs if job.run.method != PERPLEXITY))
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    failed = run_all(jobs, command, root)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs done, {_duration(time.perf_counter() - start)}")
    print(f"tables, plots and a page of them: python -m report {root}")
    if failed:
        logs = (f"  {job.title}: {job.run.folder(root) / FAILURE}" for job in failed)
        print(f"failed ({len(failed)}), each with its log:", *logs, sep="\n", file=sys.stderr)
    return 1 if failed else 0

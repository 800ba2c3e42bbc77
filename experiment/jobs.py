"""Many runs one after the other: each through its task's ordinary command, none stopped by the failure of another."""

from __future__ import annotations

import contextlib
import enum
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import InUseError, is_mendable
from experiment.plan import add_planned
from experiment.receipt import has_receipt, write_receipt
from experiment.record import RESULT, Run, is_result
from experiment.signals import Stopped, stopped_by

FAILURE = "failure.log"  # in a run's folder
WAIT = "--wait"  # option of a sweep
WAIT_HELP = "wait for runs that other processes are doing, and do then what is left"
PAUSE = 30.0  # seconds between two looks at what is in work elsewhere

Command = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        title: what the run is, in short.
        run: which run; of a perplexity table the method is "perplexity".
        arguments: of the command that does it.
        result: name of the file that the run leaves in its folder when it is done.
    """

    title: str
    run: Run
    arguments: tuple[str, ...]
    result: str = RESULT

    def done(self, root: Path) -> bool:
        """Whether the run is finished, below the folder of all runs."""
        return is_result(self.run.folder(root) / self.result, run=self.run)

    def known(self, root: Path) -> bool:
        """Whether it was done by this very command, which then has nothing to do."""
        return has_receipt(self.run.folder(root) / self.result, self.arguments) and self.done(root)

    def log(self, root: Path) -> Path:
        """The file that says why the run failed."""
        return self.run.folder(root) / FAILURE

    def needs(self, other: Job, root: Path) -> bool:
        """Whether its arguments name what another job makes."""
        folder = str(other.run.folder(root))
        return any(word == folder or word.startswith(f"{folder}/") for word in self.arguments)


class Outcome(enum.Enum):
    """How a job ended."""

    DONE = "done"
    FAILED = "failed"
    ELSEWHERE = "in work elsewhere"  # or it needs what is


@dataclass(frozen=True)
class Program:
    """How one job is done.

    Attributes:
        name: what a user types to do a job by hand, such as "python -m classification".
        command: does a job.
    """

    name: str
    command: Command


def list_jobs(jobs: Sequence[Job], program: str) -> None:
    """Print what a dry run shows: every job and its command."""
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.title}\n  {program} {' '.join(job.arguments)}")


def run_jobs(jobs: Sequence[Job], program: Program, root: Path, wait: bool = False) -> int:
    """Run jobs in their order below the folder `root`, with what is left at each; note before what is planned.

    A failure is written, with its traceback, into the run's folder. A run that another process is doing is left to it,
    with what needs it, and come back to once, at the end; with `wait`, until it is done or given up there. A run that
    was done by the same command before is not loaded again.

    Returns:
        0; 1 after a list of what is not done.

    Raises:
        ExperimentError: the folder cannot be written.
    """
    add_planned(root, (job.run for job in jobs if job.result == RESULT))
    start = time.perf_counter()
    outcomes = _run(jobs, program, root)
    outcomes |= _run([job for job in jobs if outcomes[job] is Outcome.ELSEWHERE], program, root)
    while wait and (held := [job for job in jobs if outcomes[job] is Outcome.ELSEWHERE]):
        print(f"waiting for {len(held)} runs that are in work elsewhere", flush=True)
        time.sleep(PAUSE)
        outcomes |= _run(held, program, root)
    failed, elsewhere = ([job for job in jobs if outcomes[job] is how] for how in (Outcome.FAILED, Outcome.ELSEWHERE))
    done = len(jobs) - len(failed) - len(elsewhere)
    print(f"{done} of {len(jobs)} runs done, {duration(time.perf_counter() - start)}")
    print(f"tables, plots and a page of them: python -m report {root}")
    if failed:
        logs = (f"  {job.title}: {job.log(root)}" for job in failed)
        print(f"failed ({len(failed)}), each with its log:", *logs, sep="\n", file=sys.stderr)
    if elsewhere:
        told = (f"  {job.title}" for job in elsewhere)
        print(f"in work elsewhere ({len(elsewhere)}); come back later for them:", *told, sep="\n", file=sys.stderr)
    return 1 if failed or elsewhere else 0


def _run(jobs: Sequence[Job], program: Program, root: Path) -> dict[Job, Outcome]:
    outcomes: dict[Job, Outcome] = {}
    seconds: dict[str, list[float]] = defaultdict(list)
    undone = {job for job in jobs if not job.done(root)}
    for number, job in enumerate(jobs, start=1):
        waiting = [later for later in jobs[number - 1 :] if seconds and later in undone]
        left = f"  (about {duration(_left(waiting, seconds))} left)" if waiting else ""
        print(f"[{number}/{len(jobs)}] {job.title}{left}", flush=True)
        new, start = job in undone, time.perf_counter()
        undone.discard(job)
        if any(job.needs(other, root) for other, how in outcomes.items() if how is Outcome.ELSEWHERE):
            outcomes[job] = Outcome.ELSEWHERE
            print("  it needs what is in work elsewhere", flush=True)
            continue
        outcomes[job] = _outcome(job, program, root)
        if new and outcomes[job] is Outcome.DONE:
            seconds[_kind(job)].append(time.perf_counter() - start)
    return outcomes


def _kind(job: Job) -> str:
    """Jobs of one kind take about as long as each other: runs of one setup, or measurements of perplexity."""
    return f"{job.run.setup} {job.result}"


def _left(waiting: Sequence[Job], seconds: Mapping[str, list[float]]) -> float:
    """How long jobs will take, each as the median of its kind so far, or of all where none of its kind is done."""
    every = statistics.median(value for values in seconds.values() for value in values)
    return sum(statistics.median(seconds.get(_kind(job)) or [every]) for job in waiting)


def _outcome(job: Job, program: Program, root: Path) -> Outcome:
    if job.known(root):
        print("  done already, by this same command", flush=True)
        return Outcome.DONE
    try:
        program.command(job.arguments)
    except Stopped as stopped:
        stopped.during = job.title
        raise
    except (KeyboardInterrupt, SystemExit):
        print(f"\nstopped during {job.title}; the same command goes on where it was saved last", file=sys.stderr)
        raise
    except InUseError:
        print("  in work elsewhere", flush=True)
        return Outcome.ELSEWHERE
    except Exception as error:
        if (stop := stopped_by(error)) is not None:
            stop.during = job.title
            raise stop from None
        cause = str(error) if is_mendable(error) else traceback.format_exc()
        print(f"  failed: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        _write_log(job, root, f"{job.title}\n{program.name} {' '.join(job.arguments)}\n{cause}\n")
        return Outcome.FAILED
    with contextlib.suppress(OSError):
        job.log(root).unlink(missing_ok=True)
    if job.done(root):
        write_receipt(job.run.folder(root) / job.result, job.arguments)
    return Outcome.DONE


def _write_log(job: Job, root: Path, text: str) -> None:
    log = job.log(root)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        print(f"  its log {log} cannot be written ({error.strerror})", file=sys.stderr)


def duration(seconds: float) -> str:
    """A time in seconds, such as "2 h 05 min", "3 min 20 s" or "7 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"

"""Many runs one after the other: each through its task's ordinary command, none stopped by the failure of another."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import ExperimentError
from experiment.plan import add_planned
from experiment.record import RESULT, Run

FAILURE = "failure.log"  # in a run's folder

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
        return (self.run.folder(root) / self.result).exists()

    def log(self, root: Path) -> Path:
        """The file that says why the run failed."""
        return self.run.folder(root) / FAILURE


@dataclass(frozen=True)
class Program:
    """How one job is done.

    Attributes:
        name: what a user types to do a job by hand, such as "python -m classification".
        command: does a job.
        mendable: whether an error's message says all that its user needs, so that no traceback is written.
    """

    name: str
    command: Command
    mendable: Callable[[Exception], bool]


def list_jobs(jobs: Sequence[Job], program: str) -> None:
    """Print what a dry run shows: every job and its command."""
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.title}\n  {program} {' '.join(job.arguments)}")


def run_jobs(jobs: Sequence[Job], program: Program, root: Path) -> int:
    """Run jobs in their order below the folder `root`, with what is left at each; note before what is planned.

    A failure is written, with its traceback, into the run's folder.

    Returns:
        0; 1 after a list of what failed; 2 if nothing could be begun.
    """
    try:
        add_planned(root, (job.run for job in jobs if job.result == RESULT))
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    failed = _run(jobs, program, root)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs done, {_duration(time.perf_counter() - start)}")
    print(f"tables, plots and a page of them: python -m report {root}")
    if failed:
        logs = (f"  {job.title}: {job.log(root)}" for job in failed)
        print(f"failed ({len(failed)}), each with its log:", *logs, sep="\n", file=sys.stderr)
    return 1 if failed else 0


def _run(jobs: Sequence[Job], program: Program, root: Path) -> list[Job]:
    failed: list[Job] = []
    seconds: list[float] = []
    for number, job in enumerate(jobs, start=1):
        waiting = [later for later in jobs[number - 1 :] if not later.done(root)]
        left = f"  (about {_duration(len(waiting) * sum(seconds) / len(seconds))} left)" if seconds else ""
        print(f"[{number}/{len(jobs)}] {job.title}{left}", flush=True)
        new, start = not job.done(root), time.perf_counter()
        if not _succeeds(job, program, root):
            failed.append(job)
        elif new:
            seconds.append(time.perf_counter() - start)
    return failed


def _succeeds(job: Job, program: Program, root: Path) -> bool:
    log = job.log(root)
    try:
        program.command(job.arguments)
    except (KeyboardInterrupt, SystemExit):
        print(f"\nstopped during {job.title}; the same command goes on where it was saved last", file=sys.stderr)
        raise
    except Exception as error:
        cause = str(error) if program.mendable(error) else traceback.format_exc()
        print(f"  failed: {' '.join(str(error).split())}", file=sys.stderr)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{job.title}\n{program.name} {' '.join(job.arguments)}\n{cause}\n", encoding="utf-8")
        return False
    log.unlink(missing_ok=True)
    return True


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"

"""Many runs one after the other: each through its task's ordinary command, none stopped by the failure of another."""

from __future__ import annotations

import contextlib
import enum
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import InUseError, is_mendable
from experiment.lock import holder
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
        run: which run; of a perplexity table see `experiment.method.table_tag`.
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


def needed(jobs: Sequence[Job], root: Path) -> dict[Job, list[Job]]:
    """Of each job those others whose folders, or files in them, its arguments name."""
    made = {str(job.run.folder(root)): job for job in jobs}
    needs: dict[Job, list[Job]] = {}
    for job in jobs:
        found: dict[Job, None] = {}
        for word in job.arguments:
            while word:
                if word in made and made[word] != job:
                    found[made[word]] = None
                word = word.rpartition("/")[0]
        needs[job] = list(found)
    return needs


class Outcome(enum.Enum):
    """How a job ended."""

    DONE = "done"
    FAILED = "failed"
    ELSEWHERE = "in work elsewhere"  # or it needs what is


@dataclass(frozen=True)
class Program:
    """How one job is done; what another process gets to do jobs by, so all of it is found by import.

    Attributes:
        name: what a user types to do a job by hand, such as "python -m classification".
        command: does a job.
    """

    name: str
    command: Command

    def line(self, job: Job) -> str:
        """What a user types to do a job."""
        return f"{self.name} {shlex.join(job.arguments)}"


Doing = Callable[[Sequence[Job]], dict[Job, Outcome]]  # how jobs are done, of which each finds what it needs before it


def list_jobs(jobs: Sequence[Job], program: Program) -> None:
    """Print what a dry run shows: every job and its command."""
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.title}\n  {program.line(job)}")


def run_jobs(jobs: Sequence[Job], program: Program, root: Path, wait: bool = False, doing: Doing | None = None) -> int:
    """Run jobs in their order below the folder `root`, with what is left at each; note before what is planned.

    A failure is written, with its traceback, into the run's folder; what needs that run fails with it, unbegun. A run
    that another process is doing is left to it, with what needs it, and come back to once, at the end; with `wait`,
    until it is done or given up there. A run that was done by the same command before is not loaded again.

    Args:
        jobs: see `experiment.sweep.Sweep.jobs`.
        program: how each is done.
        root: folder of all runs.
        wait: see above.
        doing: does jobs, by default one after the other in this process.

    Returns:
        0; 1 after a list of what is not done, or not under its name.

    Raises:
        ExperimentError: the folder cannot be written.
    """
    note_plan(jobs, root)
    doing = doing or (lambda some: in_turn(some, program, root))
    start = time.perf_counter()
    outcomes = doing(jobs)
    outcomes |= doing([job for job in jobs if outcomes[job] is Outcome.ELSEWHERE])
    while wait and (held := [job for job in jobs if outcomes[job] is Outcome.ELSEWHERE]):
        print(f"waiting for {len(held)} runs that are in work elsewhere", flush=True)
        time.sleep(PAUSE)
        outcomes |= doing(held)
    return conclude(jobs, outcomes, root, time.perf_counter() - start)


def note_plan(jobs: Sequence[Job], root: Path) -> None:
    """Note what is planned.

    Raises:
        ExperimentError: the folder cannot be written.
    """
    add_planned(root, (job.run for job in jobs if job.result == RESULT))


def conclude(jobs: Sequence[Job], outcomes: Mapping[Job, Outcome], root: Path, seconds: float) -> int:
    """Say how many jobs are done, and list those that are not; 0, or 1 where there are such.

    What is done under another name than the sweep's, by which nothing finds it, is not done.
    """
    failed, elsewhere = ([job for job in jobs if outcomes[job] is how] for how in (Outcome.FAILED, Outcome.ELSEWHERE))
    astray = [job for job in jobs if outcomes[job] is Outcome.DONE and not job.done(root)]
    done = len(jobs) - len(failed) - len(elsewhere) - len(astray)
    print(f"{done} of {len(jobs)} runs done, {duration(seconds)}")
    print(f"tables, plots and a page of them: python -m report {shlex.quote(str(root))}")
    if astray:
        told = (f"  {job.title}: no {job.run.folder(root) / job.result}" for job in astray)
        print(
            f"done under other names ({len(astray)}), by which what needs these runs does not find them, nor this "
            f"sweep when it is run again; rename the method's config, which has to be called as its tag:",
            *told,
            sep="\n",
            file=sys.stderr,
        )
    if failed:
        logs = (f"  {job.title}: {job.log(root)}" for job in failed)
        print(f"failed ({len(failed)}), each with its log:", *logs, sep="\n", file=sys.stderr)
    if elsewhere:
        told = (f"  {job.title}" for job in elsewhere)
        print(f"in work elsewhere ({len(elsewhere)}); come back later for them:", *told, sep="\n", file=sys.stderr)
    return 1 if failed or elsewhere or astray else 0


class Tally:
    """How far a list of jobs is.

    Args:
        jobs: all of them, in their order.
        root: folder of all runs.
        workers: how many are done at a time.
    """

    def __init__(self, jobs: Sequence[Job], root: Path, workers: int = 1) -> None:
        self.outcomes: dict[Job, Outcome] = {}
        self._jobs, self._root, self._workers = jobs, root, workers
        self._numbers = {job: number for number, job in enumerate(jobs, start=1)}
        self._needs = needed(jobs, root)
        self._undone = {job for job in jobs if not job.done(root)}
        self._left = Counter(_kind(job) for job in self._undone)
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def heading(self, job: Job) -> str:
        """The line ahead of what a job prints; of the time left, it counts the job itself."""
        left = duration(self._time_left() / self._workers) if self._seconds and self._left.total() else ""
        return f"[{self._numbers[job]}/{len(self._jobs)}] {job.title}" + (f"  (about {left} left)" if left else "")

    def waits_for(self, job: Job) -> list[Job]:
        """Those that it needs of which it is not known how they end."""
        return [other for other in self._needs[job] if other not in self.outcomes]

    def leave_out(self, job: Job, program: Program) -> bool:
        """Whether a job is not to be begun, as it needs what has failed or is in work elsewhere, which is said."""
        ends = {other: self.outcomes.get(other) for other in self._needs[job]}
        failed = [other for other, outcome in ends.items() if outcome is Outcome.FAILED]
        if failed and not job.known(self._root):
            print(self.heading(job), flush=True)
            self.add(job, refuse_job(job, failed[0], program, self._root))
        elif Outcome.ELSEWHERE in ends.values():
            print(self.heading(job), "  it needs what is in work elsewhere", sep="\n", flush=True)
            self.add(job, Outcome.ELSEWHERE)
        return job in self.outcomes

    def add(self, job: Job, outcome: Outcome, seconds: float = 0.0) -> None:
        """Note how a job has ended, and how long it took."""
        self.outcomes[job] = outcome
        if job in self._undone:
            self._undone.discard(job)
            self._left[_kind(job)] -= 1
            if outcome is Outcome.DONE:
                self._seconds[_kind(job)].append(seconds)

    def _time_left(self) -> float:
        """Each as the median of its kind so far, or of all where none of its kind is done."""
        every = statistics.median(value for values in self._seconds.values() for value in values)
        return sum(
            count * (statistics.median(self._seconds[kind]) if self._seconds.get(kind) else every)
            for kind, count in self._left.items()
        )


def in_turn(jobs: Sequence[Job], program: Program, root: Path) -> dict[Job, Outcome]:
    """Do jobs one after the other, in this process."""
    tally = Tally(jobs, root)
    for job in jobs:
        if tally.leave_out(job, program):
            continue
        print(tally.heading(job), flush=True)
        start = time.perf_counter()
        tally.add(job, do_job(job, program, root), time.perf_counter() - start)
    return tally.outcomes


def _kind(job: Job) -> str:
    """Jobs of one kind take about as long as each other: runs of one setup, or measurements of perplexity."""
    return f"{job.run.setup} {job.result}"


def do_job(job: Job, program: Program, root: Path) -> Outcome:
    """Do a job in this process, unless another one is doing it or it is known to be done.

    Raises:
        Stopped: a signal came.
    """
    if job.known(root):
        forget_failure(job, root)
        print("  done already, by this same command", flush=True)
        return Outcome.DONE
    if (by := holder(job.run.folder(root), asks=True)) is not None:
        print(f"  in work elsewhere: {by}", flush=True)
        return Outcome.ELSEWHERE
    try:
        program.command(job.arguments)
    except Stopped as stopped:
        stopped.during = job.title
        raise
    except (KeyboardInterrupt, SystemExit):
        print(f"\nstopped during {job.title}; the same command goes on where it was saved last", file=sys.stderr)
        raise
    except InUseError as error:
        if not job.done(root):
            print(f"  in work elsewhere: {error}", flush=True)
            return Outcome.ELSEWHERE
    except Exception as error:
        if (stop := stopped_by(error)) is not None:
            stop.during = job.title
            raise stop from None
        cause = str(error) if is_mendable(error) else traceback.format_exc()
        print(f"  failed: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        write_log(job, root, f"{job.title}\n{program.line(job)}\n{cause}\n")
        return Outcome.FAILED
    forget_failure(job, root)
    if job.done(root):
        write_receipt(job.run.folder(root) / job.result, job.arguments)
    return Outcome.DONE


def refuse_job(job: Job, needs: Job, program: Program, root: Path) -> Outcome:
    """Say, in its log as well, that a job is not begun, as what it needs has failed.

    Such a one may have left something: weights of its first epochs, or a table by other settings.
    """
    why = f"not begun: it needs {needs.title}, which is not done, see {needs.log(root)}"
    print(f"  failed: {why}", file=sys.stderr, flush=True)
    write_log(job, root, f"{job.title}\n{program.line(job)}\n{why}\n")
    return Outcome.FAILED


def forget_failure(job: Job, root: Path) -> None:
    """Remove what an earlier try of a job has left, which is done, as where it was asked for with other settings."""
    with contextlib.suppress(OSError):
        job.log(root).unlink(missing_ok=True)


def write_log(job: Job, root: Path, text: str) -> None:
    """Write why a job failed into its folder, or say why that cannot be."""
    log = job.log(root)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        print(f"  its log {log} cannot be written ({error.strerror})", file=sys.stderr)


def write_report(root: Path) -> int:
    """Write the report of all runs, in a process of its own; its exit code."""
    return subprocess.run([sys.executable, "-m", "report", str(root)], check=False).returncode


def duration(seconds: float) -> str:
    """A time in seconds, such as "2 h 05 min", "3 min 20 s" or "7 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"

"""Many runs one after the other: each through its task's ordinary command, none stopped by the failure of another."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FAILURES = "failures.log"

Command = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its title and the arguments of the command that does it."""

    title: str
    arguments: tuple[str, ...]


def list_jobs(jobs: Sequence[Job], program: str) -> None:
    """Print what a dry run shows: every job and its command."""
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.title}\n  {program} {' '.join(job.arguments)}")


def run_jobs(
    jobs: Sequence[Job], command: Command, program: str, log: Path, mendable: tuple[type[Exception], ...]
) -> int:
    """Run jobs in their order; failures go to `log` with their traceback.

    Args:
        jobs: what to run.
        command: does one job.
        program: what a user types to do one job by hand, such as "python -m classification".
        log: file of failures.
        mendable: errors whose message says everything, so that no traceback is written.

    Returns:
        0, or 1 after a list of what failed.
    """
    start = time.perf_counter()
    failed = []
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.title}", flush=True)
        try:
            command(job.arguments)
        except Exception as error:
            failed.append(job)
            cause = str(error) if isinstance(error, mendable) else traceback.format_exc()
            print(f"  failed: {' '.join(str(error).split())}", file=sys.stderr)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(f"{job.title}\n{program} {' '.join(job.arguments)}\n{cause}\n\n")
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs done, {time.perf_counter() - start:.0f} s")
    if failed:
        print(f"failed, see {log}:", *(f"  {job.title}" for job in failed), sep="\n", file=sys.stderr)
    return 1 if failed else 0

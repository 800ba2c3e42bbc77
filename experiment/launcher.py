"""Where the jobs of a sweep are done: in this process, in several of this machine, or by Slurm."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiment.errors import ExperimentError
from experiment.jobs import Job, Program, run_jobs, write_report
from experiment.process_group import require_room

SLURM = "--slurm."  # how options begin that are sbatch's
# What a sweep sets itself, and why.
_RESERVED = {
    **dict.fromkeys(
        ("array", "dependency", "output", "error", "open-mode", "requeue", "signal", "wait"), "a sweep sets it"
    ),
    **dict.fromkeys(
        ("nodes", "ntasks", "ntasks-per-node"),
        "a run of a sweep starts its processes itself, such as by --trainer.devices 2 or --processes 2; one of several "
        "machines is started by srun, see docs/machines.md",
    ),
}


@dataclass(frozen=True)
class Launcher:
    """Who does the jobs of a sweep.

    Attributes:
        kind: "local" or "slurm".
        workers: how many are done at a time; None for one on this machine, and for as many as Slurm likes.
        slurm: options of sbatch, names without dashes ahead and their values; True for one that has none.
        wait: whether to wait for what other processes are doing, and for what Slurm was given.
        report: whether to write the report of all runs in the end, which Slurm always does.
    """

    kind: Literal["local", "slurm"] = "local"
    workers: int | None = None
    slurm: tuple[tuple[str, str | bool], ...] = ()
    wait: bool = False
    report: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ExperimentError(f"--workers is {self.workers}; allowed are whole numbers from 1")
        if self.kind == "local":
            require_room(f"--workers {self.workers}", self.workers or 1)
        if self.slurm and self.kind != "slurm":
            raise ExperimentError(f"{SLURM}{self.slurm[0][0]} is for --launcher slurm; leave it out, or give that")
        for name, _ in self.slurm:
            if name in _RESERVED:
                raise ExperimentError(f"{SLURM}{name} cannot be given: {_RESERVED[name]}")

    def run(self, jobs: Sequence[Job], program: Program, root: Path) -> int:
        """Do jobs; the exit code as of `experiment.jobs.run_jobs`, or else that of the report."""
        if self.kind == "slurm":
            from experiment.slurm import submit

            return submit(jobs, program, root, dict(self.slurm), self.workers, self.wait)
        code = self._run_here(jobs, program, root)
        reported = write_report(root) if self.report else 0
        return code or reported

    def _run_here(self, jobs: Sequence[Job], program: Program, root: Path) -> int:
        if self.workers in (None, 1):
            return run_jobs(jobs, program, root, self.wait)
        assert self.workers is not None
        from experiment.workers import Workers

        with Workers(program, root, self.workers) as workers:
            return run_jobs(jobs, program, root, self.wait, workers.run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `launcher_of` reads."""
    where = "local, on this machine (default); slurm, as arrays of jobs of which each waits for what it needs"
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help=where)
    several = "how many runs at a time, each with its share of the threads and of the accelerators (default: 1; of "
    several += "Slurm as many as it likes)"
    parser.add_argument("--workers", type=int, metavar="N", help=several)
    written = "write the report of all runs in the end, whatever failed; Slurm always does"
    parser.add_argument("--report", action="store_true", help=written)
    passed = "any option of sbatch, for every job: --slurm.partition gpu --slurm.time 4:00:00 --slurm.gpus 1"
    parser.add_argument(f"{SLURM}OPTION", metavar="VALUE", help=passed)


def take_slurm(arguments: Sequence[str]) -> tuple[list[str], tuple[tuple[str, str | bool], ...]]:
    """Arguments without those of sbatch, and these."""
    rest: list[str] = []
    taken: dict[str, str | bool] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith(SLURM):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix(SLURM).partition("=")
        if not equals and words and not words[0].startswith("--"):
            value, equals = words.pop(0), "="
        taken[name] = value if equals else True
    return rest, tuple(taken.items())


def launcher_of(options: argparse.Namespace) -> Launcher:
    """The launcher that parsed options describe, with those of sbatch as `slurm`.

    Raises:
        ExperimentError: they do not go together.
    """
    return Launcher(options.launcher, options.workers, options.slurm, options.wait, options.report)

"""Measurements in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from benchmarks import CPUS


def run_python(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run this Python with these arguments, on all CPUs that this process was started with; its output as text."""
    with _on_all_cpus():
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )


@contextmanager
def _on_all_cpus() -> Iterator[None]:
    """A process inherits the CPUs of the thread that starts it; one that is bound would put all its threads on one."""
    if CPUS is None:
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CPUS)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)

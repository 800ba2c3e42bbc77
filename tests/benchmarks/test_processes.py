"""A process that measures has all CPUs, also where this one's threads are bound to theirs."""

import os

import pytest

import benchmarks
from benchmarks.processes import run_python

SHOWS = "import os; print(sorted(os.sched_getaffinity(0)))"


@pytest.mark.skipif(benchmarks.CPUS is None or len(benchmarks.CPUS) < 2, reason="needs Linux and two CPUs")
def test_a_bound_thread_does_not_bind_the_process_that_it_starts():
    before = os.sched_getaffinity(0)
    one = {min(benchmarks.CPUS)}
    os.sched_setaffinity(0, one)
    try:
        assert run_python(["-c", SHOWS]).stdout.strip() == str(sorted(benchmarks.CPUS))
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.slow
def test_the_cpus_are_those_of_before_torch_bound_the_thread():
    bound = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_PROC_BIND": "true"}
    prints = f"print(run_python(['-c', {SHOWS!r}]).stdout)"
    program = f"import benchmarks.memory; from benchmarks.processes import run_python; {prints}"
    assert run_python(["-c", program], bound).stdout.strip() == run_python(["-c", SHOWS]).stdout.strip()


def test_the_environment_and_the_exit_status_come_through():
    done = run_python(["-c", "import os, sys; print(os.environ['WORD']); sys.exit(3)"], {**os.environ, "WORD": "there"})
    assert (done.returncode, done.stdout) == (3, "there\n")

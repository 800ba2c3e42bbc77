"""Processes that load data end with the one that has started them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import multiprocessing, os, signal, time
from experiment.signals import in_worker, stoppable

def load(ready):
    in_worker()
    ready.set()
    time.sleep(600)

fork = multiprocessing.get_context("fork")
with stoppable():
    loads, ready = [], [fork.Event() for _ in range(2)]
    for event in ready:
        loads.append(fork.Process(target=load, args=(event,), daemon=True))
        loads[-1].start()
        assert event.wait(60)
    os.kill(loads[0].pid, signal.SIGTERM)  # comes to all processes at once, as by Slurm
    time.sleep(0.2)
    assert loads[0].is_alive()
print(*(process.pid for process in loads))
"""


@pytest.mark.slow
def test_python_ends_though_what_loads_data_lets_a_signal_pass() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == 2
    assert not any(Path(f"/proc/{number}").exists() for number in done.stdout.split())

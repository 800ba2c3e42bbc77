"""A warning reaches the user of a command as one line, without the place in the code that has raised it."""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from experiment import warned
from experiment.warned import say_warnings, tell_crowded

ROOT = Path(__file__).parents[2]


def test_a_warning_is_one_line_that_is_said_once(capsys):
    others = []
    with warnings.catch_warnings(action="default"):
        warnings.showwarning = lambda message, *where: others.append(str(message))
        say_warnings()
        for _ in range(2):
            warnings.warn("the best candidates\n  take 5 bytes", stacklevel=1)
            warnings.warn("the best candidates take 5 bytes", RuntimeWarning, stacklevel=1)
        warnings.warn("This DataLoader will create 3 worker processes in total", stacklevel=1)
        assert capsys.readouterr().err == "warning: the best candidates take 5 bytes\n"
        warnings.warn("an argument has another name now", DeprecationWarning, stacklevel=1)
    assert others == ["an argument has another name now"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("count", "said"), [(2, False), (3, True)])
def test_more_processes_that_load_than_cores_are_told_once(monkeypatch, capsys, count, said):
    monkeypatch.setattr(warned, "cores", lambda: 2)
    tell_crowded.cache_clear()
    for _ in range(2):
        tell_crowded(f"--data.workers {count}", count)
    line = f"note: --data.workers {count} is more processes than the 2 cores here; fewer may load faster\n"
    assert capsys.readouterr().out == (line if said else "")


def test_a_warning_that_cannot_be_written_is_no_error(monkeypatch):
    with Path("/dev/full").open("w", buffering=1) as full, warnings.catch_warnings(action="default"):
        monkeypatch.setattr(sys, "stderr", full)
        say_warnings()
        warnings.warn("the best candidates take 5 bytes", stacklevel=1)
        with contextlib.suppress(OSError):
            full.close()


OUTSIDE = """
import runpy, sys, warnings
import experiment.command
experiment.command.finish = lambda command: warnings.warn("something odd") or 0
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["classification", "report", "segmentation"])
def test_so_it_is_in_each_program(module):
    code = OUTSIDE.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": ""}, capture_output=True, text=True
    )
    assert done.stderr == "warning: something odd\n"

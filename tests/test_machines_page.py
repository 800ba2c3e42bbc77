"""The commands of docs/machines.md are such as the suite takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from classification import sweep
from experiment.launcher import Launcher
from report.__main__ import parser

PAGE = (Path(__file__).parents[1] / "docs" / "machines.md").read_text()
COMMANDS = dict(re.findall(r"<!-- command: ([\w ]+) -->\n```bash\n(.+?)```", PAGE, re.DOTALL))
SLURM = (("partition", "gpu"), ("time", "4:00:00"), ("gpus", "1"), ("cpus-per-task", "8"), ("mem", "32G"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one after the other", Launcher()),
        ("several at once", Launcher(workers=8)),
        ("slurm", Launcher("slurm", 16, SLURM)),
    ],
)
def test_a_sweep_of_the_page_is_launched_as_it_says(name: str, expected: Launcher) -> None:
    words = shlex.split(COMMANDS[name].replace("\\\n", " "))
    assert words[:4] == ["python", "-m", "classification", "sweep"]
    found, _ = sweep.parse(words[4:])
    assert found.launcher == expected
    assert {job.run.layers for job in found.jobs()} == {2, 4, "all"}
    assert not found.extra


def test_the_command_that_watches_is_the_report_s() -> None:
    words = shlex.split(COMMANDS["watch"])
    assert words[:3] == ["python", "-m", "report"]
    assert parser().parse_args(words[3:]).watch

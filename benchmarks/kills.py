"""A run of its own process that is killed at a chosen moment, and what two finished runs differ in."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiment.files import PART
from experiment.record import RESULT

METRICS = "metrics.csv"
BEGUN = ("training: ", "resuming: ", "from ")  # how the line starts that a run prints when it is loaded
PATIENCE = 300  # seconds after which a run that does not end is an error
_EVERY = 0.0005  # seconds between two looks
_LONGEST = 200  # characters of what is said of one difference


class KillError(Exception):
    """A run that does not end as it has to; says how."""


@dataclass
class Process:
    """One try of a command, whose output goes to a file.

    Attributes:
        process: it, with a group of its own.
        output: the file.
    """

    process: subprocess.Popen[bytes]
    output: Path

    @classmethod
    def start(cls, words: Sequence[str], output: Path, temporary: Path) -> Process:
        """Start `python WORDS` with its own temporary folder and one thread."""
        environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=file, env=environment, start_new_session=True
            )
        return cls(process, output)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to kill."""
        return self.process.poll() is not None

    @property
    def begun(self) -> bool:
        """Whether it is loaded, and at work in its folder."""
        lines = self.output.read_text(errors="replace").splitlines()
        return any(line.startswith(BEGUN) for line in lines)

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Wait until something holds; False if the process ends before, or that takes too long."""
        deadline = time.monotonic() + seconds
        while not self.ended and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(_EVERY)
        return False

    def kill(self) -> bool:
        """SIGKILL to the process and all that it has started; False if it had ended by itself."""
        alive = not self.ended
        if alive:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL and alive

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            KillError: it takes too long, or its exit code is not 0.
        """
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise KillError(f"a run was still at work after {PATIENCE} s: {self._last_words()}") from None
        if code:
            raise KillError(f"a run ended with exit code {code}: {self._last_words()}")

    def _last_words(self) -> str:
        return " | ".join(self.output.read_text(errors="replace").splitlines()[-3:])


def parts(folder: Path) -> list[str]:
    """Names of the files that are half written below a run's folder, each without what marks it as such."""
    found = []
    for place in (folder, folder / "checkpoints"):
        try:
            names = [path.name for path in place.iterdir()]
        except OSError:
            continue
        found += [name[1:].rsplit(".", 2)[0] for name in names if name.startswith(".") and name.endswith(PART)]
    return found


def differences(folder: Path, other: Path) -> list[str]:
    """In what two finished runs' folders differ; times and the version of the code do not count.

    Args:
        folder: of a run.
        other: of the same run.
    """
    found = []
    files, others = _files(folder), _files(other)
    found += [f"{name} is there in one alone" for name in sorted(files ^ others)]
    for name in sorted(files & others):
        if name.endswith((".ckpt", ".pth")):
            one, two = (_state(path / name) for path in (folder, other))
            found += [f"{name}: {where}" for where in _unequal(one, two)]
    for name, read in ((RESULT, _record), (METRICS, _rows)):
        found += [f"{name}: {where}" for where in _unequal(read(folder / name), read(other / name))]
    return found


def _files(folder: Path) -> set[str]:
    """Names of all files of a run, but for MMEngine's logs and configs of each try, which are named by the time."""
    every = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name for name in every if not re.match(r"\d{8}_\d{6}", name)}


def _state(path: Path) -> dict[str, Any]:
    """What a checkpoint has of the training: weights, optimizer, schedule, state of methods, steps."""
    from segmentation.checkpoints import read

    names = {"state_dict", "lowrank", "optimizer_states", "optimizer", "lr_schedulers", "param_schedulers"}
    return {key: value for key, value in read(path).items() if key in names | {"epoch", "global_step"}}


def _unequal(first: Any, second: Any, where: str = "") -> Iterator[str]:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield where
    elif isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            if key in first and key in second:
                yield from _unequal(first[key], second[key], f"{where}/{key}")
            else:
                yield f"{where}/{key} is there in one alone"
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for index, pair in enumerate(zip(first, second, strict=True)):
            yield from _unequal(*pair, f"{where}/{index}")
    elif type(first) is not type(second) or first != second:
        said = " ".join(f"{where} is {first!r} in one and {second!r} in the other".split())
        yield said if len(said) <= _LONGEST else f"{where} differs"


def _record(path: Path) -> dict[str, Any]:
    """A record without times, and without the version of the code, which is that of the last try."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "time_s"}
    return content | {"provenance": {**content["provenance"], "code_version": ""}}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if "seconds" not in key} for row in csv.DictReader(file)]

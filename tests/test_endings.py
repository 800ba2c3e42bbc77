"""Every command ends in the one way: an exit code and, where something was wrong, one line."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys

import pytest

from experiment import ExperimentError

# Each command: its function, its arguments, and what does its work.
COMMANDS = {
    "prepare": ("classification.__main__", ["prepare", "pets"], "classification.prepare", "Preparation.run"),
    "weights": (
        *("classification.__main__", ["weights", "resnet18", "--from", "a", "--to", "b"]),
        *("classification.convert_weights", "convert_file"),
    ),
    "report": ("report.__main__", ["runs"], "report.writing", "report"),
    "segmentation": ("segmentation.cli", ["prepare", "voc12aug"], "segmentation.cli", "prepare"),
}
ENDINGS = {
    "mendable": (ExperimentError("do\nthis"), 2, r"error: do this\n"),
    "disk": (OSError(28, "No space left on device", "x"), 2, r"error: x cannot be written or read \(No space .*\n"),
    "other": (KeyError("a\nb"), 1, r"error: \w+: KeyError: .* \(traceback in .*\.log\)\n"),
    "interrupted": (signal.SIGINT, 130, r"interrupted during \w+; the same command goes on\n"),
    "terminated": (signal.SIGTERM, 143, r"interrupted during \w+; the same command goes on\n"),
    "reader gone": (BrokenPipeError(), 141, ""),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_as_all_do(command, ending, tmp_path, monkeypatch, capsys):
    module, arguments, place, name = COMMANDS[command]
    how, code, said = ENDINGS[ending]

    def work(*_, **__):
        if isinstance(how, signal.Signals):
            signal.raise_signal(how)
        raise how

    owner = importlib.import_module(place)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, last, work)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a command whose reader is gone puts another in its place
    main = importlib.import_module(module).main
    assert main(arguments) == code
    assert re.fullmatch(said, capsys.readouterr().err)


def test_a_letter_that_the_output_does_not_know_is_no_error():
    code = r"from experiment.command import finish; raise SystemExit(finish(lambda work: print('\u0394 \udcfc')))"
    for encoding, said in (("ascii", rb"\u0394 \udcfc"), ("utf-8", "\u0394 \\udcfc".encode())):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=environment)
        assert (done.returncode, done.stdout.strip()) == (0, said)


def test_an_output_that_is_closed_is_no_error(tmp_path):
    """As `>&-` in a shell, or a service without a console."""
    code = "from experiment.command import finish; raise SystemExit(finish(lambda work: print(1)))"
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code], check=False)
    assert done.returncode == 0

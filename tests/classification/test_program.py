"""The program itself, as a process of its own."""

import re
import subprocess
import sys

import pytest
import yaml
from commands import ROOT, config, execute


def program(*words, python=()):
    command = [sys.executable, *python, "-m", "classification", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_program_prints_a_config_that_it_takes_back(tmp_path, capsys):
    given = [*config("setups", "a"), *config("models", "resnet18"), *config("data", "digits")]
    printed = program("fit", *given, "--model.layers", "3", "--print_config")
    assert printed.returncode == 0, printed.stderr
    resolved = yaml.safe_load(printed.stdout)
    assert (resolved["model"]["layers"], resolved["model"]["backbone"], resolved["setup"]) == (3, "resnet18", "A")
    path = tmp_path / "config.yaml"
    path.write_text(printed.stdout)
    once = execute(["fit", *given, "--model.layers", "3", "--runs_dir", str(tmp_path), "--dry_run"], capsys)
    again = execute(["fit", "--config", str(path), "--runs_dir", str(tmp_path), "--dry_run"], capsys)
    assert once == again


@pytest.mark.slow
def test_the_program_ends_with_code_2_and_one_line_on_bad_input():
    failed = program("fit", *config("data", "digits"), "--model.backbone", "lenet")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert re.fullmatch(r"error: there is no backbone 'lenet'; .*\n", failed.stderr)


@pytest.mark.slow
def test_the_program_works_where_warnings_are_errors(tmp_path):
    given = [*config("setups", "b"), *config("models", "resnet18"), *config("data", "digits"), "--model.layers", "2"]
    done = program("fit", *given, "--runs_dir", str(tmp_path), "--dry_run", python=["-W", "error"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("would run: resnet18 on digits")

"""A disk that takes no more: one line, everything saved before is as it was, and the run goes on when there is room."""

import os
import re
import resource

import pytest
from commands import arguments, only_file
from test_faults import assert_same, crash

from classification.cli import main

SETTINGS = ("--model.layers", 2, "--trainer.max_epochs", 4, "--model.momentum", 0.9, "--tensorboard", "false")


@pytest.fixture
def _small_files():
    """No file may grow beyond 512 KiB, as a quota has it; the system itself says so, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two whole epochs that was stopped in the third, and one that was not stopped."""
    stopped, whole = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("whole")
    assert main(arguments("fit", whole, *SETTINGS)) == 0
    crash(arguments("fit", stopped, *SETTINGS), 2)
    return stopped, only_file(whole, "result.json").parent


@pytest.fixture
def full(runs, capsys, request):
    """That run after it was tried with no room; and the bytes of its files before and after, and what it said."""
    folder = only_file(runs[0], "identity.json").parent

    def content():
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}

    before = content()
    request.getfixturevalue("_small_files")
    capsys.readouterr()
    code = main(arguments("fit", runs[0], *SETTINGS))
    return before, content(), code, capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_takes_nothing_away_and_the_run_goes_on_to_the_same_end(full, runs):
    before, after, code, said = full
    assert code == 2
    line = r"error: checkpoint \S*ckpt cannot be written \(File too large\); what was saved before is whole, so the "
    assert re.fullmatch(line + r"same command goes on once it can be\n", said)
    assert {name for name in before if name.endswith("ckpt")} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert {name: after[name] for name in before if name.endswith("ckpt")} == {
        name: before[name] for name in before if name.endswith("ckpt")
    }
    assert not [name for name in after if name.endswith(".part")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    assert main(arguments("fit", runs[0], *SETTINGS)) == 0
    assert_same(only_file(runs[0], "result.json").parent, runs[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_one_line(tmp_path, capsys):
    tmp_path.chmod(0o500)
    try:
        assert main(arguments("fit", tmp_path / "runs", *SETTINGS)) == 2
    finally:
        tmp_path.chmod(0o700)
    assert re.fullmatch(r"error: [^\n]*cannot be written[^\n]*\n", capsys.readouterr().err)

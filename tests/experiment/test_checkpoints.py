"""Checkpoints are whole, of their run, or refused."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiment import ExperimentError
from experiment.checkpoints import (
    BEST,
    IDENTITY,
    LAST,
    PREVIOUS,
    CheckpointError,
    load_checkpoint,
    refuse_earlier,
    resumable,
    save_checkpoint,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("key", ["lowrank_state", "backbone.conv.lowrank_state_0", "mlp.0.lowrank_left"])
def test_what_an_earlier_version_saved_is_refused_in_one_line(key):
    with pytest.raises(
        ExperimentError, match=rf"^checkpoint last\.ckpt is of an earlier .*{key}.*start afresh"
    ) as raised:
        refuse_earlier(["state_dict", key], "last.ckpt")
    assert "\n" not in str(raised.value)
    with pytest.raises(ExperimentError, match=r"^checkpoint is of an earlier"):
        refuse_earlier([key])


def test_others_are_taken():
    refuse_earlier(["state_dict", "lowrank", "lowrank_history", "backbone.conv.weight"], "last.ckpt")


def checkpoint(epoch=0):
    return {"state_dict": {"weight": torch.arange(50.0) + epoch}, "epoch": epoch}


def saved(folder, *epochs, identity="ours", name=LAST):
    for epoch in epochs:
        save_checkpoint(checkpoint(epoch), folder / name, identity)
    return folder / name


def test_two_are_kept_and_each_says_whose_it_is(tmp_path):
    path = saved(tmp_path, 0, 1, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [LAST, PREVIOUS]
    found = [load_checkpoint(tmp_path / name) for name in (LAST, PREVIOUS)]
    assert [(content["epoch"], content[IDENTITY]) for content in found] == [(2, "ours"), (1, "ours")]
    assert torch.equal(found[0]["state_dict"]["weight"], checkpoint(2)["state_dict"]["weight"])
    assert resumable(tmp_path, "ours", 9) == path


def test_a_flipped_bit_anywhere_is_noticed_or_without_effect(tmp_path):
    path = saved(tmp_path, 0)
    whole = path.read_bytes()
    noticed = 0
    for place in random.Random(0).sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            content = load_checkpoint(path)
        except CheckpointError:
            noticed += 1
        else:
            assert torch.equal(content["state_dict"]["weight"], torch.arange(50.0))
            assert (content["epoch"], content[IDENTITY]) == (0, "ours")
    assert noticed > 40


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "nameless"])
@pytest.mark.parametrize("of", ["the last", "all"])
def test_what_is_of_no_use_is_never_resumed_without_a_word(tmp_path, capsys, damage, of):
    saved(tmp_path, 0, 1)
    for name in (LAST,) if of == "the last" else (LAST, PREVIOUS):
        path = tmp_path / name
        content = {"cut": path.read_bytes()[:-300], "empty": b"", "text": b"hello"}.get(damage)
        if content is not None:
            path.write_bytes(content)
        elif damage == "foreign":
            torch.save(checkpoint() | {IDENTITY: "another"}, path)
        else:
            torch.save(checkpoint(), path)
    if of == "all":
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(CheckpointError, match=r"last\.ckpt .*; delete .* to start afresh") as raised:
            resumable(tmp_path, "ours", 9)
        assert "\n" not in str(raised.value)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        return
    assert resumable(tmp_path, "ours", 9) == tmp_path / PREVIOUS
    assert re.fullmatch(r"checkpoint \S+last\.ckpt is .*; going on from previous\.ckpt\n", capsys.readouterr().err)
    saved(tmp_path, 1)  # a damaged one does not become the one before
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in (LAST, PREVIOUS)] == [1, 0]


def test_without_any_there_is_nothing_to_resume(tmp_path):
    assert resumable(tmp_path, "ours") is None


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_a_run_without_its_best_epoch_is_not_resumed(tmp_path, fault):
    saved(tmp_path, 0)
    if fault == "damaged":
        (tmp_path / BEST).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"best\.ckpt.*; delete"):
        resumable(tmp_path, "ours")


def test_the_best_epoch_is_as_good_as_the_last_that_was_not_saved(tmp_path):
    saved(tmp_path, 0, name=BEST)
    assert resumable(tmp_path, "ours") == tmp_path / BEST


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace", "zipfile.ZipFile.testzip"])
def test_a_save_that_fails_is_one_line_and_leaves_everything_as_it_was(tmp_path, monkeypatch, broken):
    path = saved(tmp_path, 0, 1)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, (lambda _: "weight") if "zip" in broken else full)
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be written \(.*goes on") as raised:
        saved(tmp_path, 2)
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert load_checkpoint(path)["epoch"] == 1


def test_the_folder_of_a_run_that_was_moved_away_is_not_made_anew(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    saved(run / "checkpoints", 0)
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="No such file or directory"):
        saved(run / "checkpoints", 1)
    assert not run.exists()
    assert load_checkpoint(tmp_path / "elsewhere" / "checkpoints" / LAST)["epoch"] == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_is_noticed_though_torch_disguises_it(tmp_path, monkeypatch):
    path = saved(tmp_path, 0)
    before = path.read_bytes()
    write = "import resource, sys; from pathlib import Path\n"
    write += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    write += "import torch; from experiment.checkpoints import save_checkpoint\n"
    write += "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
    write += "save_checkpoint({'state_dict': {'weight': torch.ones(10_000)}}, Path(sys.argv[1]), 'ours')\n"
    ended = subprocess.run([sys.executable, "-c", write, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr.splitlines()[-1].startswith("experiment.checkpoints.CheckpointError: checkpoint ")
    assert "File too large" in ended.stderr
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])

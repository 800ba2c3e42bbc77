"""Small runs that are killed at random moments end as the run that no one stopped; differences would be found."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.kills import differences
from benchmarks.reliability import KillError, another_disk, torment
from experiment import Record, Run

MEMORY = Path("/dev/shm")
KILLS = int(os.environ.get("LOWRANK_KILLS", "2"))  # of each task


def on_one_disk():
    return not MEMORY.is_dir() or MEMORY.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev


@pytest.mark.slow
@pytest.mark.skipif(on_one_disk(), reason="needs a second disk: /dev/shm, and temporary files elsewhere")
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_run_that_is_killed_at_random_moments_loses_nothing(task):
    outcome = torment(task, KILLS, MEMORY, seed=3)
    assert outcome.problems == []
    assert outcome.killed.total() == KILLS
    assert outcome.runs > 0
    assert outcome.left < 2**20  # killed processes leave no half checkpoint among the temporary files


def test_the_disk_has_to_be_another_one(tmp_path):
    with pytest.raises(KillError, match="is no folder of another disk"):
        another_disk(tmp_path)
    with pytest.raises(KillError, match="is no folder"):
        another_disk(tmp_path / "nowhere")


@pytest.fixture
def folders(tmp_path):
    """Two folders of one finished run."""
    folder = tmp_path / "one"
    (folder / "checkpoints").mkdir(parents=True)
    state = {"state_dict": {"weight": torch.arange(4.0)}, "optimizer_states": [{"momentum": torch.ones(2)}]}
    torch.save(state, folder / "checkpoints" / "last.ckpt")
    run = Run("classification", "A", "mcunet", "pets", "asi", 2, 1)
    Record(run, {"test": 0.5}, {"saved_measured": 7}, {}, {"total": 1.0}).save(folder)
    (folder / "metrics.csv").write_text("epoch,val_loss,seconds\n0,0.5,1.0\n")
    return folder, Path(shutil.copytree(folder, tmp_path / "other"))


def test_times_are_no_difference(folders):
    one, other = folders
    assert differences(one, other) == []
    (other / "metrics.csv").write_text("epoch,val_loss,seconds\n0,0.5,2.0\n")
    text = (other / "result.json").read_text()
    (other / "result.json").write_text(text.replace('"total": 1.0', '"total": 3.0'))
    assert differences(one, other) == []


@pytest.mark.parametrize("what", ["weight", "momentum", "record", "metrics", "file", "unusable"])
def test_anything_else_is_one(folders, what):
    one, other = folders
    path = other / "checkpoints" / "last.ckpt"
    if what in ("weight", "momentum"):
        content = torch.load(path, weights_only=True)
        changed = content["state_dict"]["weight"] if what == "weight" else content["optimizer_states"][0]["momentum"]
        changed[1] = torch.nextafter(changed[1], torch.tensor(9.0))
        torch.save(content, path)
        wanted = "state_dict/weight" if what == "weight" else "optimizer_states/0/momentum"
    elif what == "record":
        text = (other / "result.json").read_text()
        (other / "result.json").write_text(text.replace('"saved_measured": 7', '"saved_measured": 8'))
        wanted = "result.json: /memory_bytes/saved_measured is 7 in one and 8 in the other"
    elif what == "metrics":
        (other / "metrics.csv").write_text("epoch,val_loss,seconds\n0,0.50001,1.0\n")
        wanted = "metrics.csv: /0/val_loss is '0.5' in one and '0.50001' in the other"
    else:
        wanted = "last.ckpt.unusable" if what == "unusable" else ".last.ckpt.x.part"
        (other / "checkpoints" / wanted).touch()
    (found,) = differences(one, other)
    assert wanted in found

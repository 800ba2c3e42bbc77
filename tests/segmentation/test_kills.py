"""A run that is killed where files replace each other has the same files, with the same content, in the end."""

import os
import signal
from pathlib import Path

import pytest
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from segmentors import TINY, files

from benchmarks.kills import differences
from segmentation.cli import main

# Killed after the row of a validation, and before or after the old best weights are gone.
PLACES = {
    "the best weights are saved": (CheckpointHook, "_save_best_checkpoint"),
    "the old ones are removed": (LocalBackend, "remove"),
    "an old checkpoint is deleted": (Path, "unlink"),
}


def killed_before(place, words):
    """How a process ends that does a command and is killed there: a copy of this one, which has imported everything."""
    child = os.fork()
    if not child:
        signal.alarm(200)  # whatever else it does, it ends
        setattr(*PLACES[place], lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
        try:
            main(words)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def arguments(data, runs):
    composed = map(str, files("pspnet_small", "digit_scenes", "finetune", "vanilla"))
    where = ["--layers", "10", "--data-dir", str(data), "--runs-dir", str(runs), "--iterations", "8", "--resume"]
    return ["train", *composed, *where, *TINY, "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=1"]


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    assert main(arguments(data_dir, runs)) == 0
    assert not list(runs.rglob("best_*_iter_2.pth"))  # a later one was better, so that there is one to remove
    return next(runs.rglob("result.json")).parent


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_the_best_weights_outlive_a_kill_before(place, whole, data_dir, tmp_path):
    assert killed_before(place, arguments(data_dir, tmp_path)) == -signal.SIGKILL
    assert main(arguments(data_dir, tmp_path)) == 0
    assert differences(next(tmp_path.rglob("result.json")).parent, whole) == []

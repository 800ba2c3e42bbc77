"""A run that is killed where files replace each other has the same files, with the same content, in the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from segmentors import TINY, files

from benchmarks.kills import differences
from segmentation.cli import main

ROOT = Path(__file__).parents[2]
# Killed after the row of a validation, and before or after the old best weights are gone.
KILL = """
import os, signal, sys
from pathlib import Path
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from segmentation.cli import main
owner, name = {"the best weights are saved": (CheckpointHook, "_save_best_checkpoint"),
               "the old ones are removed": (LocalBackend, "remove"),
               "an old checkpoint is deleted": (Path, "unlink")}[sys.argv[1]]
setattr(owner, name, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
main(sys.argv[2:])
"""


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
@pytest.mark.parametrize(
    "before", ["the best weights are saved", "the old ones are removed", "an old checkpoint is deleted"]
)
def test_the_best_weights_outlive_a_kill_before(before, whole, data_dir, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", KILL, before, *arguments(data_dir, tmp_path)]
    killed = subprocess.run(words, env=environment, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert main(arguments(data_dir, tmp_path)) == 0
    assert differences(next(tmp_path.rglob("result.json")).parent, whole) == []

"""The commands of docs/processes.md run as they stand there, on small data, and what the page says of them holds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment import Record
from segmentation.data.scenes import SETS, Scenes, write_scenes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "processes.md").read_text()
COMMANDS = dict(re.findall(r"<!-- command: (\w+) -->\n```bash\n(.+?)```", PAGE, re.DOTALL))
SMALL = {
    "classification": (
        *("--data.image_size", "32", "--data.batch_size", "8", "--model.layers", "2", "--trainer.max_epochs", "1"),
        *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2"),
        *("--trainer.limit_test_batches", "2"),
    ),
    "segmentation": (
        *("--iterations", "2", "--cfg-options", "train_dataloader.batch_size=2"),
        *("model.backbone.stem_channels=8", "model.backbone.base_channels=8", "model.decode_head.in_channels=64"),
    ),
}
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def test_every_command_of_the_page_is_run() -> None:
    assert PAGE.count("```bash") == len(COMMANDS)
    assert set(COMMANDS) == {"classification", "segmentation", "launcher"}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_trains_in_two_processes_and_leaves_one_record(name: str, tmp_path: Path) -> None:
    program, *words = shlex.split(COMMANDS[name].replace("\\\n", " "))
    assert program == "python"
    if name == "classification":
        where = ["--runs_dir", str(tmp_path / "runs")]
    else:
        where = ["--runs-dir", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data")]
        for kind, scenes in SETS.items():
            write_scenes(tmp_path / "data" / kind, Scenes(scenes.digits, train=8, val=2, size=64))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    small = SMALL["classification" if name == "classification" else "segmentation"]
    command = [sys.executable, *words, *where, *small]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 600, "check": False}
    with tempfile.TemporaryDirectory() as temporary:  # the launcher leaves a folder there
        done = subprocess.run(command, cwd=ROOT, env=environment | {"TMPDIR": temporary}, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training: ") == done.stdout.count("record in ") == 1
    (result,) = (tmp_path / "runs").rglob("result.json")
    record = Record.load(result)
    assert record.recipe["processes"] == 2
    assert record.recipe["joined_batch_size"] == 2 * record.recipe["batch_size"]

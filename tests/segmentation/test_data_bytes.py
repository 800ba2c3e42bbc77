"""A segmentation run knows its images and label maps by their bytes."""

import os
import shutil

import pytest
from segmentors import files

from experiment import Run
from experiment.record import RESULT
from segmentation.compose import choose_depth, load_config, move_data
from segmentation.data.registry import data_of
from segmentation.training import Task


@pytest.fixture
def task(data_dir, tmp_path):
    """A run on a copy of the data."""
    shutil.copytree(data_dir, tmp_path / "data")
    config = load_config(files("pspnet_small", "digit_scenes", "finetune", "vanilla"))
    choose_depth(config, 10)
    move_data(config, tmp_path / "data")
    config.randomness = {"seed": 1}
    return Task(config, tmp_path / "runs"), tmp_path / "data" / "digit_scenes"


RUN = Run("segmentation", "finetune", "pspnet_small", "digit_scenes", "vanilla", 10, 1)


@pytest.mark.parametrize("kind", ["JPEGImages", "SegmentationClass"])
def test_one_changed_byte_is_noticed_though_size_and_time_are_as_before(task, kind):
    task, root = task
    before = task.begin(RUN, RESULT, None).data_fingerprint
    assert before == data_of(task.config).fingerprint
    path = sorted((root / kind).iterdir())[0]
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert task.begin(RUN, RESULT, None).data_fingerprint not in (None, before)


def test_data_that_is_elsewhere_is_the_same_and_none_has_no_fingerprint(task):
    task, root = task
    before = task.begin(RUN, RESULT, None).data_fingerprint
    shutil.move(root, root.with_name("moved"))
    assert data_of(task.config).fingerprint is None
    shutil.copytree(root.with_name("moved"), root)
    assert task.begin(RUN, RESULT, None).data_fingerprint == before

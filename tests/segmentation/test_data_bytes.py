"""A segmentation run knows its images and label maps by their bytes."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmseg.registry import DATASETS
from mmseg.utils import register_all_modules
from PIL import Image
from segmentors import files

from experiment import ExperimentError, Run
from experiment.record import RESULT
from segmentation.compose import choose_depth, load_config, move_data, with_naming_readers
from segmentation.data.registry import data_of
from segmentation.history import History
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


@pytest.fixture
def images(task):
    """The images to train on and those to validate on."""
    folder = task[1] / "JPEGImages"
    return sorted(folder.glob("train_*")), sorted(folder.glob("val_*"))


def test_images_that_are_trained_and_validated_on_are_counted_told_and_noted(task, images, capsys):
    task, (train, val) = task[0], images
    assert task.begin(RUN, RESULT, None).repeated == 0
    assert capsys.readouterr().err == ""
    shutil.copy(train[3], val[1])
    assert task.begin(RUN, RESULT, None).repeated == 1
    assert capsys.readouterr().err == (
        "warning: 1 of 4 test images of digit_scenes are among those to train or validate on as well, such as test "
        "image 1; the test accuracy tells less\n"
    )


def test_a_cut_image_is_named_before_training_and_a_damaged_one_when_it_is_read(task, images):
    task, (train, _) = task[0], images
    config = with_naming_readers(task.config)
    register_all_modules(init_default_scope=True)
    dataset = DATASETS.build(config.train_dataloader.dataset)
    assert dataset[0]["inputs"].shape[0] == 3
    whole = train[0].read_bytes()
    train[0].write_bytes(whole[:-200])
    with pytest.raises(ExperimentError, match=rf"^image {train[0]} cannot be read \(it was cut: its end is missing\)"):
        task.begin(RUN, RESULT, None)
    train[0].write_bytes(whole[:40] + whole[-40:])
    with pytest.raises(ExperimentError, match=rf"^image {train[0]} cannot be read \("):
        dataset[0]
    labels = train[0].parents[1] / "SegmentationClass" / train[0].name
    train[0].write_bytes(whole)
    labels.unlink()
    with pytest.raises(ExperimentError, match=rf"^image {labels} cannot be read \(.*No such file"):
        dataset[0]


LABELS = {
    "16 bits": (np.full((32, 32), 257, np.uint16), "of the kind I;16; a label map"),
    "colours": (np.zeros((32, 32, 3), np.uint8), "of the kind RGB; a label map"),
    "another size": (np.zeros((16, 32), np.uint8), r"\(16, 32\) rows and columns, and its image \(32, 32\)"),
    "another class": (np.full((32, 32), 6, np.uint8), "the label 6; of 6 classes they end at 5"),
}


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("name", LABELS)
def test_a_label_map_that_is_none_of_its_image_is_named(task, part, name):
    task, root = task
    labels, message = LABELS[name]
    register_all_modules(init_default_scope=True)
    path = sorted((root / "SegmentationClass").glob(f"{part}_*"))[0]
    dataset = DATASETS.build(with_naming_readers(task.config)[f"{part}_dataloader"].dataset)
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(path)  # of no class at all
    assert set(dataset[0]["data_samples"].gt_sem_seg.data.flatten().tolist()) == {255}
    Image.fromarray(labels).save(path)
    with pytest.raises(ExperimentError, match=f"{path.name} cannot be read .*{message}"):
        dataset[0]


def test_a_validation_without_a_labelled_pixel_ends_the_run(tmp_path):
    history, runner = History(tmp_path), SimpleNamespace(model=torch.nn.Linear(1, 1), iter=1)
    history.history.step_end(runner.model, 0.5)
    with pytest.raises(ExperimentError, match="mIoU of the validation images is nan: no pixel"):
        history.after_val_epoch(runner, {"mIoU": float("nan"), "mAcc": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_other_classes_than_the_data_is_refused(task):
    task[0].config.model.decode_head.num_classes = 7
    with pytest.raises(ExperimentError, match=r"num_classes is 7, and the data set .* has 6 classes"):
        task[0].begin(RUN, RESULT, None)


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

"""A segmentation run knows its images and label maps by their bytes."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS
from mmseg.utils import register_all_modules
from own_configs import dataset, write_data
from PIL import Image
from segmentors import files

from experiment import ExperimentError, Run
from experiment.record import RESULT
from segmentation.compose import choose_depth, load_config, move_data, with_naming_readers
from segmentation.data.registry import data_of, require_data
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


@pytest.mark.slow
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
    with pytest.raises(ExperimentError, match=rf"^image {labels} cannot be read \(.*No such file.*prepare it again"):
        dataset[0]
    task.config.dataset = "my own"
    dataset = DATASETS.build(with_naming_readers(task.config).train_dataloader.dataset)
    with pytest.raises(ExperimentError, match=r"No such file.*; replace it by one that can, or remove it$"):
        dataset[0]


LABELS = {
    "16 bits": (np.full((32, 32), 257, np.uint16), "of the kind I;16; a label map"),
    "colours": (np.zeros((32, 32, 3), np.uint8), "of the kind RGB; a label map"),
    "another size": (np.zeros((16, 32), np.uint8), r"\(16, 32\) rows and columns, and its image \(32, 32\)"),
    "another class": (np.full((32, 32), 6, np.uint8), "the label 6; of 6 classes they end at 5"),
}


@pytest.mark.slow
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
    path = sorted((root / kind).iterdir())[1]  # the first one is read
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


# A config of one's own, whose files are found in other ways.


def _own_config(train, val):
    return Config({"train_dataloader": {"dataset": train}, "val_dataloader": {"dataset": val}})


OWN = {
    "label maps with a suffix": (("a", "b"), "_mask.png", {}),
    "names with a space": (("image 1", "image 2"), ".png", {}),
    "names with a dot": (("a.1", "b.2"), ".png", {}),
    "no lists": (("a", "b"), "_mask.png", {"listed": False}),
    "full paths": (("a", "b"), "_mask.png", {"rooted": False}),
    "full paths without lists": (("image 1", "b"), ".png", {"rooted": False, "listed": False}),
}


@pytest.mark.parametrize("name", OWN)
def test_a_changed_byte_of_any_file_that_is_loaded_is_noticed(name, tmp_path):
    names, suffix, how = OWN[name]
    root = write_data(tmp_path / "own", names, suffix)
    config = _own_config(*(dataset(root, part, suffix, **how) for part in ("train", "val")))
    before = data_of(config)
    assert (len(before.trained), len(before.tested)) == (2, 2)
    (root / "unrelated.png").write_bytes(b"")
    assert data_of(config).fingerprint == before.fingerprint
    files = sorted(root.glob("*/*/*.png"))
    assert len(files) == 8
    found = {before.fingerprint}
    for path in files:
        with path.open("ab") as file:
            file.write(b"x")
        found.add(data_of(config).fingerprint)
    assert len(found) == 9


def test_a_label_map_that_is_gone_or_an_image_that_is_cut_is_told_before_training(tmp_path):
    root = write_data(tmp_path / "own", ("image 1", "image 2"), "_mask.png")
    config = _own_config(*(dataset(root, part, "_mask.png") for part in ("train", "val")))
    labels, image = root / "ann/val/val image 2_mask.png", root / "img/train/train image 1.png"
    content = labels.read_bytes()
    labels.unlink()
    with pytest.raises(ExperimentError, match=f"cannot be read .{labels}: No such file"):
        data_of(config)
    labels.write_bytes(content)
    shutil.copy(image, root / "img/val/val image 1.png")
    assert set(data_of(config).trained) & set(data_of(config).tested)
    image.write_bytes(image.read_bytes()[:-20])
    with pytest.raises(ExperimentError, match=rf"^image {image} cannot be read \(it was cut"):
        data_of(config)


@pytest.mark.parametrize("content", [b"", b"no image"])
@pytest.mark.parametrize("name", ["img/train/train_a.png", "ann/val/val_b.png"])
def test_a_file_that_is_no_image_is_told_before_training(name, content, tmp_path):
    root = write_data(tmp_path / "own", ("a", "b"), ".png")
    (root / name).write_bytes(content)
    with pytest.raises(ExperimentError, match=rf"^image {root / name} cannot be read \(it is no image"):
        data_of(_own_config(*(dataset(root, part) for part in ("train", "val"))))


@pytest.mark.parametrize("rooted", [True, False])
def test_what_names_leave_out_is_told_once_and_what_a_list_leaves_out_is_not(rooted, tmp_path, capsys):
    root = write_data(tmp_path / "own", ("a", "b"), "_mask.png")
    (root / "ann/val/.DS_Store.png").touch()
    whole = [
        _own_config(*(dataset(root, part, "_mask.png", listed, rooted) for part in ("train", "val")))
        for listed in (False, True)
    ]
    assert len(data_of(whole[0]).trained) == 2
    assert capsys.readouterr().err == ""
    (root / "img/train/train_b.png").rename(root / "img/train/train_b.PNG")
    for _ in range(2):
        assert len(data_of(whole[0]).trained) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: not read: 2 images or label maps, such as {root}/ann/train/train_b_mask.png; ")
    (root / "img/train/train_b.PNG").rename(root / "img/train/train_b.png")
    (root / "train.txt").write_text("train_a\n")
    assert len(data_of(whole[1]).trained) == 1
    for part in ("train", "val"):
        whole[0][f"{part}_dataloader"].dataset.indices = 1
    assert len(data_of(whole[0]).trained) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rooted", [True, False])
def test_a_part_elsewhere_belongs_to_the_data_wherever_it_is(rooted, tmp_path):
    first, second = (write_data(tmp_path / name, ("a", "b"), ".png") for name in ("first", "second"))

    def found(train, val):
        return data_of(_own_config(dataset(train, "train", ".png"), dataset(val, "val", ".png", rooted=rooted)))

    before = found(first, second)
    assert (len(before.trained), len(before.tested)) == (2, 2)
    shutil.copytree(second, tmp_path / "copy")
    assert found(first, tmp_path / "copy") == before
    (tmp_path / "copy/ann/val/val_a.png").write_bytes((second / "ann/val/val_b.png").read_bytes())
    assert found(first, tmp_path / "copy").fingerprint != before.fingerprint
    shutil.rmtree(second)
    config = _own_config(dataset(first, "train", ".png"), dataset(second, "val", ".png", rooted=rooted))
    assert data_of(config).fingerprint is None
    with pytest.raises(ExperimentError, match=f"there is no data set in {second}"):
        require_data(config)


def test_a_data_set_that_cannot_be_listed_is_one_line(tmp_path):
    root = write_data(tmp_path / "own", ("a", "b"), ".png")
    whole = {part: dataset(root, part, ".png") for part in ("train", "val")}
    for change in (
        {"ann_file": "none.txt"},
        {"img_suffix": ".jpg", "ann_file": ""},
        {"data_prefix": {"img_path": "x"}},
    ):
        with pytest.raises(ExperimentError, match=r"^the data set in .* cannot be read") as told:
            data_of(_own_config(whole["train"] | change, whole["val"]))
        assert "\n" not in str(told.value)

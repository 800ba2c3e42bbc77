"""Digit scenes; VOC2012 with SBD and Cityscapes prepared from miniature archives in the real layout."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mmseg.registry import DATASETS
from PIL import Image
from scipy.io import savemat
from segmentors import files

from experiment import ExperimentError
from experiment.files import part_of
from segmentation.compose import load_config, move_data
from segmentation.data import scenes
from segmentation.data.cityscapes import prepare_cityscapes
from segmentation.data.folders import ThereError, unpack, whole_folder
from segmentation.data.registry import data_of, require_data
from segmentation.data.scenes import SETS, Scenes, write_scenes
from segmentation.data.voc import prepare_voc12aug

TRAIN, VAL, EXTRA = ["2007_000032"], ["2007_000033"], ["2007_000032", "2007_000033", "2008_000002", "2008_000003"]
COUNTS = {"train": 1, "val": 1, "SBD": 4, "train with SBD": 3}


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="png")
    return file.getvalue()


def jpeg(size=(40, 30)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(file, format="jpeg")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


def sbd_annotation(classes) -> bytes:
    file = io.BytesIO()
    savemat(file, {"GTcls": {"Segmentation": classes, "Boundaries": np.zeros(3), "CategoriesPresent": [1]}})
    return file.getvalue()


@pytest.fixture
def voc_archives(tmp_path):
    """The two archives of VOC12Aug with five images."""
    voc, lists = "VOCdevkit/VOC2012", "VOCdevkit/VOC2012/ImageSets/Segmentation"
    classes = np.full((40, 30), 20, np.uint8)
    members = {f"{voc}/JPEGImages/{name}.jpg": jpeg() for name in EXTRA}
    members |= {f"{voc}/SegmentationClass/{name}.png": png(classes) for name in (*TRAIN, *VAL)}
    members |= {f"{lists}/train.txt": "\n".join(TRAIN).encode(), f"{lists}/val.txt": "\n".join(VAL).encode()}
    write_tar(tmp_path / "VOCtrainval_11-May-2012.tar", members)
    sbd = "benchmark_RELEASE/dataset"
    labels = {name: np.full((40, 30), index, np.uint8) for index, name in enumerate(EXTRA)}
    members = {f"{sbd}/cls/{name}.mat": sbd_annotation(classes) for name, classes in labels.items()}
    members |= {f"{sbd}/train.txt": "\n".join(EXTRA[:3]).encode(), f"{sbd}/val.txt": EXTRA[3].encode()}
    write_tar(tmp_path / "benchmark.tgz", members, "w:gz")
    return tmp_path


@pytest.mark.slow
def test_voc12aug_is_written_and_mmsegmentation_reads_it(voc_archives, tmp_path):
    target = tmp_path / "data" / "voc12aug"
    prepare_voc12aug(target, voc_archives, COUNTS)
    names = {
        split: (target / "ImageSets/Segmentation" / f"{split}.txt").read_text().split() for split in ("aug", "trainaug")
    }
    assert names == {"aug": [EXTRA[0], *EXTRA[2:]], "trainaug": [EXTRA[0], *EXTRA[2:]]}  # nothing that validates
    assert np.unique(np.asarray(Image.open(target / "SegmentationClassAug" / f"{EXTRA[2]}.png"))).tolist() == [2]
    assert sorted(path.name for path in target.iterdir()) == [
        *("ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug"),
    ]
    config = load_config(files("pspnet", "voc12aug", "finetune", "vanilla"))
    move_data(config, tmp_path / "data")
    train, val = DATASETS.build(config.train_dataloader.dataset), DATASETS.build(config.val_dataloader.dataset)
    assert (len(train), len(val)) == (4, 1)
    channels, *sides = train[3]["inputs"].shape
    assert channels == 3
    assert max(sides) <= 512, "padded later, where the image drawn is smaller than the crop"
    assert set(np.unique(train[3]["data_samples"].gt_sem_seg.data)) <= {3, 255}
    assert set(np.unique(val[0]["data_samples"].gt_sem_seg.data)) == {20}
    require_data(config)
    assert len(data_of(config).fingerprint) == 16


def test_archives_that_are_not_whole_are_refused_and_nothing_stays(voc_archives, tmp_path):
    target = tmp_path / "data" / "voc12aug"
    with pytest.raises(ExperimentError, match="4 names in the list SBD found, 11355 expected"):
        prepare_voc12aug(target, voc_archives, {**COUNTS, "SBD": 11355})
    archive = voc_archives / "benchmark.tgz"
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(ExperimentError, match=r"benchmark.tgz is damaged"):
        prepare_voc12aug(target, voc_archives, COUNTS)
    archive.unlink()
    with pytest.raises(ExperimentError, match=r"there is no archive .*benchmark.tgz"):
        prepare_voc12aug(target, voc_archives, COUNTS)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".voc12aug.lock"]


def test_what_a_killed_command_left_is_removed_and_not_what_another_one_makes(tmp_path):
    left, other = part_of(tmp_path / "set"), part_of(tmp_path / "set2")
    for folder in (left, other):
        (folder / "images").mkdir(parents=True)
    with whole_folder(tmp_path / "set"):
        assert not left.exists()
    assert (tmp_path / "set").is_dir()
    assert other.is_dir()


def test_a_set_that_two_processes_need_at_once_is_made_by_one_and_awaited_by_the_other(tmp_path, monkeypatch, capsys):
    begun, awaited = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(120)  # whatever else it does, it ends
        with whole_folder(tmp_path / "data" / "digit_scenes") as folder:
            (folder / "of the first").touch()
            os.write(begun[1], b".")
            os.read(awaited[0], 1)
        os._exit(0)
    os.read(begun[0], 1)

    def told(*words, **options):
        print(*words, **options)
        if "waiting for it" in words[0]:
            os.write(awaited[1], b".")

    monkeypatch.setattr("segmentation.data.folders.print", told, raising=False)
    config = load_config(files("pspnet", "digit_scenes", "finetune", "vanilla"))
    move_data(config, tmp_path / "data")
    require_data(config)
    assert os.waitpid(child, 0)[1] == 0
    assert "another process is writing" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"digit_scenes", ".digit_scenes.lock"}
    assert [path.name for path in (tmp_path / "data" / "digit_scenes").iterdir()] == ["of the first"]


def test_without_locks_the_first_of_two_that_are_made_at_once_stays(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)

    def make_while_another_makes_it():
        with whole_folder(tmp_path / "set"), whole_folder(tmp_path / "set") as first:
            (first / "of the first").touch()

    with pytest.raises(ThereError, match="is there already"):
        make_while_another_makes_it()
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["of the first"]
    assert {path.name for path in tmp_path.iterdir()} == {"set", ".set.lock"}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_would_write_elsewhere_is_refused(kind, tmp_path):
    archive = tmp_path / f"bad.{kind}"
    if kind == "tar":
        write_tar(archive, {"../outside.txt": b"x"})
    else:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("../outside.txt", "x")
    with pytest.raises(ExperimentError, match=r"is refused: .*outside"):
        unpack(archive, tmp_path / "inner" / "folder")
    assert not list(tmp_path.rglob("outside.txt"))


@pytest.fixture
def cityscapes_archives(tmp_path):
    """The two archives of Cityscapes with one image a split."""
    image = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    ids = np.repeat(np.array([0, 7, 33, 24], np.uint8), 64 * 32).reshape(64, 128)
    with zipfile.ZipFile(tmp_path / "leftImg8bit_trainvaltest.zip", "w") as file:
        for split in ("train", "val"):
            file.writestr(f"leftImg8bit/{split}/ulm/ulm_000000_000019_leftImg8bit.png", png(image))
    with zipfile.ZipFile(tmp_path / "gtFine_trainvaltest.zip", "w") as file:
        for split in ("train", "val"):
            file.writestr(f"gtFine/{split}/ulm/ulm_000000_000019_gtFine_labelIds.png", png(ids))
    return tmp_path


@pytest.mark.slow
def test_cityscapes_is_written_and_mmsegmentation_reads_it(cityscapes_archives, tmp_path):
    target = tmp_path / "data" / "cityscapes"
    prepare_cityscapes(target, cityscapes_archives, {"train": 1, "val": 1})
    config = load_config(files("pspnet", "cityscapes", "finetune", "vanilla"))
    move_data(config, tmp_path / "data")
    train, val = DATASETS.build(config.train_dataloader.dataset), DATASETS.build(config.val_dataloader.dataset)
    assert train[0]["inputs"].shape[0] == 3
    assert np.unique(val[0]["data_samples"].gt_sem_seg.data).tolist() == [0, 11, 18, 255]
    assert len(data_of(config).fingerprint) == 16
    with pytest.raises(ExperimentError, match="1 images of the split val found, 500 expected"):
        prepare_cityscapes(tmp_path / "other", cityscapes_archives, {"train": 1, "val": 500})


def test_scenes_are_the_same_every_time_and_of_the_classes_they_say(tmp_path):
    small = Scenes((5, 6, 7), train=4, val=2, size=48)
    for name in ("a", "b"):
        write_scenes(tmp_path / name, small)
    images = sorted((tmp_path / "a").rglob("*.*"))
    assert [path.read_bytes() for path in images] == [
        path.read_bytes() for path in sorted((tmp_path / "b").rglob("*.*"))
    ]
    classes = [np.asarray(Image.open(path)) for path in images if path.parent.name == "SegmentationClass"]
    assert {int(value) for array in classes for value in np.unique(array)} <= {0, 1, 2, 3, 255}
    assert all(0.02 < (array > 0).mean() < 0.7 for array in classes)
    with pytest.raises(ExperimentError, match="is there already; delete it"):
        write_scenes(tmp_path / "a", small)


@pytest.mark.parametrize("name", ["digit_scenes", "digit_scenes_96"])
def test_no_scan_is_in_two_splits_or_two_sets(tmp_path, monkeypatch, name):
    pools, sets = {}, (name, f"{name}_pretrain")

    def note(random, found, size):
        pools.setdefault(current, [array.tobytes() for pool in found for array in pool])
        return np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8)

    monkeypatch.setattr(scenes, "compose", note)
    for name in sets:
        for split in ("train", "val"):
            current = (name, split)
            write_scenes(tmp_path / name / split, Scenes(SETS[name].digits, **{"train": 0, "val": 0, split: 1}, size=8))
    everything = [scan for pool in pools.values() for scan in set(pool)]
    assert len(pools) == 4
    assert len(everything) == len(set(everything)) == 1797

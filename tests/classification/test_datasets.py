"""The data sets of the papers, on miniatures in their real formats: beside torchvision's own readers, and damaged."""

import json
import os
import shutil

import numpy as np
import pytest
import torchvision
from miniatures import CLASSES, TEST, TRAIN, WRITERS, write, write_image_folder, write_prepared
from PIL import Image
from torchvision import datasets

from classification.data import ImageDataModule, ImageSet, load_splits, names
from classification.data.files import hold_out
from classification.data.registry import MissingDataError
from experiment import ExperimentError

PARTS = ("train", "val", "test")
OF_FILES = [name for name in WRITERS if not name.startswith("cifar")]


def pixels(image):
    """An image as an array, whatever it is."""
    return np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)


def torchvision_reader(name, root, monkeypatch):
    """torchvision's training and test sets (for Flowers-102 also that to validate on), each as (images, labels)."""
    for module in ("cifar", "flowers102"):  # a miniature has other checksums
        monkeypatch.setattr(getattr(torchvision.datasets, module), "check_integrity", lambda *_: True)
    root = str(root)
    readers = {
        "cifar10": lambda: [datasets.CIFAR10(root, train=train) for train in (True, False)],
        "cifar100": lambda: [datasets.CIFAR100(root, train=train) for train in (True, False)],
        "pets": lambda: [datasets.OxfordIIITPet(root, split) for split in ("trainval", "test")],
        "flowers102": lambda: [datasets.Flowers102(root, split) for split in ("train", "val", "test")],
        "food101": lambda: [datasets.Food101(root, split) for split in ("train", "test")],
        "imagenet": lambda: [datasets.ImageFolder(f"{root}/imagenet/{part}") for part in ("train", "val")],
    }
    return readers[name]()


def pairs(part):
    """Every image and label of a part."""
    return [(pixels(image), int(label)) for image, label in zip(part.images, part.labels, strict=True)]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for (image, label), (their_image, their_label) in zip(ours, theirs, strict=True):
        assert label == their_label
        assert np.array_equal(image, pixels(their_image))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "cub200"])
def test_a_data_set_is_as_torchvision_reads_it(tmp_path, monkeypatch, name):
    write_prepared(name, tmp_path)
    splits = load_splits(name, tmp_path)
    train, *_, test = reference = torchvision_reader(name, tmp_path, monkeypatch)
    same(pairs(splits.test), list(test))
    if name == "flowers102":
        same(pairs(splits.train), list(train))
        same(pairs(splits.val), list(reference[1]))
        assert splits.train.positions is None
    else:
        positions = [*splits.train.positions, *splits.val.positions]
        assert sorted(positions) == list(range(len(train)))
        same(pairs(splits.train) + pairs(splits.val), [train[index] for index in positions])
    if name not in ("imagenet", "pets"):
        assert splits.classes == tuple(train.classes[:CLASSES])


def test_cub_is_divided_by_its_own_list(tmp_path):
    write_prepared("cub200", tmp_path)
    splits = load_splits("cub200", tmp_path)
    assert splits.classes == tuple(f"{label + 1:03d}.Bird_{label}" for label in range(CLASSES))
    for part in PARTS:
        for path, label in zip(getattr(splits, part).images, getattr(splits, part).labels, strict=True):
            assert abs(np.median(pixels(path)) - 50 * label - 20) < 20  # a miniature's brightness tells its class
    train = sorted(path for part in (splits.train, splits.val) for path in files(part))
    assert {int(path[-8:-4]) for path in train} == set(range(1, TRAIN * CLASSES + 1))
    assert {int(path[-8:-4]) for path in files(splits.test)} == set(
        range(TRAIN * CLASSES + 1, (TRAIN + TEST) * CLASSES + 1)
    )


def files(part):
    """Paths of a part's images."""
    images = part.images
    return [images.images.paths[index] for index in images.indices] if hasattr(images, "indices") else images.paths


@pytest.mark.parametrize("name", WRITERS)
def test_the_parts_are_disjoint_whole_and_always_the_same(tmp_path, name):
    write_prepared(name, tmp_path)
    splits = load_splits(name, tmp_path)
    sizes = [len(getattr(splits, part).labels) for part in PARTS]
    val = TRAIN * CLASSES // (2 if name == "flowers102" else 5)
    assert sizes == [TRAIN * CLASSES - val, val, TEST * CLASSES]
    contents = [[image.tobytes() for image, _ in pairs(getattr(splits, part))] for part in PARTS]
    assert len({content for part in contents for content in part}) == sum(sizes)
    np.random.seed(1)  # noqa: NPY002 - the global one is meant
    again = load_splits(name, tmp_path)
    assert [[image.tobytes() for image, _ in pairs(getattr(again, part))] for part in PARTS] == contents
    assert all(getattr(splits, part).labels.dtype == np.int64 for part in PARTS)


@pytest.mark.parametrize(
    ("official", "train", "val"),
    [(3_680, 2_944, 736), (5_994, 4_795, 1_199), (50_000, 40_000, 10_000), (75_750, 60_600, 15_150)],
)
def test_validation_has_the_published_size(official, train, val):
    labels = np.arange(official) % 10
    parts = hold_out(ImageSet(np.arange(official), labels))
    assert [len(part.labels) for part in parts] == [train, val]
    assert sorted(np.concatenate([part.images for part in parts])) == list(range(official))


@pytest.mark.parametrize("name", OF_FILES)
def test_images_are_read_when_asked_for_and_a_damaged_one_is_named(tmp_path, name):
    folder = write_prepared(name, tmp_path)
    path = sorted(folder.rglob("*.[jJ]*[gG]"))[0]
    splits = load_splits(name, tmp_path)
    path.write_bytes(b"x" * path.stat().st_size)  # of the same size, after the data set was looked at
    (part,) = [part for part in PARTS if str(path) in files(getattr(splits, part))]
    images = getattr(splits, part).images
    with pytest.raises(ExperimentError, match=rf"image .*{path.name} cannot be read .*prepare it again"):
        images[files(getattr(splits, part)).index(str(path))]


@pytest.mark.parametrize("name", OF_FILES)
def test_one_changed_byte_of_an_image_is_noticed(tmp_path, name):
    folder = write_prepared(name, tmp_path)
    path = sorted(folder.rglob("*.[jJ]*[gG]"))[0]
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and time
    with pytest.raises(ExperimentError, match="has changed since"):
        load_splits(name, tmp_path)


def test_what_an_earlier_version_prepared_is_to_be_prepared_again(tmp_path):
    write_prepared("pets", tmp_path)
    mark = tmp_path / "pets.prepared.json"
    content = json.loads(mark.read_text())
    mark.write_text(json.dumps(content | {"schema": 1, "fingerprint": "0" * 16}))
    with pytest.raises(ExperimentError, match=r"of an earlier version.*nothing is downloaded"):
        load_splits("pets", tmp_path)


def test_a_truncated_image_is_refused(tmp_path):
    folder = write_prepared("pets", tmp_path)
    path = sorted((folder / "images").iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExperimentError, match=rf"image {path} cannot be read .it was cut"):
        load_splits("pets", tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_that_is_not_prepared_says_what_to_run(tmp_path, name):
    message = rf"data set {name} is not prepared in .*; run: python -m classification prepare {name} --root"
    with pytest.raises(MissingDataError, match=message):
        ImageDataModule(name, root=str(tmp_path))
    with pytest.raises(MissingDataError, match=r"--root '.*/my data'$"):
        ImageDataModule(name, root=str(tmp_path / "my data"))
    folder = write(name, tmp_path)  # there, but nobody has checked it
    with pytest.raises(MissingDataError, match=message):
        load_splits(name, tmp_path)
    shutil.rmtree(folder)
    write_prepared(name, tmp_path)
    shutil.rmtree(folder)  # prepared, and then deleted
    with pytest.raises(MissingDataError, match=message):
        load_splits(name, tmp_path)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("damage", ["a file is gone", "a file is truncated", "a list is damaged"])
def test_a_data_set_that_has_changed_is_refused(tmp_path, name, damage):
    folder = write_prepared(name, tmp_path)
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in inside if path.suffix.lower() in (".jpg", ".jpeg")] or inside
    lists = [
        path
        for path in inside
        if path not in images and path.name not in ("list.txt", "classes.txt", "train.txt", "test.txt")
    ] or images
    if damage == "a file is gone":
        images[0].unlink()
    elif damage == "a file is truncated":
        os.truncate(images[-1], images[-1].stat().st_size // 2)
    else:
        lists[0].write_bytes(b"\x00\xff damaged")
    with pytest.raises(ExperimentError, match=r"is damaged|has changed|it was cut") as raised:
        load_splits(name, tmp_path)
    assert "\n" not in str(raised.value)
    assert "prepare" in str(raised.value)


@pytest.mark.parametrize("name", OF_FILES)
def test_the_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path, name):
    folder = write_prepared(name, tmp_path / "here")
    before = load_splits(name, tmp_path / "here").fingerprint
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert load_splits(name, tmp_path / "there").fingerprint == before
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    assert load_splits(name, tmp_path / "here").fingerprint == before


# A user's own folder of images.


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("train", "val", "test"), [40, 40, 40]),
        (("train", "test"), [32, 8, 40]),
        (("train", "val"), [32, 8, 40]),
        (("train",), [25, 7, 8]),
        ((), [25, 7, 8]),
    ],
    ids=["all parts", "no val", "no test", "train alone", "classes alone"],
)
def test_a_folder_of_images_is_a_data_set_by_its_name(tmp_path, parts, sizes):
    write_image_folder(tmp_path / "fish", parts)
    splits = load_splits("fish", tmp_path)
    assert splits.classes == tuple(f"kind{label}" for label in range(CLASSES))
    assert [len(getattr(splits, part).labels) for part in PARTS] == sizes
    contents = [image.tobytes() for part in PARTS for image, _ in pairs(getattr(splits, part))]
    assert len(set(contents)) == sum(sizes)
    for part in PARTS:
        assert np.ptp(np.bincount(getattr(splits, part).labels)) <= 1  # each class in proportion
        for image, label in pairs(getattr(splits, part)):
            assert abs(np.median(image) - 50 * label - 20) < 20


def test_the_fingerprint_of_a_folder_changes_with_its_images(tmp_path):
    write_image_folder(tmp_path / "fish")
    found = [load_splits("fish", tmp_path).fingerprint]
    path = sorted((tmp_path / "fish").rglob("*.jpg"))[3]
    path.rename(path.with_name("renamed.jpg"))
    found.append(load_splits("fish", tmp_path).fingerprint)
    with path.with_name("renamed.jpg").open("ab") as file:
        file.write(b"x")
    found.append(load_splits("fish", tmp_path).fingerprint)
    path.with_name("renamed.jpg").unlink()
    found.append(load_splits("fish", tmp_path).fingerprint)
    assert len(set(found)) == 4


def test_a_folder_that_is_no_data_set_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_image_folder(tmp_path / "few", count=4)
    write_image_folder(tmp_path / "odd")
    (tmp_path / "odd" / "test" / "kind3").rename(tmp_path / "odd" / "test" / "kind4")
    write_image_folder(tmp_path / "hollow")
    (tmp_path / "hollow" / "train" / "kind9").mkdir()
    messages = {
        "empty": "one folder of images per class",
        "few": "4 images of class 'kind0' to divide; needed are 5",
        "odd": r"other classes in train/ and in test/, such as 'kind3'",
        "hollow": "kind9",
        "nowhere": rf"'nowhere'; allowed: .*{names()[0]}.*, or a folder .*nowhere with one folder of images per class",
    }
    for name, message in messages.items():
        with pytest.raises(ExperimentError, match=message) as raised:
            load_splits(name, tmp_path)
        assert "\n" not in str(raised.value)

"""Faults of a user's own data: each is right, or one line that names it; never wrong pixels or classes silently."""

from __future__ import annotations

import itertools
import os
import shutil

import numpy as np
import pytest
from commands import arguments
from miniatures import write_image_folder
from PIL import Image

from classification.cli import main
from classification.data import ImageDataModule, ImageSet, load_splits
from classification.data import registry as data_registry
from classification.data.files import image_set, open_rgb
from classification.data.registry import Splits
from experiment import ExperimentError

RAMP = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(32, 32)


def refused(name, root, message):
    with pytest.raises(ExperimentError, match=message) as raised:
        load_splits(name, root)
    assert "\n" not in str(raised.value)


# Values of images.


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, ending):
    path = tmp_path / f"ramp.{ending}"
    Image.fromarray(RAMP).save(path)
    found = np.asarray(open_rgb(str(path)))
    assert found.shape == (32, 32, 3)
    assert np.abs(found - RAMP[..., None] / 257).max() <= 0.5


def test_big_endian_sixteen_bits_are_scaled(tmp_path):
    image = Image.frombytes("I;16B", (32, 32), RAMP.astype(">u2").tobytes())
    image.save(tmp_path / "ramp.tif")
    assert np.abs(np.asarray(open_rgb(str(tmp_path / "ramp.tif"))) - RAMP[..., None] / 257).max() <= 0.5


@pytest.mark.parametrize("values", [RAMP / np.float32(65535), RAMP.astype(np.float32), RAMP.astype(np.int32)])
def test_values_of_unknown_range_are_refused_by_name(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(ExperimentError, match=r"odd\.tif cannot be read .*range is not known: save it with 8 or 16"):
        open_rgb(str(tmp_path / "odd.tif"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_eight_bits_are_read_as_pillow_reads_them(tmp_path, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).convert(mode)
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path)
    with Image.open(path) as expected:
        assert np.array_equal(np.asarray(open_rgb(str(path))), np.asarray(expected.convert("RGB")))


# Files that are no images.


def test_a_giant_image_a_broken_link_and_a_pipe_are_named(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "fish", ())
    path = sorted((tmp_path / "fish").rglob("*.jpg"))[3]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ExperimentError, match=f"image {path} cannot be read .*exceeds limit"):
        open_rgb(str(path))
    path.unlink()
    path.symlink_to("nowhere.jpg")
    refused("fish", tmp_path, f"{path} is a link to nothing")
    path.unlink()
    os.mkfifo(path)
    refused("fish", tmp_path, f"image {path} cannot be read .No file")
    with pytest.raises(ExperimentError, match=f"image {path} cannot be read .it is no file"):
        open_rgb(str(path))


# Links.


def test_links_that_leave_the_folder_or_lead_in_circles_are_refused(tmp_path):
    write_image_folder(tmp_path / "other", ())
    inside, elsewhere = tmp_path / "fish" / "kind0", tmp_path / "other" / "kind1"
    links = {
        "loop": (inside / "again", ".."),
        "itself": (inside / "self", "."),
        "class elsewhere": (tmp_path / "fish" / "kind9", elsewhere),
        "class twice": (tmp_path / "fish" / "kind9", "kind1"),
        "folder elsewhere": (inside / "more", elsewhere),
        "file elsewhere": (inside / "new.jpg", sorted(elsewhere.iterdir())[0]),
        "file twice": (inside / "new.jpg", sorted(elsewhere.iterdir())[0].name),
    }
    for kind, (link, target) in links.items():
        shutil.rmtree(tmp_path / "fish", ignore_errors=True)
        write_image_folder(tmp_path / "fish", ())
        if kind == "file twice":
            target = sorted(inside.iterdir())[0].name
        link.symlink_to(target)
        refused("fish", tmp_path, f"{link} is a link to ")


def test_a_part_that_is_a_link_elsewhere_is_refused(tmp_path):
    write_image_folder(tmp_path / "fish", ("train",))
    (tmp_path / "fish" / "train").rename(tmp_path / "train")
    (tmp_path / "fish" / "train").symlink_to(tmp_path / "train")
    refused("fish", tmp_path, "train is a link to another folder|outside of")


def test_the_data_set_itself_may_be_a_link(tmp_path):
    write_image_folder(tmp_path / "fish")
    (tmp_path / "same").symlink_to("fish")
    assert load_splits("same", tmp_path).fingerprint == load_splits("fish", tmp_path).fingerprint


# Names of the parts.


@pytest.mark.parametrize(
    "parts",
    [
        ("Train", "Test"),
        ("TRAIN", "VAL", "TEST"),
        ("training", "validation"),
        ("training", "testing"),
        ("train", "Test"),
        ("train", "validation"),
        ("val", "test"),
        ("test",),
        ("train_set", "test_set"),
        ("Training Set", "Test Set"),
        ("fold1", "fold2"),
    ],
)
def test_parts_by_other_names_are_never_taken_for_classes(tmp_path, parts):
    write_image_folder(tmp_path / "fish", parts)
    refused("fish", tmp_path, "parts of a data set and not")


def test_trains_among_cars_and_buses_are_a_class(tmp_path):
    write_image_folder(tmp_path / "traffic", ())
    (tmp_path / "traffic" / "kind1").rename(tmp_path / "traffic" / "train")
    (tmp_path / "traffic" / "kind2").rename(tmp_path / "traffic" / "Test")
    assert set(load_splits("traffic", tmp_path).classes) >= {"train", "Test", "kind0"}


def test_one_class_is_refused(tmp_path):
    write_image_folder(tmp_path / "fish", ())
    for folder in sorted((tmp_path / "fish").iterdir())[1:]:
        shutil.rmtree(folder)
    refused("fish", tmp_path, "data set fish has 1 class; needed are two or more")


# A data set of a user's own.


def register(monkeypatch, labels, images=None, count=12):
    images = np.zeros((count, 8, 8), np.uint8) if images is None else images
    part = ImageSet(images, labels)
    splits = Splits(part, part, part, classes=("a", "b", "c"), fingerprint="own")
    monkeypatch.setitem(data_registry.dataset.entries, "own", lambda root: splits)


GOOD = np.arange(12) % 3
BAD_LABELS = {
    "too large": (np.where(GOOD == 2, 3, GOOD), r"label 3 at sample 2; allowed are 0 to 2"),
    "negative": (np.where(GOOD == 0, -1, GOOD), "label -1 at sample 0"),
    "float": (GOOD.astype(np.float32), "labels of kind float32"),
    "too few": (GOOD[:5], "12 samples and labels of shape"),
    "one hot": (np.eye(3, dtype=np.int64)[GOOD], "labels of shape"),
    "one class": (np.zeros(12, np.int64), "images of one class alone"),
    "none": (np.zeros(0, np.int64), "12 samples"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels_are_refused_and_the_data_set_is_named(tmp_path, monkeypatch, kind):
    labels, message = BAD_LABELS[kind]
    register(monkeypatch, labels)
    refused("own", tmp_path, f"part train of data set own.*{message}")


def test_labels_of_files_are_not_rounded():
    assert not np.issubdtype(image_set(["a", "b"], np.array([0.0, 1.5])).labels.dtype, np.integer)
    assert image_set(["a", "b"], np.array([0, 1], np.uint8)).labels.dtype == np.int64


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((12, 8, 8), np.float32),
        np.zeros((12, 8, 8), np.uint16),
        np.zeros((12, 8, 8, 4), np.uint8),
        np.zeros((12, 3, 8, 8), np.uint8),
    ],
    ids=["float", "16 bits", "RGBA", "channels first"],
)
def test_images_in_memory_that_are_not_of_eight_bits_are_refused(tmp_path, monkeypatch, images):
    register(monkeypatch, GOOD, images)
    refused("own", tmp_path, r"array of kind .* and shape .*; allowed are uint8")
    register(monkeypatch, GOOD, list(images))  # looked at one by one
    with pytest.raises(ExperimentError, match=r"image 0 of the data set is an array of kind"):
        ImageDataModule("own", root=str(tmp_path), image_size=8, batch_size=4).train[0]


def test_images_of_sixteen_bits_from_a_data_set_are_scaled(tmp_path, monkeypatch):
    register(monkeypatch, GOOD, [Image.fromarray(RAMP)] * 12)
    module = ImageDataModule("own", root=str(tmp_path), image_size=32, batch_size=4, mean=(0, 0, 0), std=(1, 1, 1))
    image, _ = module.train[0]
    assert np.abs(image[0].numpy() - RAMP / 65535).max() < 0.003


def test_a_fault_is_one_line_and_exit_code_2_of_the_command(tmp_path, capsys):
    write_image_folder(tmp_path / "data" / "fish", ("Train", "Test"))
    where = ["--model.layers", 2, "--data.dataset", "fish", "--data.root", tmp_path / "data"]
    assert main(arguments("fit", tmp_path / "runs", *where, "--data.partition", "all")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "rename Test/ to test/, Train/ to train/" in line
    assert not (tmp_path / "runs").exists()


# What is noticed at the start.


def test_values_of_unknown_range_are_refused_before_training(tmp_path):
    write_image_folder(tmp_path / "fish", ())
    folder = next(path for path in (tmp_path / "fish").iterdir() if path.is_dir())
    Image.fromarray(RAMP.astype(np.float32)).save(folder / "odd.tif")
    refused("fish", tmp_path, r"odd\.tif cannot be read .*range is not known")


def test_a_giant_image_is_refused_before_training(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "fish", ())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refused("fish", tmp_path, "cannot be read .*exceeds limit")


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_file_that_is_no_image_is_refused_before_training(tmp_path, content):
    write_image_folder(tmp_path / "fish", ("train", "test"))
    path = sorted((tmp_path / "fish" / "test").rglob("*.jpg"))[-1]
    path.write_bytes(content)
    refused("fish", tmp_path, f"image {path} cannot be read .it is no image")


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "PPM"])
def test_an_image_whose_head_is_not_whole_is_refused_before_training(tmp_path, kind):
    write_image_folder(tmp_path / "fish", ("train", "test"))
    path = sorted((tmp_path / "fish" / "test").rglob("*.jpg"))[-1]
    Image.new("RGB", (16, 16)).save(path, kind)
    path.write_bytes(path.read_bytes()[:8])
    refused("fish", tmp_path, f"image {path} cannot be read .")


def test_names_may_be_of_any_bytes(tmp_path):
    write_image_folder(tmp_path / "fish", ())
    plain = load_splits("fish", tmp_path)
    path = sorted((tmp_path / "fish").rglob("*.jpg"))[0]
    path.rename(path.with_name("\udcfc.jpg"))
    found = load_splits("fish", tmp_path)
    assert len(found.train.labels) == len(plain.train.labels)
    assert found.fingerprint != plain.fingerprint


@pytest.mark.parametrize("count", [5, 6])
def test_each_part_has_as_many_images_as_there_are_classes(tmp_path, count):
    for label, index in itertools.product(range(40), range(count)):
        path = tmp_path / "fish" / f"kind{label}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2), label, np.uint8)).save(path)
    splits = load_splits("fish", tmp_path)
    for part in (splits.train, splits.val, splits.test):
        assert set(part.labels) == set(range(40))


def test_images_that_are_trained_and_tested_on_are_counted_and_told(tmp_path, capsys):
    write_image_folder(tmp_path / "fish", ("train", "val", "test"))

    def images(part):
        return sorted((tmp_path / "fish" / part).rglob("*.jpg"))

    ImageDataModule("fish", root=str(tmp_path), image_size=8, batch_size=2)
    before = capsys.readouterr().err
    assert before == ""
    shutil.copy(images("train")[0], images("test")[1])
    shutil.copy(images("val")[2], images("test")[4])
    ImageDataModule("fish", root=str(tmp_path), image_size=8, batch_size=2)
    count = len(images("test"))
    assert capsys.readouterr().err == (
        f"warning: 2 of {count} test images of fish are among those to train or validate on as well, such as test "
        f"image 1; the test accuracy tells less\n"
    )


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_images_it_began_with(tmp_path, capsys):
    """One byte of one image changes, and neither its size nor its time."""
    write_image_folder(tmp_path / "data" / "fish", ("train", "test"))
    where = ["--model.layers", 2, "--data.dataset", "fish", "--data.root", tmp_path / "data", "--data.partition", "all"]
    words = arguments("fit", tmp_path / "runs", *where, "--data.batch_size", 2)
    assert main(words) == 0
    path = sorted((tmp_path / "data" / "fish").rglob("*.jpg"))[0]
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    assert main(words) == 2
    assert "holds a run on other data" in capsys.readouterr().err

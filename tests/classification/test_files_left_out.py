"""What in a folder of images is not read is said, once; what Pillow reads is read."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from miniatures import write_image_folder
from PIL import Image

from classification.data import load_splits
from classification.data.folders import ENDINGS
from experiment import ExperimentError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fish(tmp_path):
    write_image_folder(tmp_path / "fish", ("train", "val", "test"))
    return tmp_path / "fish"


def one_class(fish):
    """The folder of one class, with an image in it."""
    image = next(path for path in sorted((fish / "train").rglob("*")) if path.is_file())
    return image.parent, image


@pytest.mark.parametrize("ending", [*ENDINGS, ".JFIF", ".Gif"])
def test_every_ending_that_is_listed_is_read(fish, capsys, ending):
    folder, _ = one_class(fish)
    before = len(load_splits("fish", fish.parent).train.labels)
    saved = {".jfif": ".jpg", ".jpe": ".jpg", ".pgm": ".ppm"}.get(ending.lower(), ending.lower())
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"more{saved}")
    (folder / f"more{saved}").rename(folder / f"more{ending}")
    train = load_splits("fish", fish.parent).train
    assert len(train.labels) == before + 1
    assert train.images[[Path(path).name for path in train.images.paths].index(f"more{ending}")].size == (16, 16)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "train/CLASS/more.PNG.bak",
            r"1 files whose names do not end in \.jpg, .*\.gif, such as train/CLASS/more\.PNG\.bak",
        ),
        ("train/CLASS/more.heic", r"1 files .*, such as train/CLASS/more\.heic"),
        ("test/CLASS/inner/notes.txt", r"1 files .*, such as test/CLASS/inner/notes\.txt"),
        ("train/loose.png", r"1 images that are in no folder of a class, such as train/loose\.png"),
        ("extra/CLASS/a.png", r"extra/ beside train/, val/ and test/"),
    ],
)
def test_what_is_not_read_is_said_once(fish, capsys, name, told):
    folder, image = one_class(fish)
    path = fish / name.replace("CLASS", folder.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.read_bytes())
    for _ in range(2):
        load_splits("fish", fish.parent)
    printed = capsys.readouterr().err
    assert re.fullmatch(rf"warning: not read of \S+fish: {told.replace('CLASS', folder.name)}\n", printed), printed


@pytest.mark.parametrize("parts", [("train", "val", "test"), ()], ids=["parts", "classes alone"])
def test_what_systems_leave_is_neither_a_class_nor_an_image(tmp_path, capsys, parts):
    write_image_folder(tmp_path / "fish", parts)
    before = load_splits("fish", tmp_path)
    for image in [path for path in (tmp_path / "fish").rglob("*") if path.is_file()]:
        place = image.relative_to(tmp_path / "fish")
        (image.parent / f"._{image.name}").write_bytes(b"what a Mac notes of a file")
        for folder in (tmp_path / "fish" / "__MACOSX" / place.parent, image.parent / "@eaDir" / image.name):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"._{image.name}").write_bytes(b"the same")
            (folder / image.name).write_bytes(b"a small picture of it")
    capsys.readouterr()
    again = load_splits("fish", tmp_path)
    assert (again.classes, again.fingerprint) == (before.classes, before.fingerprint)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["train/CLASS/.DS_Store", "train/CLASS/Thumbs.db", "labels.csv", ".cache/a"])
def test_what_is_no_part_of_the_data_is_not_spoken_of(fish, capsys, name):
    folder, _ = one_class(fish)
    (fish / name.replace("CLASS", folder.name)).parent.mkdir(exist_ok=True)
    (fish / name.replace("CLASS", folder.name)).write_text("x")
    load_splits("fish", fish.parent)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other", ["CAFE\u0301", "caf\u00e9 "])
def test_classes_that_may_be_one_are_told_and_in_parts_refused(tmp_path, capsys, other):
    write_image_folder(tmp_path / "fish", ("train", "val"))
    for part in ("train", "val"):
        kinds = sorted((tmp_path / "fish" / part).iterdir())
        for kind, name in zip(kinds, ("caf\u00e9", other), strict=False):
            kind.rename(kind.with_name(name))
    splits = load_splits("fish", tmp_path)
    told = capsys.readouterr().err
    assert "which differ in case, spaces or accents alone; they are two classes" in told
    assert ascii(other) in told
    assert {"caf\u00e9", other} <= set(splits.classes)
    shutil.rmtree(tmp_path / "fish" / "val" / "caf\u00e9")
    shutil.rmtree(tmp_path / "fish" / "train" / other)
    with pytest.raises(ExperimentError, match=r"'.*' in one and '.*' in the other: give both one name"):
        load_splits("fish", tmp_path)


def test_the_page_lists_what_is_read():
    page = (ROOT / "docs" / "extend.md").read_text()
    (listed,) = re.findall(r"Read are files whose names end in (.+?),\s+whatever their case", page, re.DOTALL)
    assert set(re.findall(r"\.[a-z]+", listed)) == set(ENDINGS)

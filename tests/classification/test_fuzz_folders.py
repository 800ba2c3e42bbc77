"""Folders of images and labels of any shape: a data set that can be trained on, or one line that says what is wrong."""

import numpy as np
import pytest
from fuzzing import SECONDS, assert_told, damaged
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from classification.data import load_splits
from classification.data import registry as data_registry
from classification.data.files import open_rgb
from classification.data.registry import ImageSet, Splits
from experiment import ExperimentError

FOLDERS = ("train", "val", "test", "Train", "training", "cat", "dog", ".hidden", "a b", "1")
FILES = ("0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "x.txt", ".z.png", "BIG.PNG", "folder.png/")


def image(index):
    return Image.fromarray(np.full((4, 4), index % 256, np.uint8))


@pytest.fixture(scope="module")
def png(tmp_path_factory):
    path = tmp_path_factory.mktemp("png") / "image.png"
    image(7).save(path)
    return path.read_bytes()


@pytest.mark.slow
@SECONDS
@given(
    tree=st.lists(
        st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=3), st.lists(st.sampled_from(FILES), max_size=9)),
        max_size=5,
    )
)
def test_any_tree_is_a_data_set_or_told_in_one_line(tmp_path_factory, png, tree):
    root = tmp_path_factory.mktemp("data")
    for folders, files in tree:
        place = root.joinpath("mine", *folders)
        place.mkdir(parents=True, exist_ok=True)
        for name in files:
            if name.endswith("/"):
                (place / name).mkdir(exist_ok=True)
            else:
                (place / name).write_bytes(png if name.lower().endswith("png") else b"text")
    try:
        splits = load_splits("mine", root)
    except ExperimentError as error:
        assert_told(error, "mine")
        return
    assert len(splits.classes) >= 2
    paths = []
    for part in (splits.train, splits.val, splits.test):
        assert len(part.images) == len(part.labels) > 0
        assert 0 <= part.labels.min() <= part.labels.max() < len(splits.classes)
        assert np.asarray(part.images[0]).shape == (4, 4, 3)
        paths += [id(part)]
    assert len(set(paths)) == 3


@SECONDS
@given(data=st.data())
def test_a_damaged_image_is_pixels_or_told_in_one_line(tmp_path, png, data):
    path = tmp_path / "image.png"
    path.write_bytes(data.draw(damaged(png)))
    try:
        found = np.asarray(open_rgb(str(path)))
    except ExperimentError as error:
        assert_told(error, path)
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3


LABELS = st.one_of(
    st.lists(st.integers(-2, 4), max_size=9).map(np.array),
    st.lists(st.floats(), max_size=9).map(np.array),
    st.sampled_from([np.zeros((3, 2), int), np.array(["a", "b"]), np.array([True, False]), np.array(0)]),
)


@SECONDS
@given(labels=LABELS, count=st.integers(0, 9), classes=st.integers(0, 4))
def test_any_labels_are_class_numbers_or_told_in_one_line(tmp_path, labels, count, classes):
    part = ImageSet(np.zeros((count, 4, 4), np.uint8), labels)
    with pytest.MonkeyPatch.context() as patch:
        names = tuple(map(str, range(classes)))
        patch.setitem(data_registry.dataset.entries, "own", lambda root: Splits(part, part, part, names, "x"))
        try:
            splits = load_splits("own", tmp_path)
        except ExperimentError as error:
            assert_told(error, "own")
            return
    found = splits.train.labels
    assert len(found) == count > 0
    assert np.issubdtype(found.dtype, np.integer)
    assert 0 <= found.min() < found.max() < classes

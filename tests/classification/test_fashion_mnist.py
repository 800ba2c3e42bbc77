"""Fashion-MNIST in small, in the format of its four files: beside torchvision's reader, prepared, and damaged."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
from torchvision import datasets

from classification.data import load_splits
from classification.data.fashion_mnist import FOLDER, read_idx
from classification.data.registry import source
from classification.prepare import main

TRAIN, TEST = 60, 20


def idx(array):
    """An array of bytes as an IDX file."""
    sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write(folder):
    """The four files, compressed as they are published."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, count in (("train", TRAIN), ("t10k", TEST)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with the files, and `prepare` told to expect just so many images."""
    expected = replace(source.find("fashion_mnist"), train=TRAIN, test=TEST)
    monkeypatch.setitem(source.entries, "fashion_mnist", expected)
    return write(tmp_path / "given")


def prepare(root, given):
    return main(["fashion_mnist", "--root", str(root), "--from", str(given)])


def test_it_is_as_torchvision_reads_it(tmp_path, small, capsys):
    assert prepare(tmp_path / "data", small) == 0
    assert "10 classes, 48 + 12 + 20 images" in capsys.readouterr().out
    splits = load_splits("fashion_mnist", tmp_path / "data")
    for path in small.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    train, test = (datasets.FashionMNIST(str(tmp_path / "data"), train=part) for part in (True, False))
    assert np.array_equal(np.asarray(splits.test.images), test.data.numpy())
    assert np.array_equal(splits.test.labels, test.targets.numpy())
    assert splits.classes == tuple(train.classes)
    for part in (splits.train, splits.val):
        assert np.array_equal(np.asarray(part.images), train.data.numpy()[part.positions])
        assert np.array_equal(part.labels, train.targets.numpy()[part.positions])
    assert sorted([*splits.train.positions, *splits.val.positions]) == list(range(TRAIN))
    assert {*np.bincount(splits.val.labels)} == {1, 2}  # 12 of 10 classes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:50], "train-images-idx3-ubyte.gz cannot be unpacked"),
        (lambda content: content[:9000] + bytes(50) + content[9050:], "train-images-idx3-ubyte.gz cannot be unpacked"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-1]), "says that it holds [60, 28, 28] numbers"),
        (lambda content: gzip.compress(b"\0\0\x09" + gzip.decompress(content)[3:]), "is no IDX file of bytes"),
        (lambda content: gzip.compress(idx(np.zeros((59, 28, 28), np.uint8))), "59 images and labels of shape (60,)"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, small, capsys, damage, message):
    path = small / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert prepare(tmp_path / "data", small) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("error: ")
    assert message in printed[0]
    assert not (tmp_path / "data" / "fashion_mnist.prepared.json").exists()
    assert not (tmp_path / "data" / FOLDER).exists()


def test_an_idx_file_gives_its_array(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)

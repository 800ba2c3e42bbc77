"""Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28 pixels of ten kinds of clothes (Xiao et al. 2017; MIT).

The four files that torchvision downloads, compressed, where it puts them. Debian's package `dataset-fashion-mnist` has
the same: `python -m classification prepare fashion_mnist --from /usr/share/datasets/fashion-mnist`.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
from torchvision import datasets

from classification.data.files import hold_out
from classification.data.registry import Archive, ImageSet, Source, Splits, dataset, source
from experiment import fingerprint

FOLDER = "FashionMNIST/raw"
UINT8 = 8  # the code of the only kind of numbers that the files have

source("fashion_mnist")(
    Source(
        folder=FOLDER,
        archives=tuple(
            Archive(name, f"md5:{md5}", f"{datasets.FashionMNIST.mirrors[0]}{name}", FOLDER, unpack=False)
            for name, md5 in datasets.FashionMNIST.resources
        ),
        classes=10,
        train=60_000,
        test=10_000,
        most_bytes=2**30,
    )
)


def read_idx(path: Path) -> np.ndarray:
    """The array in a compressed IDX file: two zeros, a code of the kind, the number of sizes, the sizes, the numbers.

    Raises:
        OSError: it is missing.
        ValueError: it is damaged, no such file, or holds another number of numbers.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path.name} cannot be unpacked: {error}") from None
    if len(content) < 4 or content[:3] != bytes([0, 0, UINT8]):
        raise ValueError(f"{path.name} is no IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">i4").tolist()
    if len(content) - start != prod(shape):
        raise ValueError(f"{path.name} says that it holds {shape} numbers, and holds {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _part(folder: Path, name: str) -> ImageSet:
    images, labels = (read_idx(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name} has {len(images)} images and labels of shape {labels.shape}")
    return ImageSet(images, labels.astype(np.int64))


@dataset("fashion_mnist")
def fashion_mnist(root: Path) -> Splits:
    """A fifth of each class of the training images validates."""
    train, test = (_part(root / FOLDER, name) for name in ("train", "t10k"))
    content = [array.tobytes() for part in (train, test) for array in (np.asarray(part.images), part.labels)]
    classes = tuple(datasets.FashionMNIST.classes)
    return Splits(*hold_out(train, stratified=True), test, classes, fingerprint(content))

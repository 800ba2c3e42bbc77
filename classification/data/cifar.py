"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 images of 32 x 32 pixels (Krizhevsky 2009), as pickled batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision import datasets

from classification.data.files import hold_out
from classification.data.registry import Archive, ImageSet, Source, Splits, dataset, source
from experiment import fingerprint

Published = type[datasets.CIFAR10]


def _unchecked(published: Published) -> Published:
    """torchvision's class, but it takes each file as it is; `prepare` has compared their checksums."""
    lists = {key: [[name, None] for name, _ in getattr(published, key)] for key in ("train_list", "test_list")}
    return type(published.__name__, (published,), lists | {"meta": published.meta | {"md5": None}})


def _source(published: Published, classes: int) -> Source:
    files = [*published.train_list, *published.test_list, [published.meta["filename"], published.meta["md5"]]]
    return Source(
        folder=published.base_folder,
        archives=(Archive(published.filename, f"md5:{published.tgz_md5}", published.url),),
        classes=classes,
        train=50_000,
        test=10_000,
        most_bytes=2**30,
        checksums=tuple((name, f"md5:{md5}") for name, md5 in files),
    )


source("cifar10")(_source(datasets.CIFAR10, classes=10))
source("cifar100")(_source(datasets.CIFAR100, classes=100))


def _load(published: Published, root: Path) -> Splits:
    whole = [_unchecked(published)(str(root), train=train) for train in (True, False)]
    train, test = (ImageSet(part.data, np.asarray(part.targets, np.int64)) for part in whole)
    content = [array for part in (train, test) for array in (np.ascontiguousarray(part.images), part.labels)]
    return Splits(*hold_out(train), test, tuple(whole[0].classes), fingerprint([array.tobytes() for array in content]))


@dataset("cifar10")
def cifar10(root: Path) -> Splits:
    """10 classes."""
    return _load(datasets.CIFAR10, root)


@dataset("cifar100")
def cifar100(root: Path) -> Splits:
    """100 fine classes."""
    return _load(datasets.CIFAR100, root)

"""Folders of images, one folder a class: any data set of a user, and ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from classification.data.files import files_fingerprint, hold_out, image_set
from classification.data.registry import ImageSet, Splits
from experiment import ExperimentError

PARTS = ("train", "val", "test")
LEAST = 5  # images of a class, so that each part gets one


def image_folder(folder: Path, stratified: bool = True) -> Splits:
    """A folder `train/CLASS/*.jpg` with `val/` and `test/` beside it, or `CLASS/*.jpg` alone.

    Without `test/`, the images in `val/` are the test images, as for ImageNet; without either, 20 % of each class are.
    Images to validate on that are not given are 20 % of those to train on.

    Args:
        folder: holds the images.
        stratified: validate on 20 % of each class, and not of all images as the papers do.

    Raises:
        ExperimentError: no such folders, or not the same classes in all of them.
    """
    divided = (folder / "train").is_dir()
    found = {name: _read(folder / name) for name in PARTS if (folder / name).is_dir()} if divided else {}
    (train, classes), *others = found.values() if divided else [_read(folder)]
    for name, (_, other) in zip(list(found)[1:], others, strict=True):
        if other != classes:
            odd = sorted(set(classes) ^ set(other))[0]
            raise ExperimentError(f"{folder} has other classes in train/ and in {name}/, such as {odd!r}")
    whole = [part for part, _ in ((train, classes), *others)]
    parts = _divide(folder, train, [part for part, _ in others], classes, stratified)
    return Splits(*parts, classes=tuple(classes), fingerprint=files_fingerprint(folder, whole))


def _divide(
    folder: Path, train: ImageSet, others: list[ImageSet], classes: list[str], stratified: bool
) -> tuple[ImageSet, ImageSet, ImageSet]:
    if len(others) == 2:
        return train, others[0], others[1]
    counts = np.bincount(train.labels, minlength=len(classes))
    if counts.min() < LEAST:
        raise ExperimentError(
            f"{folder} has {counts.min()} images of class {classes[int(counts.argmin())]!r} to divide; needed are "
            f"{LEAST}, or folders train/, val/ and test/ of your own"
        )
    rest, test = (train, others[0]) if others else hold_out(train, stratified)
    return *hold_out(rest, stratified), test


def _read(folder: Path) -> tuple[ImageSet, list[str]]:
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise ExperimentError(f"{folder} is to hold one folder of images per class ({error})") from None
    return image_set((path for path, _ in found.samples), found.targets), found.classes

"""Cityscapes with its fine annotations, from the archives as published; 19 classes to train on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from experiment import ExperimentError
from segmentation.data.folders import expect_count, unpack, whole_folder

IMAGES_ARCHIVE, LABELS_ARCHIVE = "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"
COUNTS = {"train": 2975, "val": 500}
# The data set's label ids of the classes that are trained, in their order; all others are ignored.
TRAINED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
IGNORED = 255


def prepare_cityscapes(target: Path, archives: Path, counts: Mapping[str, int] = COUNTS) -> None:
    """Write `leftImg8bit` and `gtFine`, beside every `*_labelIds.png` a `*_labelTrainIds.png`.

    Args:
        target: the folder to write, whole or not at all.
        archives: folder with `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip`.
        counts: images that each split must have.

    Raises:
        ExperimentError: an archive is missing, damaged or not whole, or `target` is there.
    """
    table = np.full(256, IGNORED, np.uint8)
    table[list(TRAINED_IDS)] = range(len(TRAINED_IDS))
    with whole_folder(target) as folder:
        for archive in (IMAGES_ARCHIVE, LABELS_ARCHIVE):
            unpack(archives / archive, folder)
        for split, count in counts.items():
            images = sorted((folder / "leftImg8bit" / split).rglob("*_leftImg8bit.png"))
            expect_count(len(images), count, f"images of the split {split}")
            for image in images:
                stem = image.name.removesuffix("_leftImg8bit.png")
                labels = folder / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"
                if not labels.exists():
                    raise ExperimentError(f"the archives hold no {labels.name}; fetch {LABELS_ARCHIVE} again")
                ids = np.asarray(Image.open(labels))
                Image.fromarray(table[ids]).save(labels.with_name(f"{stem}_gtFine_labelTrainIds.png"))

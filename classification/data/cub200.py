"""Caltech-UCSD Birds-200-2011: 200 kinds of birds (Wah et al. 2011), divided by its own lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from classification.data.files import files_fingerprint, hold_out, image_set
from classification.data.registry import Archive, Source, Splits, dataset, source

FOLDER = "CUB_200_2011"
URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")

source("cub200")(
    Source(
        folder=FOLDER,
        archives=(Archive("CUB_200_2011.tgz", "md5:97eceeb196236b17998738112f37df78", URL),),
        classes=200,
        train=5_994,
        test=5_794,
        most_bytes=4 * 2**30,
    )
)


def _column(path: Path) -> dict[int, str]:
    """What a list says of each number."""
    rows = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    return {int(number): said.strip() for number, said in rows}


@dataset("cub200")
def cub200(root: Path) -> Splits:
    """Validates on 20 % of the official training images."""
    folder = root / FOLDER
    images, labels, to_train, classes = (_column(folder / name) for name in LISTS)
    parts = []
    for flag in ("1", "0"):
        chosen = [number for number in sorted(images) if to_train[number] == flag]
        label_of = np.array([int(labels[number]) - 1 for number in chosen])  # counted from 1 in the file
        parts.append(image_set((folder / "images" / images[number] for number in chosen), label_of))
    train, test = parts
    named = tuple(classes[number] for number in sorted(classes))
    return Splits(*hold_out(train), test, named, files_fingerprint(folder, parts, LISTS))

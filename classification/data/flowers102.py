"""Oxford Flowers-102: 102 kinds of flowers (Nilsback and Zisserman, ICVGIP 2008)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import loadmat
from torchvision import datasets

from classification.data.files import files_fingerprint, image_set
from classification.data.registry import Archive, Source, Splits, dataset, source

FOLDER = "flowers-102"
URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
LISTS = ("setid.mat", "imagelabels.mat")
IMAGES, SETS, LABELS = (
    "md5:52808999861908f626f3c1f4e79d11fa",
    "md5:a5357ecc9cb78c4bef273ce3793fc85c",
    "md5:e0620be6f572b9609742df49c70aed4d",
)

source("flowers102")(
    Source(
        folder=FOLDER,
        archives=(
            Archive("102flowers.tgz", IMAGES, f"{URL}/102flowers.tgz", FOLDER),
            Archive("setid.mat", SETS, f"{URL}/setid.mat", FOLDER, unpack=False),
            Archive("imagelabels.mat", LABELS, f"{URL}/imagelabels.mat", FOLDER, unpack=False),
        ),
        classes=102,
        train=2_040,
        test=6_149,
        most_bytes=2 * 2**30,
        checksums=tuple(zip(LISTS, (SETS, LABELS), strict=True)),
    )
)


@dataset("flowers102")
def flowers102(root: Path) -> Splits:
    """Validates on the official validation part, which is as large as that to train on."""
    folder = root / FOLDER
    numbers, label_of = (loadmat(folder / name) for name in LISTS)
    labels = label_of["labels"].ravel().astype(np.int64) - 1  # counted from 1 in the file, as the images are
    parts = []
    for key in ("trnid", "valid", "tstid"):
        images = numbers[key].ravel().astype(int)
        parts.append(image_set((folder / "jpg" / f"image_{number:05d}.jpg" for number in images), labels[images - 1]))
    classes = tuple(datasets.Flowers102.classes[: labels.max() + 1])
    return Splits(*parts, classes=classes, fingerprint=files_fingerprint(folder, parts, LISTS))

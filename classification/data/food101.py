"""Food-101: 101 dishes, 750 images of each to train and 250 to test on (Bossard et al., ECCV 2014)."""

from __future__ import annotations

import json
from pathlib import Path

from classification.data.files import files_fingerprint, hold_out, image_set
from classification.data.registry import Archive, Source, Splits, dataset, source

FOLDER = "food-101"
URL = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
LISTS = ("meta/train.json", "meta/test.json")

source("food101")(
    Source(
        folder=FOLDER,
        archives=(Archive("food-101.tar.gz", "md5:85eeb15f3717b99a5da872d97d918f87", URL),),
        classes=101,
        train=75_750,
        test=25_250,
        most_bytes=16 * 2**30,
    )
)


@dataset("food101")
def food101(root: Path) -> Splits:
    """Validates on 20 % of the official training images."""
    folder = root / FOLDER
    lists = [json.loads((folder / name).read_text()) for name in LISTS]
    classes = sorted(lists[0])
    parts = []
    for listed in lists:
        pairs = [(path, classes.index(dish)) for dish, paths in listed.items() for path in paths]
        parts.append(image_set((folder / "images" / f"{path}.jpg" for path, _ in pairs), [label for _, label in pairs]))
    train, test = parts
    return Splits(*hold_out(train), test, tuple(classes), files_fingerprint(folder, parts, LISTS))

"""Digit scenes: scikit-learn's real digit scans on textured grounds, with a class for every pixel. No download.

Every scan is used in one data set and one split only. The folder has the layout of PASCAL VOC: `JPEGImages` (here PNG,
which is the same everywhere), `SegmentationClass` (indexed PNG) and the lists in `ImageSets/Segmentation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.folders import whole_folder

Pixels = NDArray[np.uint8]
Reals = NDArray[np.float64]

IGNORED = 255  # the rim of a stroke, neither digit nor ground, as in VOC
INK_FROM, GROUND_UP_TO = 0.45, 0.25  # shares of full ink
VALIDATION_SHARE = 4  # every fourth scan
PALETTE = (
    *((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178)),
    *((213, 94, 0), (204, 121, 167), (153, 153, 153), (110, 60, 20), (255, 255, 255)),
)


@dataclass(frozen=True)
class Scenes:
    """A data set of scenes.

    Attributes:
        digits: the digits to be told from the ground; class 0 is the ground, class i + 1 is `digits[i]`.
        train, val: numbers of scenes.
        size: side of a scene in pixels.
        seed: of everything random.
    """

    digits: tuple[int, ...]
    train: int = 960
    val: int = 120
    size: int = 64
    seed: int = 233


# To pretrain and to fine-tune: other digits, so that nothing is known of the classes before.
SETS = {
    "digit_scenes_pretrain": Scenes(digits=(0, 1, 2, 3, 4)),
    "digit_scenes": Scenes(digits=(5, 6, 7, 8, 9)),
    "digit_scenes_96_pretrain": Scenes(digits=(0, 1, 2, 3, 4), size=96),
    "digit_scenes_96": Scenes(digits=(5, 6, 7, 8, 9), size=96),
}


def write_scenes(root: Path, scenes: Scenes) -> None:
    """Write a data set, whole or not at all; the same bytes every time."""
    from sklearn.datasets import load_digits  # which takes two seconds, and training needs none of it

    scans = load_digits()
    ink: Reals = scans.images / 16
    with whole_folder(root) as folder:
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (folder / name).mkdir(parents=True)
        for part, (split, count) in enumerate({"train": scenes.train, "val": scenes.val}.items()):
            validates = np.arange(len(ink)) % VALIDATION_SHARE == 0
            pools = [
                ink[(scans.target == digit) & (validates if split == "val" else ~validates)] for digit in scenes.digits
            ]
            names = []
            for index in range(count):
                random = np.random.default_rng([scenes.seed, scenes.digits[0], part, index])
                image, classes = compose(random, pools, scenes.size)
                names.append(f"{split}_{index:05d}")
                Image.fromarray(image).save(folder / "JPEGImages" / f"{names[-1]}.png")
                indexed = Image.fromarray(classes)
                indexed.putpalette([level for colour in _full_palette() for level in colour])
                indexed.save(folder / "SegmentationClass" / f"{names[-1]}.png")
            listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
            listing.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _full_palette() -> list[tuple[int, int, int]]:
    """All 256 colours; a shorter palette would be written with too few bits for `IGNORED`."""
    return [*PALETTE, *[(0, 0, 0)] * (IGNORED - len(PALETTE)), (224, 224, 192)]


def compose(random: np.random.Generator, pools: list[Reals], size: int) -> tuple[Pixels, Pixels]:
    """One scene: image (size, size, 3) and classes (size, size).

    Args:
        random: where everything random comes from.
        pools: per class the scans to choose from, each (n, 8, 8) with ink from 0 to 1.
        size: side in pixels.
    """
    image = _ground(random, size)
    classes = np.zeros((size, size), np.uint8)
    taken: list[tuple[int, int, int]] = []
    for _ in range(random.integers(3, 7)):
        side = int(size * random.uniform(0.4, 0.65))
        row, column = (int(place) for place in random.integers(0, size - side + 1, 2))
        kind = int(random.integers(len(pools)))
        scan = pools[kind][random.integers(len(pools[kind]))]
        ink = _enlarge(scan, side, random.uniform(-15, 15))
        if any(_overlap((row, column, side), other) > 0.1 for other in taken):
            continue
        taken.append((row, column, side))
        place = (slice(row, row + side), slice(column, column + side))
        colour = random.uniform(0.65, 1, 3)
        opacity = np.clip(ink * 1.5, 0, 1)[..., None]
        image[place] = (1 - opacity) * image[place] + opacity * colour
        area = classes[place]
        area[(ink > GROUND_UP_TO) & (area == 0)] = IGNORED
        area[ink > INK_FROM] = kind + 1
    noisy = image + random.normal(0, 0.02, image.shape)
    return np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8), classes


def _ground(random: np.random.Generator, size: int) -> Reals:
    """A textured ground (size, size, 3), darker than the digits; 0 is black and 1 white."""
    colour = random.uniform(0.1, 0.5, 3)
    rows, columns = np.mgrid[0:size, 0:size] / size
    angle, waves = random.uniform(0, np.pi), random.uniform(4, 16)
    grating = np.sin(2 * np.pi * waves * (np.cos(angle) * rows + np.sin(angle) * columns))
    coarse = random.normal(0, 1, (int(random.integers(4, 17)),) * 2)
    clouds = _resize(coarse, size)
    texture = random.uniform(0, 0.12) * grating + random.uniform(0.02, 0.1) * clouds
    return colour + texture[..., None] * random.uniform(0.6, 1, 3)


def _resize(values: Reals, side: int) -> Reals:
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), np.float64)


def _enlarge(scan: Reals, side: int, degrees: float) -> Reals:
    """A scan (8, 8) as ink (side, side), turned by some degrees."""
    picture = Image.fromarray(_resize(scan, side).astype(np.float32))
    turned = picture.rotate(degrees, Image.Resampling.BILINEAR)
    return np.clip(np.asarray(turned, np.float64), 0, 1)


def _overlap(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """Share of the smaller of two squares (row, column, side) that lies in the other."""
    sides = [max(0, min(a + first[2], b + second[2]) - max(a, b)) for a, b in zip(first[:2], second[:2], strict=True)]
    return sides[0] * sides[1] / min(first[2], second[2]) ** 2

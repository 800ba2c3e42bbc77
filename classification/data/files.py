"""What data sets of image files share: images read when asked for, a validation part, a fingerprint."""

from __future__ import annotations

import errno
import functools
import io
import math
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image as pillow
from PIL.Image import Image
from sklearn.model_selection import train_test_split

from classification.data.registry import ImageSet, Picked, TextSet
from experiment import ExperimentError, fingerprint
from experiment.contents import content_hashes, require_uncut, unreadable

Samples = TypeVar("Samples", ImageSet, TextSet)
VAL_SHARE, SPLIT_SEED = 0.2, 233
WIDE = ("PNG", "PPM")  # formats of which Pillow reads some 16-bit images as 32-bit ones; they have no more


def as_rgb(image: Image) -> Image:
    """An image with 8 bits a channel; 16 bits are scaled, where PIL would cut off all above 255.

    Raises:
        ValueError: its values have no known range, as those of 32 bits have none.
    """
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in WIDE):
        return pillow.fromarray(np.rint(np.asarray(image) / 257.0).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its values are {kind}, of which the range is not known: save it with 8 or 16 bits")
    return image.convert("RGB")


def check_pixels(image: np.ndarray, where: str) -> None:
    """Raise `ExperimentError` unless an array is an image of 8 bits, (H, W) or (H, W, 3)."""
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))
    if image.dtype != np.uint8 or not fits:
        raise ExperimentError(
            f"{where} is an array of kind {image.dtype} and shape {image.shape}; allowed are uint8 (0 to 255) and "
            f"shapes (height, width) and (height, width, 3)"
        )


def open_rgb(path: str, prepared: bool = False) -> Image:
    """The image in a file; `prepared` as of `image_set`.

    Raises:
        ExperimentError: it is missing or damaged, no file, too large, or of values that cannot be scaled.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe would be waited for
            raise OSError("it is no file")
        with pillow.open(path) as image:
            return as_rgb(image)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:  # what PIL raises
        raise unreadable(path, error, prepared) from None


class ImageFiles(Sequence[Image]):
    """Image files as RGB images, each read when asked for; arguments as of `image_set`.

    Attributes:
        hashes: of their bytes, once they are known.
    """

    def __init__(self, paths: Sequence[str], prepared: bool) -> None:
        self.paths, self.prepared = paths, prepared
        self.hashes: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image:  # type: ignore[override]
        return open_rgb(self.paths[index], self.prepared)


def hold_out(part: Samples, stratified: bool = False) -> tuple[Samples, Samples]:
    """Divide images or texts at random into 80 % and 20 %, always the same way.

    Args:
        part: the samples, in their official order.
        stratified: take 20 % of each class, and not of all samples as the papers do; in all at least as many as there
            are classes.
    """
    least = len(np.unique(part.labels)) if stratified else 0
    rest, held = train_test_split(
        np.arange(len(part.labels)),
        test_size=max(math.ceil(VAL_SHARE * len(part.labels)), least),
        random_state=SPLIT_SEED,
        stratify=part.labels if stratified else None,
    )
    whole = replace(part, positions=np.arange(len(part.labels)))
    return whole.pick(np.sort(rest)), whole.pick(np.sort(held))


def image_set(paths: Iterable[Path | str], labels: Sequence[int] | np.ndarray, prepared: bool = True) -> ImageSet:
    """Image files with their class numbers, which are whole; `prepared`: whether they can be prepared again."""
    numbers = np.asarray(labels)
    whole = np.issubdtype(numbers.dtype, np.integer) or not len(numbers)
    return ImageSet(ImageFiles([str(path) for path in paths], prepared), numbers.astype(np.int64) if whole else numbers)


def files_fingerprint(folder: Path, parts: Iterable[ImageSet], lists: Iterable[str] = ()) -> str:
    """A short hash of names and bytes of image files, and of the content of the files that say what is in them.

    Every image is read once, and its head is looked at; then it is known by its size and times. What is known is kept
    beside the folder.

    Args:
        folder: of the data set; names are relative to it.
        parts: image sets of `ImageFiles`, which learn the hashes of their files.
        lists: files in the folder that are hashed by content.

    Raises:
        OSError: an image is missing, or is no file.
        ExperimentError: an image is too large, or of values that cannot be scaled.
    """
    stated = [(folder / name).read_bytes() for name in lists]
    store = folder.parent / f".{folder.name}.contents.npz"
    parts = list(parts)
    every = [part.images for part in parts if isinstance(part.images, ImageFiles)]
    assert len(every) == len(parts)
    for path in (path for images in every for path in images.paths):
        _require_file(path)
    check = functools.partial(_check_head, prepared=all(images.prepared for images in every))
    hashes = iter(content_hashes([path for images in every for path in images.paths], store, check))
    for part, images in zip(parts, every, strict=True):
        images.hashes = [next(hashes) for _ in images.paths]
        stated.append(part.labels.tobytes())
        names = (str(Path(path).relative_to(folder)) for path in images.paths)
        stated += [os.fsencode(f"{name} {digest.hex()}") for name, digest in zip(names, images.hashes, strict=True)]
    return fingerprint(stated)


def _require_file(path: str) -> None:
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "No file", path)


def _check_head(path: Path, content: bytes, prepared: bool) -> None:
    """Raise `ExperimentError` where the head of a file tells that it is no image, too large, or without a range.

    One that was cut is told too; one that is damaged otherwise, when it is read.
    """
    require_uncut(path, content, prepared)
    try:
        with pillow.open(io.BytesIO(content)) as image:
            if image.mode == "F" or (image.mode == "I" and image.format not in WIDE):
                as_rgb(image)
    except pillow.UnidentifiedImageError:
        raise unreadable(path, "it is no image, or its beginning is damaged", prepared) from None
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise unreadable(path, error, prepared) from None


def contents(part: ImageSet) -> list[bytes]:
    """Each image's pixels, or a hash of its file; none where they are not known."""
    images = part.images
    if isinstance(images, np.ndarray):
        return [image.tobytes() for image in images]
    indices: np.ndarray | None = None
    while isinstance(images, Picked):
        indices = images.indices if indices is None else images.indices[indices]
        images = images.images
    if not isinstance(images, ImageFiles) or images.hashes is None:
        return []
    return images.hashes if indices is None else [images.hashes[int(index)] for index in indices]

"""What the files of a data set show before they are trained on: images that readers would turn, and labels too high."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image as pillow

from experiment import ExperimentError
from experiment.contents import unreadable
from segmentation.compose import reader_of
from segmentation.data.listing import Listing

IGNORED = 255  # in a label map: a pixel of no class
EIGHT_BITS = ("1", "L", "P")  # kinds of pixels of label maps, as Pillow names them
UPRIGHT = 1  # as EXIF has it
_ORIENTATION = 0x0112  # the tag's number
_MARKS = (b"Exif", b"eXIf", b"EXIF")  # of JPEG, PNG and WebP
_WITHIN = (b"II", b"MM")  # how TIFF begins, which has the tag among its own
_NEVER_TURN = ("turbojpeg", "tifffile")  # readers of mmcv


class Seen(NamedTuple):
    """What a look at a file's bytes gave.

    Attributes:
        orientation: EXIF's, from 1, which is upright, to 8.
        top: the highest label of a file that may be a label map, `IGNORED` aside, 0 where there is none; None where
            its pixels are of another kind, or cannot be read.
    """

    orientation: int
    top: int | None

    @classmethod
    def of(cls, number: int) -> Seen:
        """What `look` packed."""
        orientation, top = divmod(number, 256)
        return cls(orientation, top - 1 if top else None)


def look(content: bytes) -> int:
    """What a file shows, as one number; see `Seen.of`."""
    top = _top(content)
    return orientation_of(content) * 256 + (0 if top is None else top + 1)


def orientation_of(content: bytes) -> int:
    """How an image is stored by EXIF, from 1 to 8; 1 where it does not say, or cannot be read."""
    # Of a PNG, Pillow would read all pixels to find out that there is nothing.
    if not content.startswith(_WITHIN) and not any(mark in content for mark in _MARKS):
        return UPRIGHT
    try:
        with _without_warnings(), pillow.open(io.BytesIO(content)) as image:
            found = image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged head may raise anything, and whoever reads it tells
        return UPRIGHT
    return found if isinstance(found, int) and UPRIGHT < found <= 8 else UPRIGHT


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Whoever reads the pixels is warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _top(content: bytes) -> int | None:
    try:
        with _without_warnings(), pillow.open(io.BytesIO(content)) as image:
            if image.mode not in EIGHT_BITS:
                return None
            labels = np.asarray(image).astype(np.uint8)
    except Exception:  # see above
        return None
    return int(labels.max(where=labels != IGNORED, initial=0))


def turns(reader: Mapping[str, Any]) -> bool:
    """Whether a reader of images, by its settings, turns them as EXIF says."""
    kind = str(reader.get("color_type", "color"))
    as_stored = kind == "unchanged" or kind.endswith("ignore_orientation")
    return not as_stored and reader.get("imdecode_backend") not in _NEVER_TURN


def turned(path: Path | str, orientation: int) -> ExperimentError:
    """The error of an image, or its label map, that is not stored upright."""
    return ExperimentError(
        f"{path} is stored turned (EXIF orientation {orientation}), and readers turn images but not label maps, so "
        f"that pixels and labels may not match; store both upright, as mogrify -auto-orient does with images, or, "
        f"where label maps are of the images as they are stored, set color_type='color_ignore_orientation' of "
        f"LoadImageFromFile"
    )


def too_high(top: int, classes: int) -> str:
    """Why a label map of this highest label cannot be read."""
    return f"it has the label {top}; of {classes} classes they end at {classes - 1}"


def require_matching(
    part: Mapping[str, Any], listing: Listing, seen: Mapping[Path, Seen], classes: int | None, prepared: bool
) -> None:
    """Refuse images and label maps of a data set that training would match wrongly, or stop at.

    What a pipeline reads by readers other than MMSegmentation's own is not looked at.

    Args:
        part: the data set's config.
        listing: its files.
        seen: what each of them shows.
        classes: of the network; None if that is not known.
        prepared: whether the data set can be prepared again.

    Raises:
        ExperimentError: an image or label map is not stored upright where images are turned, a label is too high, or
            all are of one class.
    """
    reader = reader_of(part, "LoadImageFromFile")
    if reader is not None and turns(reader):
        for path in sorted(listing.labels | listing.images) if listing.labels else ():
            if seen[path].orientation != UPRIGHT:
                raise turned(path, seen[path].orientation)
    if classes is None or listing.renamed or reader_of(part, "LoadAnnotations") is None:
        return
    tops = dict(_tops(listing, seen))
    for path, top in tops.items():
        if top >= classes:
            raise unreadable(path, too_high(top, classes), prepared)
    if classes > 1 and tops.keys() == listing.labels and not any(tops.values()):
        raise ExperimentError(
            f"no label map of the data set has another label than 0, such as {next(iter(tops))}, but for {IGNORED}, "
            f"which stands for no class; of {classes} classes the labels are 0 to {classes - 1}, so where masks have "
            f"{IGNORED} for a class, store its label"
        )


def _tops(listing: Listing, seen: Mapping[Path, Seen]) -> Iterator[tuple[Path, int]]:
    """Label maps, each with the highest label that is trained on."""
    for path in sorted(listing.labels):
        top = seen[path].top
        if top is not None:
            yield path, max(top - 1, 0) if listing.reduced else top

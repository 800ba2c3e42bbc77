"""What data sets of image files share: images read when asked for, a validation part, a fingerprint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image
from sklearn.model_selection import train_test_split
from torchvision.datasets.folder import default_loader

from classification.data.registry import ImageSet
from experiment import ExperimentError, fingerprint

VAL_SHARE, SPLIT_SEED = 0.2, 233


class ImageFiles(Sequence[Image]):
    """Image files as RGB images, each read when asked for."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image:  # type: ignore[override]
        path = self.paths[index]
        try:
            return default_loader(path)
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on a damaged file
            raise ExperimentError(
                f"image {path} cannot be read ({error}); replace it, or delete the data set and prepare it again"
            ) from None


def hold_out(part: ImageSet, stratified: bool = False) -> tuple[ImageSet, ImageSet]:
    """Divide images at random into 80 % and 20 %, always the same way.

    Args:
        part: the images, in their official order.
        stratified: take 20 % of each class, and not of all images as the papers do.
    """
    rest, held = train_test_split(
        np.arange(len(part.labels)),
        test_size=VAL_SHARE,
        random_state=SPLIT_SEED,
        stratify=part.labels if stratified else None,
    )
    whole = ImageSet(part.images, part.labels, np.arange(len(part.labels)))
    return whole.pick(np.sort(rest)), whole.pick(np.sort(held))


def image_set(paths: Iterable[Path | str], labels: Sequence[int] | np.ndarray) -> ImageSet:
    """Image files with their class numbers."""
    return ImageSet(ImageFiles([str(path) for path in paths]), np.asarray(labels, np.int64))


def files_fingerprint(folder: Path, parts: Iterable[ImageSet], lists: Iterable[str] = ()) -> str:
    """A short hash of names and sizes of image files, and of the content of the files that say what is in them.

    Args:
        folder: of the data set; names are relative to it.
        parts: image sets of `ImageFiles`.
        lists: files in the folder that are hashed by content.
    """
    stated = [(folder / name).read_bytes() for name in lists]
    for part in parts:
        assert isinstance(part.images, ImageFiles)
        paths = part.images.paths
        stated.append(part.labels.tobytes())
        stated += [f"{Path(path).relative_to(folder)} {Path(path).stat().st_size}".encode() for path in paths]
    return fingerprint(stated)

"""MMSegmentation's readers of images and label maps, naming the file that they cannot read."""

from __future__ import annotations

from typing import Any

import PIL.Image as pillow
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS

from experiment.contents import unreadable
from segmentation.data.seen import EIGHT_BITS, IGNORED, UPRIGHT, orientation_of, too_high, turned, turns


class _Naming:
    """Turns any error of a reader into one that names the file under a key of what is read.

    Args:
        prepared: whether the data set can be prepared again, which is then the advice.
        settings: of the stock reader.
    """

    key: str

    def __init__(self, prepared: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.prepared = prepared

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """As the stock reader.

        Raises:
            ExperimentError: the file is missing or damaged.
        """
        try:
            read: dict[str, Any] | None = super().transform(results)  # type: ignore[misc]
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise unreadable(str(results.get(self.key)), reason, self.prepared) from None
        return read


@TRANSFORMS.register_module()
class NamedImage(_Naming, LoadImageFromFile):
    """Reads an image, which has to be stored upright unless it is read as it is stored."""

    key = "img_path"

    def __init__(self, prepared: bool = False, **settings: Any) -> None:
        super().__init__(prepared, **settings)
        self._turns = turns(settings)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """As the stock reader.

        Raises:
            ExperimentError: the file is missing or damaged, or EXIF says that it is to be turned.
        """
        read = super().transform(results)
        if self._turns:
            orientation = orientation_of(fileio.get(results[self.key], backend_args=self.backend_args))
            if orientation != UPRIGHT:
                raise turned(results[self.key], orientation)
        return read


@TRANSFORMS.register_module()
class NamedLabels(_Naming, LoadAnnotations):
    """Reads a label map, which has to be of its image and of the network's classes.

    Args:
        classes: how many there are; None if that is not known.
        settings: of MMSegmentation's reader.
    """

    key = "seg_map_path"

    def __init__(self, classes: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.classes = classes

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        with pillow.open(results[self.key]) as stored:
            kind = stored.mode
        if kind not in EIGHT_BITS:  # the stock reader would cut off higher bits, and take colours for label maps
            raise ValueError(f"its pixels are of the kind {kind}; a label map has one number of 8 bits each")
        super()._load_seg_map(results)
        labels, shape = results["gt_seg_map"], tuple(results["ori_shape"][:2])
        if labels.shape != shape:
            raise ValueError(f"it has {labels.shape} rows and columns, and its image {shape}")
        top = labels.max(where=labels != IGNORED, initial=0)
        if self.classes is not None and top >= self.classes:
            raise ValueError(too_high(top, self.classes))

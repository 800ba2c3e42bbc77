"""MMSegmentation's readers of images and label maps, naming the file that they cannot read."""

from __future__ import annotations

from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS

from experiment.contents import unreadable


class _Naming:
    """Turns any error of a reader into one that names the file under a key of what is read."""

    key: str

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """As the stock reader.

        Raises:
            ExperimentError: the file is missing or damaged.
        """
        try:
            read: dict[str, Any] | None = super().transform(results)  # type: ignore[misc]
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise unreadable(str(results.get(self.key)), reason) from None
        return read


@TRANSFORMS.register_module()
class NamedImage(_Naming, LoadImageFromFile):
    """Reads an image."""

    key = "img_path"


@TRANSFORMS.register_module()
class NamedLabels(_Naming, LoadAnnotations):
    """Reads a label map."""

    key = "seg_map_path"

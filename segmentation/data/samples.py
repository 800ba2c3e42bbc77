"""Whether a data set's pipeline gives images with the label maps that they are trained and validated on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample

from experiment import ExperimentError
from segmentation.compose import with_naming_readers


def require_samples(config: Config, trains: bool) -> None:
    """Load the first image of each part, of which training would find out at its first step or first validation.

    Args:
        config: see `segmentation.compose`; its data are there.
        trains: whether it is validated as well.

    Raises:
        ExperimentError: there is no label map with it, or one of another size than it is compared with.
    """
    loaders = with_naming_readers(config)
    for name in ("train_dataloader", "val_dataloader") if trains else ("train_dataloader",):
        sample = DATASETS.build(loaders[name].dataset)[0]
        told = sample.get("data_samples") if isinstance(sample, Mapping) else None
        if isinstance(told, SegDataSample):  # else it is of a pipeline of one's own
            _require_labels(name, sample, told)


def _require_labels(name: str, sample: Mapping[str, Any], told: SegDataSample) -> None:
    labels = told.get("gt_sem_seg")
    if labels is None:
        raise ExperimentError(
            f"{name}.dataset gives images without label maps; have LoadAnnotations in its pipeline, ahead of "
            f"PackSegInputs, and seg_map_path in its data_prefix"
        )
    validates = name == "val_dataloader"  # where what is predicted is brought to the size of the image as it is stored
    compared = told.get("ori_shape") if validates else sample["inputs"].shape[-2:]
    size = tuple(labels.data.shape[-2:])
    if compared is not None and size != tuple(compared):
        how = (
            "put LoadAnnotations behind what changes the size" if validates else "put LoadAnnotations ahead of all else"
        )
        raise ExperimentError(
            f"{name}.dataset gives a label map of {size[0]} x {size[1]} pixels, which is compared with "
            f"{compared[0]} x {compared[1]}; {how} in its pipeline, and look whether masks have their images' size"
        )

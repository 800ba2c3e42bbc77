"""The data sets that `python -m segmentation prepare` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCENES = tuple(f"digit_scenes{size}{use}" for size in ("", "_96") for use in ("", "_pretrain"))
DATASETS = (*SCENES, "voc12aug", "cityscapes")


def is_prepared(config: Mapping[str, Any]) -> bool:
    """Whether a config's data set is one of these, which can be written again."""
    return config.get("dataset") in DATASETS


def prepare(dataset: str, data_dir: Path, archives: Path) -> None:
    """Write one data set to `data_dir/<dataset>`, whole or not at all.

    Raises:
        ExperimentError: it is there already, or its archives are missing, damaged or not whole.
    """
    from segmentation.data.cityscapes import prepare_cityscapes
    from segmentation.data.scenes import SETS, write_scenes
    from segmentation.data.voc import prepare_voc12aug

    from_archives = {"voc12aug": prepare_voc12aug, "cityscapes": prepare_cityscapes}
    target = data_dir / dataset
    if dataset in SETS:
        write_scenes(target, SETS[dataset])
    else:
        from_archives[dataset](target, archives)
    print(f"{dataset} is in {target}")

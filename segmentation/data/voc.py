"""PASCAL VOC 2012 with the extra annotations of SBD (Hariharan et al., ICCV 2011), from the archives as published."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from experiment import ExperimentError
from segmentation.data.folders import expect_count, read_list, unpack, whole_folder

VOC_ARCHIVE, SBD_ARCHIVE = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
VOC_FOLDER, SBD_FOLDER = Path("VOCdevkit/VOC2012"), Path("benchmark_RELEASE/dataset")
LISTS = Path("ImageSets/Segmentation")
COUNTS = {"train": 1464, "val": 1449, "SBD": 11355, "train with SBD": 10582}


def prepare_voc12aug(target: Path, archives: Path, counts: Mapping[str, int] = COUNTS) -> None:
    """Write `JPEGImages`, `SegmentationClass`, `SegmentationClassAug` and the lists train, val, aug and trainaug.

    Images of VOC's own validation split are in no other list.

    Args:
        target: the folder to write, whole or not at all.
        archives: folder with `VOCtrainval_11-May-2012.tar` and `benchmark.tgz`.
        counts: how many names each list must have.

    Raises:
        ExperimentError: an archive is missing, damaged or not whole, or `target` is there.
    """
    with whole_folder(target) as folder:
        raw = folder / "raw"
        unpack(archives / VOC_ARCHIVE, raw)
        unpack(archives / SBD_ARCHIVE, raw)
        voc, sbd = raw / VOC_FOLDER, raw / SBD_FOLDER
        for name in ("JPEGImages", "SegmentationClass", "ImageSets"):
            _require(voc / name).rename(folder / name)
        train, val = (read_list(folder / LISTS / f"{split}.txt") for split in ("train", "val"))
        extra = sorted({*read_list(sbd / "train.txt"), *read_list(sbd / "val.txt")})
        annotated = sorted(set(extra) - set(val))
        together = sorted({*train, *annotated})
        found = {"train": train, "val": val, "SBD": extra, "train with SBD": together}
        for name, names in found.items():
            expect_count(len(names), counts[name], f"names in the list {name}")
        for name, names in {"aug": annotated, "trainaug": together}.items():
            (folder / LISTS / f"{name}.txt").write_text("".join(f"{image}\n" for image in names), encoding="utf-8")
        (folder / "SegmentationClassAug").mkdir()
        for name in annotated:
            classes = _sbd_classes(_require(sbd / "cls" / f"{name}.mat"))
            Image.fromarray(classes).save(folder / "SegmentationClassAug" / f"{name}.png")
        shutil.rmtree(raw)


def _sbd_classes(path: Path) -> NDArray[np.uint8]:
    """Classes (H, W) of an annotation of SBD: the field `Segmentation` of the structure `GTcls`."""
    try:
        content: dict[str, Any] = loadmat(path, squeeze_me=True, struct_as_record=False)
        classes = np.asarray(content["GTcls"].Segmentation)
    except (OSError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise ExperimentError(f"{path.name} is not an annotation of SBD ({error}); fetch the archive again") from None
    return classes.astype(np.uint8)


def _require(path: Path) -> Path:
    if not path.exists():
        raise ExperimentError(f"the archives hold no {path.parent.name}/{path.name}; fetch them again")
    return path

"""The images and label maps that a data set loads, as the data set itself lists them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS

from experiment import ExperimentError
from experiment.processes import is_started
from segmentation.data.folders import ENDINGS
from segmentation.quiet import quietly, register_modules

_OF_SYSTEMS = (".", "__MACOSX", "@eaDir")  # how names begin of what systems leave
IMAGES = "img_path"  # how the names of images begin in what a data set says of a sample; label maps have others
LABELS = "seg_map_path"  # the name of what MMSegmentation's own reader takes for the label map


@dataclass(frozen=True)
class Listing:
    """What one data set's config loads.

    Attributes:
        names: of all files, each by its path: as it is below the data set's folder, wherever that is.
        images: those of them that are images.
        labels: those that are label maps; none of a data set that does not say which these are.
        reduced: whether label 0 is ignored, and every other one counted down by 1.
        classes: their names in the order of their labels; none of a data set that does not say them.
        renamed: whether labels are others as trained on than as stored, as where the config chooses some classes.
        beside: images in the folder of its images, and label maps in that of its label maps, that are not among them,
            where it is to have all of these.
    """

    names: Mapping[Path, str]
    images: frozenset[Path]
    labels: frozenset[Path] = frozenset()
    reduced: bool = False
    classes: tuple[str, ...] = ()
    renamed: bool = False
    beside: frozenset[Path] = frozenset()


def root_of(part: Mapping[str, Any]) -> Path:
    """The folder of a data set's config: its `data_root`, or else what its prefixes and its list have in common."""
    if part.get("data_root"):
        return Path(part["data_root"])
    given = [*(part.get("data_prefix") or {}).values(), *filter(None, [part.get("ann_file")])]
    return Path(os.path.commonpath([Path(one).absolute() for one in given or ["."]]))


def listing_of(part: Mapping[str, Any]) -> Listing:
    """The files of one data set's config, whose folder is there.

    Raises:
        ExperimentError: the data set cannot be listed, or has no samples.
    """
    register_modules()
    kind, root = DATASETS.get(part["type"]), root_of(part)
    if not (isinstance(kind, type) and issubclass(kind, BaseDataset)):  # it says nothing of its files
        found = frozenset(path for path in root.rglob("*") if path.is_file())
        return Listing({path: str(path.relative_to(root)) for path in found}, found)
    try:
        with quietly():
            dataset = DATASETS.build({**part, "pipeline": [], "lazy_init": True})
            dataset.serialize_data = False  # which takes long, and fails where there is no sample
            dataset.full_init()
        samples = [dataset.get_data_info(index) for index in range(len(dataset))]
        if not samples:
            raise ValueError("there are none")
    except Exception as error:  # a data set is code, which may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ExperimentError(
            f"the data set in {root} cannot be read: {part['type']} cannot list its images ({reason}); look at its "
            f"data_root, data_prefix, ann_file, img_suffix and seg_map_suffix, or prepare the data set first"
        ) from None
    files = [entry for sample in samples for entry in _files(sample, may_lack_labels=bool(part.get("test_mode")))]
    prefixes = [Path(prefix) for prefix in dataset.data_prefix.values() if prefix]
    names = {path: _name(path, root, prefixes) for _, path in files}
    images = frozenset(path for key, path in files if key.startswith(IMAGES))
    labels = frozenset(path for key, path in files if key == LABELS)
    reduced, renamed = bool(getattr(dataset, "reduce_zero_label", False)), bool(getattr(dataset, "label_map", None))
    classes = tuple(dataset.metainfo.get("classes") or ())
    chosen = any(part.get(key) for key in ("ann_file", "indices", "filter_cfg"))
    beside = frozenset[Path]() if chosen else frozenset(_all_files(dataset)) - names.keys()
    return Listing(names, images, labels, reduced, classes, renamed, beside)


def _all_files(dataset: BaseDataset) -> Iterator[Path]:
    """The images in the folder of a data set's images, and what ends as its label maps do in that of these."""
    for kind, folder in dataset.data_prefix.items():
        of_maps = None if kind.startswith(IMAGES) else getattr(dataset, "seg_map_suffix", None)
        for path in Path(folder).rglob("*") if folder else ():
            is_one = path.name.endswith(of_maps) if of_maps else path.name.lower().endswith(ENDINGS)
            if is_one and not any(name.startswith(_OF_SYSTEMS) for name in path.relative_to(folder).parts):
                yield path


def tell_unread(listings: Iterable[Listing]) -> None:
    """Say, once, what lies in the folders of data sets and is not read, as where names do not end as they are to."""
    listings = list(listings)
    named = frozenset[Path]().union(*(one.names for one in listings))
    unread = sorted(frozenset[Path]().union(*(one.beside for one in listings)) - named)
    if unread and not is_started():
        _warn(
            f"warning: not read: {len(unread)} images or label maps, such as {unread[0]}; an image is what ends as "
            f"img_suffix says, and its label map has the same name and ends as seg_map_suffix says"
        )


@functools.cache
def _warn(line: str) -> None:
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def _files(sample: Mapping[str, Any], may_lack_labels: bool) -> Iterator[tuple[str, Path]]:
    """The files of a sample by what they are; one that is only tested on may have no label map."""
    for key, value in sample.items():
        if "_path" in key and isinstance(value, str):
            path = Path(value)
            if key.startswith(IMAGES) or not may_lack_labels or path.exists():
                yield key, path


def _name(path: Path, root: Path, prefixes: Iterable[Path]) -> str:
    if path.is_relative_to(root):
        return str(path.relative_to(root))
    places = (f"{number} {path.relative_to(one)}" for number, one in enumerate(prefixes) if path.is_relative_to(one))
    return next(places, str(path))

"""Folders of images, one folder a class: any data set of a user, and ImageNet."""

from __future__ import annotations

import functools
import os
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from classification.data.files import files_fingerprint, hold_out, image_set
from classification.data.registry import ImageSet, Splits
from experiment import ExperimentError
from experiment.processes import is_first

PARTS = ("train", "val", "test")
ENDINGS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")  # of files that are read as images; of a GIF its first picture
LEAST = 5  # images of a class, so that each part gets one
# How else people name the parts, each with the name that is read here.
_OTHER_NAMES = {
    "train": r"(tr|trn|train|training)",
    "val": r"(val|valid|validation|validate|dev|eval)",
    "test": r"(te|tst|test|testing|holdout)",
}
# What systems leave in and beside folders of images, beside hidden files and folders: __MACOSX holds a hidden file for
# each image of an archive, by the same name.
_OF_SYSTEMS = {
    *("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"),
}
_AFTER = r"([ _.-]?(set|data|dataset|images|imgs|split|part))?"


def image_folder(folder: Path, stratified: bool = True, prepared: bool = False) -> Splits:
    """A folder `train/CLASS/*.jpg` with `val/` and `test/` beside it, or `CLASS/*.jpg` alone.

    Without `test/`, the images in `val/` are the test images, as for ImageNet; without either, 20 % of each class are.
    Images to validate on that are not given are 20 % of those to train on.

    Args:
        folder: holds the images.
        stratified: validate on 20 % of each class, and not of all images as the papers do.
        prepared: whether the folder can be prepared again, as it is not one's own.

    Raises:
        ExperimentError: no such folders, parts by other names, not the same classes in all of them, or links to images
            elsewhere.
    """
    parts = _parts(folder)
    left = _Left(folder)
    if parts:
        left.folders = [path.name for path in _folders(folder) if path.name not in parts]
    found = {name: _read(folder / name, folder, left, prepared) for name in parts or [""]}
    (train, classes), *others = found.values()
    for name, (_, other) in zip(list(found)[1:], others, strict=True):
        if other != classes:
            odd = sorted(set(classes) ^ set(other))[0]
            like = next((one for one in {*classes, *other} - {odd} if _alike(one) == _alike(odd)), None)
            told = f"{odd!r}" if like is None else f"{odd!a} in one and {like!a} in the other: give both one name"
            raise ExperimentError(f"{folder} has other classes in train/ and in {name}/, such as {told}")
    _tell_alike(folder, classes)
    whole = [part for part, _ in found.values()]
    divided = _divide(folder, train, [part for part, _ in others], classes, stratified)
    left.say()
    try:
        return Splits(*divided, classes=tuple(classes), fingerprint=files_fingerprint(folder, whole))
    except OSError as error:
        raise ExperimentError(f"image {error.filename} cannot be read ({error.strerror}); replace it") from None


class _Left:
    """What in the folder of a data set is not read, which is said in one line.

    Attributes:
        files: in folders of classes, that do not end as images do.
        loose: images beside the folders of classes.
        folders: beside train/, val/ and test/.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[Path] = []
        self.loose: list[Path] = []
        self.folders: list[str] = []

    def say(self) -> None:
        """Say it on standard error, if there is anything: once, however often the data set is read."""
        told = []
        if self.files:
            what = f"files whose names do not end in {', '.join(ENDINGS)}"
            told.append(f"{len(self.files)} {what}, such as {self.files[0].relative_to(self.root)}")
        if self.loose:
            such = min(self.loose).relative_to(self.root)
            told.append(f"{len(self.loose)} images that are in no folder of a class, such as {such}")
        if self.folders:
            told.append(f"{', '.join(f'{name}/' for name in self.folders)} beside train/, val/ and test/")
        if told and is_first():
            _warn(f"warning: not read of {self.root}: {'; '.join(told)}")


@functools.cache
def _warn(line: str) -> None:
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def _alike(name: str) -> str:
    """What names have in common that differ in case, in spaces, or in how an accent is written alone."""
    return "".join(unicodedata.normalize("NFC", name).casefold().split())


def _tell_alike(folder: Path, classes: list[str]) -> None:
    """Say that two classes may be one, as where folders were copied from a system that takes their names for one."""
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(_alike(name), name)
        if other != name and is_first():
            _warn(
                f"warning: {folder} has the classes {other!a} and {name!a}, which differ in case, spaces or accents "
                f"alone; they are two classes, so if they are one, put their images into one folder"
            )


def _parts(folder: Path) -> list[str]:
    """Which of the parts there are; none where there are classes alone.

    Raises:
        ExperimentError: there are parts by other names, or no part to train on.
    """
    there = _folders(folder)
    named = {path.name: part for path in there if (part := _part_of(path.name))}
    classes = [path for path in there if path.name not in named]
    if classes and not any(_folders(folder / name) for name in named):
        named = {}  # they hold images: classes of these names, such as trains among cars and buses
    wrong = [name for name, part in named.items() if name != part]
    if wrong or (named and "train" not in named):
        listed = ", ".join(f"{name}/" for name in named)
        advice = ", ".join(f"{name}/ to {named[name]}/" for name in wrong)
        raise ExperimentError(
            f"{folder} has {listed}, which look like parts of a data set and not like its classes; parts are named "
            f"train/, val/ and test/, and there is one to train on: {f'rename {advice}' if wrong else 'add train/'}"
        )
    if not named:
        _refuse_unnamed_parts(folder, classes)
    return [part for part in PARTS if part in named]


def _part_of(name: str) -> str | None:
    """The part that a folder of this name is likely to be."""
    return next((part for part, words in _OTHER_NAMES.items() if re.fullmatch(words + _AFTER, name.lower())), None)


def _refuse_unnamed_parts(folder: Path, classes: list[Path]) -> None:
    """Refuse folders that all hold the same folders, and nothing else: they are parts, whatever they are called."""
    if len(classes) < 2:
        return
    inner = [{path.name for path in _folders(one)} for one in classes]
    alike = len(inner[0]) > 1 and all(names == inner[0] for names in inner)
    if alike and not any(entry.is_file() for one in classes for entry in os.scandir(one)):
        raise ExperimentError(
            f"{folder} has {classes[0].name}/ and {classes[1].name}/ with the same folders in them, so they are parts "
            f"of a data set and not its classes; name them train/, val/ and test/"
        )


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_of_system(path.name))
    except OSError as error:
        raise ExperimentError(f"{folder} cannot be read ({error.strerror}), so there is no data set in it") from None


def _divide(
    folder: Path, train: ImageSet, others: list[ImageSet], classes: list[str], stratified: bool
) -> tuple[ImageSet, ImageSet, ImageSet]:
    if len(others) == 2:
        return train, others[0], others[1]
    counts = np.bincount(train.labels, minlength=len(classes))
    if counts.min() < LEAST:
        raise ExperimentError(
            f"{folder} has {counts.min()} images of class {classes[int(counts.argmin())]!r} to divide; needed are "
            f"{LEAST}, or folders train/, val/ and test/ of your own"
        )
    rest, test = (train, others[0]) if others else hold_out(train, stratified)
    return *hold_out(rest, stratified), test


def _read(folder: Path, root: Path, left: _Left, prepared: bool) -> tuple[ImageSet, list[str]]:
    """Images and names of the classes in a folder of a data set, both in alphabetical order."""
    if folder != root:
        _refuse_link(folder)
    paths: list[Path] = []
    labels: list[int] = []
    classes = [path.name for path in _folders(folder)]
    for label, name in enumerate(classes):
        every = _files(folder / name)
        images = [path for path in every if _is_image(path)]
        read = set(images)
        left.files += [path for path in every if path not in read and not _is_of_system(path.name)]
        if not images:
            raise ExperimentError(f"{folder} is to hold one folder of images per class, and {name}/ holds no image")
        paths += images
        labels += [label] * len(images)
    if not classes:
        raise ExperimentError(f"{folder} is to hold one folder of images per class; there is none")
    left.loose += [Path(entry.path) for entry in os.scandir(folder) if entry.is_file() and _is_image(entry)]
    _refuse_links(paths, root)
    return image_set(paths, labels, prepared), classes


def _is_image(path: Path | os.DirEntry[str]) -> bool:
    return path.name.lower().endswith(ENDINGS) and not _is_of_system(path.name)


def _is_of_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _files(folder: Path) -> list[Path]:
    """All files in a folder and in those inside of it but systems' own, one of these folders after the other.

    Raises:
        ExperimentError: one of the folders is a link.
    """
    found = []
    for place, inner, names in sorted(os.walk(folder)):
        if any(map(_is_of_system, Path(place).relative_to(folder).parts)):
            continue
        found += [Path(place, name) for name in sorted(names)]
        for name in ("", *inner):
            _refuse_link(Path(place, name))
    return found


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise ExperimentError(
            f"{folder} is a link to another folder; its images would be read twice, or from elsewhere: copy them"
        )


def _refuse_links(paths: list[Path], root: Path) -> None:
    """Refuse links to images outside of the data set, which nobody can check, and to images that are in it anyway."""
    links = [path for path in paths if path.is_symlink()]
    if not links:
        return
    top, plain = root.resolve(), {path.resolve() for path in paths if not path.is_symlink()}
    for path in links:
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise ExperimentError(f"{path} is a link to nothing; replace it by the image") from None
        if not target.is_relative_to(top) or target in plain:
            what = "an image that is there anyway" if target in plain else f"a file outside of {root}"
            raise ExperimentError(f"{path} is a link to {what}; put a copy in its place, or remove it")

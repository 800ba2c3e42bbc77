"""The two non-iid halves of setup B: shards by label, dealt to two users (gradient filter, CVPR 2023, sec. 4.1)."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from classification.data.registry import ImageSet, Splits
from experiment import ExperimentError, fingerprint
from experiment.files import write_whole

USERS, SHARDS_PER_USER = 2, 2
PARTS = ("train", "val", "test")
NOBODY = -1

Users = dict[str, np.ndarray]  # for each part of a data set, the user of each image, int8


def half(labels: np.ndarray, user: int, seed: int) -> np.ndarray:
    """Indices of one user's half.

    The samples, sorted by label, are cut into four shards of equal size, and each user is dealt two. The same seed
    deals the same shards for every part of a data set, so a user's train, validation and test labels agree.

    Args:
        labels: class numbers, shape (N,).
        user: 0 for the half that is pretrained on, 1 for the half that is fine-tuned on.
        seed: deals the shards.
    """
    shards = np.array_split(np.argsort(labels, kind="stable"), USERS * SHARDS_PER_USER)
    dealt = np.random.default_rng(seed).permutation(len(shards))[user * SHARDS_PER_USER :][:SHARDS_PER_USER]
    return np.sort(np.concatenate([shards[shard] for shard in dealt]))


def deal(splits: Splits, seed: int) -> Users:
    """Who has which image, by `half`."""
    users: Users = {}
    for part in PARTS:
        labels = getattr(splits, part).labels
        users[part] = np.zeros(len(labels), np.int8)
        users[part][half(labels, 1, seed)] = 1
    return users


def halved(splits: Splits, users: Users, user: int) -> Splits:
    """The images of one user."""
    parts: dict[str, ImageSet] = {
        part: getattr(splits, part).pick(np.flatnonzero(users[part] == user)) for part in PARTS
    }
    return replace(splits, **parts)


def save_users(path: Path, users: Users) -> None:
    """Write a split file."""
    content = io.BytesIO()
    np.savez_compressed(content, **users)
    write_whole(path, content.getvalue())


def read_users(path: Path, splits: Splits) -> Users:
    """Who has which image, from a split file.

    Two forms are known. In a `.npz` of `save_users` stands the user of each image. A published `usr_group_*.npy` is a
    float64 array (2, 1 + N), a row a user: its number, 0 or 1, and places of its images in the official training set.
    What of them validates is the data set's own choice, and the test images of a class go to the user who has most of
    its training images.

    Raises:
        ExperimentError: no such file, or it is of another data set.
    """
    content = _content(path)
    if isinstance(content, np.ndarray):
        return _from_published(path, content, splits)
    users = {part: content.get(part, np.zeros(0)) for part in PARTS}
    for part, chosen in users.items():
        count = len(getattr(splits, part).labels)
        if chosen.shape != (count,) or not np.isin(chosen, (NOBODY, *range(USERS))).all():
            raise ExperimentError(
                f"split file {path} is of another data set: its part {part!r} is not of {count} images"
            )
    return users


def _content(path: Path) -> np.ndarray | Users:
    try:
        content = np.load(path, allow_pickle=False)
        return content if isinstance(content, np.ndarray) else dict(content)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ExperimentError(f"split file {path} cannot be read ({error}); give a .npy or .npz file") from None


def _from_published(path: Path, rows: np.ndarray, splits: Splits) -> Users:
    count = len(splits.train.labels) + len(splits.val.labels)
    fits = rows.shape[:1] == (USERS,) and rows.ndim == 2 and np.issubdtype(rows.dtype, np.number)
    places = rows[:, 1:].ravel() if fits else np.zeros(0)
    left_out = count - len(np.unique(places))  # up to three, where four equal shards do not come out even
    once = len(np.unique(places)) == len(places) and bool(np.isin(places, np.arange(count)).all())
    if not (fits and once and left_out < USERS * SHARDS_PER_USER and sorted(rows[:, 0]) == list(range(USERS))):
        raise ExperimentError(
            f"split file {path} is of another data set: it is to hold two rows, each of 0 or 1 and then places in the "
            f"{count} official training images, each once; its shape is {rows.shape}"
        )
    official = np.full(count, NOBODY, np.int8)
    for row in rows.astype(np.int64):
        official[row[1:]] = row[0]
    users = {"train": official[_positions(splits.train, 0)]}
    users["val"] = official[_positions(splits.val, len(splits.train.labels))]
    held = np.zeros((USERS, len(splits.classes)), np.int64)
    for part, chosen in users.items():
        labels = getattr(splits, part).labels
        for user in range(USERS):
            held[user] += np.bincount(labels[chosen == user], minlength=len(splits.classes))
    return users | {"test": held.argmax(0).astype(np.int8)[splits.test.labels]}


def _positions(part: ImageSet, start: int) -> np.ndarray:
    """Places in the official training set; a data set with an official validation part counts that behind the other."""
    return np.arange(start, start + len(part.labels)) if part.positions is None else part.positions


def split_fingerprint(path: Path) -> str:
    """A short hash of what a split file says."""
    content = _content(path)
    arrays = {"": content} if isinstance(content, np.ndarray) else content
    return fingerprint(part for key in sorted(arrays) for part in (key.encode(), arrays[key].tobytes()))

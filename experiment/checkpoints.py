"""Checkpoints of both tasks: saved whole, checked before they are used, and known to be of this very run.

A run's folder keeps its last checkpoint, the one before it, and that of its best epoch. Each holds the run's identity
hash; its checksums are those of the zip file that `torch.save` writes.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiment.errors import ExperimentError
from experiment.files import whole
from experiment.signals import held

TRAINING_STATE = "lowrank"  # key of what `lowrank.training_state` gave
IDENTITY = "lowrank_run"  # key of the hash of the run's identity
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
FINAL = "final.pth"  # of segmentation: the last weights alone, as MMSegmentation loads them
UNUSABLE = ".unusable"  # added to the name of a checkpoint that is not resumed
_EARLIER = ("lowrank_state", "lowrank_left", "lowrank_right")


class CheckpointError(ExperimentError):
    """A checkpoint that cannot be used, or not be written."""


def save_checkpoint(content: dict[str, Any], path: Path, identity: str) -> None:
    """Write a checkpoint beside its target, read it back, and only then put it in place; the last becomes the previous.

    Raises:
        CheckpointError: it cannot be written; what was there stays as it was.
    """
    import torch

    try:
        with held():
            path.parent.mkdir(exist_ok=True)  # a run's folder that was moved away is not made anew
            with whole(path) as file:
                torch.save(content | {IDENTITY: identity}, file)
                file.flush()
                os.fsync(file.fileno())  # before the one before the last goes
                damage = damage_of(file)
                if damage is not None:
                    raise OSError(f"it was read back damaged: {damage}")
                if path.name == LAST and path.exists():
                    _keep(path, path.with_name(PREVIOUS))
    except Exception as error:
        cause = disk_error(error)
        if cause is None:
            raise
        raise CheckpointError(
            f"checkpoint {path} cannot be written ({cause.strerror or cause}); what was saved before is whole, so the "
            f"same command goes on once it can be"
        ) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, after all of its checksums were compared; nothing in it is executed.

    Raises:
        CheckpointError: it is not there, damaged, or of something else.
    """
    import torch

    damage: str | None
    try:
        with path.open("rb") as file:
            damage = damage_of(file)
        content = torch.load(path, map_location="cpu", weights_only=True) if damage is None else None
    except Exception as error:  # a damaged pickle can raise anything
        damage = (str(error).splitlines() or [""])[0] if isinstance(error, OSError) else type(error).__name__
    if damage is not None:
        raise CheckpointError(f"checkpoint {path} is damaged ({damage})")
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"checkpoint {path} holds no state of a training run")
    refuse_earlier(content["state_dict"], path)
    return content


def resumable(folder: Path, identity: str, first_best: int = 0) -> Path | None:
    """The checkpoint that a run goes on from: the last; with a word the one before it, where the last is of no use.

    Args:
        folder: of the run's checkpoints, which this process has locked.
        identity: the run's hash; a checkpoint of another run is none of this one's.
        first_best: from this epoch on, counted from 0, there has to be a checkpoint of the best one.

    Returns:
        None if there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none is of use; nothing is changed.
    """
    there = [folder / name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    unusable: list[tuple[Path, str]] = []
    for path in there:
        try:
            content = _own(path, identity)
            _require_best(folder, identity, content["epoch"] >= first_best)
        except CheckpointError as error:
            unusable.append((path, str(error)))
            continue
        for other, problem in unusable:
            other.replace(other.with_name(other.name + UNUSABLE))
            print(f"{problem}; going on from {path.name}", file=sys.stderr, flush=True)
        return path
    if not there:
        return None
    raise CheckpointError(f"{unusable[0][1]}; delete {folder.parent} to start afresh")


def _own(path: Path, identity: str) -> dict[str, Any]:
    content = load_checkpoint(path)
    if content.get(IDENTITY) != identity:
        raise CheckpointError(f"checkpoint {path} is of a run with other settings, or of an earlier version")
    return content


def _require_best(folder: Path, identity: str, expected: bool) -> None:
    if (folder / BEST).exists():
        _own(folder / BEST, identity)
    elif expected:
        raise CheckpointError(f"the checkpoint of the best epoch, {folder / BEST}, is gone")


def damage_of(file: Any) -> str | None:
    """What is wrong with a zip file; None if every checksum in it is right."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = archive.testzip()
    except Exception as error:  # of a damaged file anything can be raised
        return " ".join(str(error).split()) or type(error).__name__
    return None if name is None else f"wrong checksum of {name!r}"


def _keep(path: Path, other: Path) -> None:
    """Give a file a second name, so that at no moment the first one is missing."""
    link = other.with_name(f".{other.name}.part")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        path.replace(other)
        return
    try:
        link.replace(other)
    finally:
        link.unlink(missing_ok=True)


def disk_error(error: BaseException | None) -> OSError | None:
    """The error of the disk behind another one, as torch's writer raises its own after it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def refuse_earlier(keys: Iterable[str], path: str | Path | None = None) -> None:
    """Refuse what an earlier version of the suite saved, which had a method's state and factors among the weights.

    Args:
        keys: of a checkpoint or of the weights in it.
        path: its file, if that is known.

    Raises:
        CheckpointError: the keys are of an earlier version.
    """
    found = next((key for key in keys if any(word in key for word in _EARLIER)), None)
    if found is not None:
        raise CheckpointError(
            f"checkpoint {'' if path is None else f'{path} '}is of an earlier version of this suite, which saved "
            f"{found!r} and cannot be read any more; start afresh, or give other weights"
        )

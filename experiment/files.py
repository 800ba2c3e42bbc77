"""Files that are whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from experiment.signals import held

PART = ".part"  # how the names of files end that are being written


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write and read, which takes its place at the end of the block, whole, or leaves no trace.

    It is written in the folder of its target, so that it is renamed there and not copied from another disk.
    """
    part = part_of(path)
    try:
        with part.open("x+b") as file:  # who may read it, the user's umask says
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename = str(path)
        raise
    _flush_names(path.parent)


def part_of(path: Path) -> Path:
    """A new name beside a file, under which it is written before it is renamed."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that no reader, and no crash, ever meets half of it."""
    with held(), whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def below(root: Path, name: str) -> list[Path]:
    """Everything of a name below a folder, by its path.

    Links to folders are followed, as a part of the runs may lie on another disk; into each folder once, and never to
    one that holds the root. A warning names a folder that cannot be read.
    """
    found, seen = [], {_place(parent) for parent in root.resolve().parents}
    for folder, inner, names in os.walk(root, onerror=_warn, followlinks=True):
        place = _place(Path(folder))
        if place is None or place in seen:
            inner.clear()
            continue
        seen.add(place)
        inner.sort()
        if name in names or name in inner:  # a folder of that name is for the reader to refuse
            found.append(Path(folder, name))
    return sorted(found)


def _place(folder: Path) -> tuple[int, int] | None:
    """Which folder of the machine it is; None if it has just gone."""
    try:
        at = folder.stat()
    except OSError:
        return None
    return at.st_dev, at.st_ino


def _warn(error: OSError) -> None:
    print(f"warning: left out: {error.filename} cannot be read ({error.strerror})", file=sys.stderr)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left of files that it was writing in a folder and in those right below it."""
    for pattern in (f".*{PART}", f"*/.*{PART}"):
        for part in folder.glob(pattern):
            part.unlink(missing_ok=True)


def remove_all(paths: Iterable[Path]) -> None:
    """Remove files and folders with what is in them, as far as that can be done."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, each of which is in the one behind it, up to the first that holds something else."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file of a file or folder, `.NAME.lock` beside it, and remove what a killed process left of that.

    On a file system without locks nothing is held, and nothing removed, as it may be of a process at work.

    Args:
        path: the file or folder, which need not exist; is written in this block alone.
        wait: until no other process holds it.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
        OSError: the lock file cannot be written.
    """
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        if _flock(lock, wait):
            # As `part_of` names what is being written; those of `NAME.other` are not of this one.
            remove_all(path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}{PART}"))
        yield


def _flock(lock: IO[str], wait: bool) -> bool:
    """Lock a file until it is closed; False where the file system cannot."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new, empty folder beside a file or folder of which the lock is held; gone at the end, however that comes.

    What is made in it is renamed to where it belongs once it is whole. That of a killed process, `file_lock` removes.

    Raises:
        OSError: it cannot be made.
    """
    part = part_of(path)
    part.mkdir()
    try:
        yield part
    finally:
        remove_all([part])


def try_place(folder: Path) -> None:
    """Write a file without a name where a folder is, or would be made, which leaves nothing.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=place_of(folder)) as file:
        file.write(bytes(4096))  # for an empty file there is room on a full disk
        file.flush()


def place_of(folder: Path) -> Path:
    """Where a folder is, or would be made: itself, or the nearest of those above it that is there."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.lstat()
            break
    return place


def _flush_names(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

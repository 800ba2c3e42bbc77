"""Folders and archives: made whole or not at all, unpacked without trust, counted before they are used."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiment import ExperimentError, archives
from experiment.contents import Content, Look, contents_of, require_uncut, unreadable
from experiment.files import beside, file_lock

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")  # of images
# How images begin, of whichever kind, as a name may be of another one: PNG, JPEG, BMP, WebP, GIF, TIFF, JPEG 2000, PNM.
_BEGINNINGS = (
    *(b"\x89PNG", b"\xff\xd8", b"BM", b"RIFF", b"GIF8", b"II", b"MM", b"\0\0\0", b"\xff\x4f"),
    *(b"P%d" % number for number in range(1, 8)),
)
MOST_BYTES = 64 * 2**30  # of an archive when unpacked; the largest, Cityscapes' images, has 11 GB


class ThereError(ExperimentError):
    """What was to be made is there already; another process may just have made it."""

    def __init__(self, target: Path) -> None:
        super().__init__(f"{target} is there already; delete it to make it again")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of `target` at the end, or is gone if anything fails.

    Another process that is making the same is waited for.

    Raises:
        ThereError: `target` is there, perhaps since that process has made it.
        ExperimentError: it cannot be written.
    """
    _refuse_made(target)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(file_lock(target, wait=False))
            except BlockingIOError:
                print(f"another process is writing {target}; waiting for it", flush=True)
                stack.enter_context(file_lock(target))
            _refuse_made(target)
            part = stack.enter_context(beside(target))
        except OSError as error:
            raise _unwritable(target, error) from None
        yield part
        try:
            part.replace(target)
        except OSError as error:
            _refuse_made(target)  # by another process, where no lock can keep it out
            raise _unwritable(target, error) from None


def _refuse_made(target: Path) -> None:
    if target.exists():
        raise ThereError(target)


def _unwritable(target: Path, error: OSError) -> ExperimentError:
    return ExperimentError(f"{target} cannot be written ({error.strerror}); give another --data-dir")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive of a data set into a folder; see `experiment.archives.unpack`.

    Raises:
        ExperimentError: the archive is missing or damaged, or holds what it must not hold.
    """
    if not archive.is_file():
        raise ExperimentError(f"there is no archive {archive}; see python -m segmentation prepare --help")
    archives.unpack(archive, folder, MOST_BYTES)


def expect_count(found: int, expected: int, what: str) -> None:
    """Raise `ExperimentError` unless as many things were found as the data set has."""
    if found != expected:
        raise ExperimentError(f"{found} {what} found, {expected} expected; the archive is not whole, fetch it again")


def read_list(path: Path) -> list[str]:
    """Names in a split's list, one a line.

    Raises:
        ExperimentError: the list cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read ({error.strerror}); prepare the data set first") from None
    return [line.strip() for line in lines if line.strip()]


def file_contents(root: Path, files: Iterable[Path], look: Look, prepared: bool) -> dict[Path, Content]:
    """What is known of the bytes of each file of a data set in `root`, which can be `prepared` again or not.

    Every file is read once, and then known by its size and times; see `experiment.contents`.

    Raises:
        ExperimentError: an image was cut, or is none.
    """
    paths, store = sorted(files), root.parent / f".{root.name}.contents.npz"
    check = functools.partial(_check_head, prepared=prepared)
    return dict(zip(paths, contents_of(paths, store, check, look), strict=True))


def _check_head(path: Path, content: bytes, prepared: bool) -> None:
    require_uncut(path, content, prepared)
    if path.suffix.lower() in ENDINGS and not content.startswith(_BEGINNINGS):
        raise unreadable(path, "it is no image, or its beginning is damaged", prepared)


def fingerprint_of(hashes: Iterable[tuple[str, bytes]]) -> str:
    """A short hash of files' names and bytes, whatever their order."""
    lines = (f"{name} {digest.hex()}" for name, digest in hashes)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]

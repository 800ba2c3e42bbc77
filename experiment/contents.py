"""Files known by their bytes: each is read once, and found again by its name, size, times and place on the disk.

So images that are tested as well as trained on are found, and those that were cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiment.errors import ExperimentError
from experiment.files import write_whole
from experiment.processes import is_first

Check = Callable[[Path, bytes], None]
Look = Callable[[bytes], int]
_DIGEST, _KEY = 16, 8  # bytes
_UNSEEN = -1  # of a file that was read without a look at what is in it
_SETTLED = 2.0  # seconds after which another change of a file has another time


class Content(NamedTuple):
    """What is known of a file.

    Attributes:
        digest: a hash of its bytes, 16 bytes.
        seen: what a look at them gave, from 0; -1 where there was none.
    """

    digest: bytes
    seen: int


def content_hashes(paths: Iterable[Path | str], store: Path, check: Check | None = None) -> list[bytes]:
    """A hash of the bytes of each file, (16 bytes) each; see `contents_of`."""
    return [one.digest for one in contents_of(paths, store, check)]


def contents_of(
    paths: Iterable[Path | str], store: Path, check: Check | None = None, look: Look | None = None
) -> list[Content]:
    """What is known of each file by its bytes.

    Args:
        paths: the files.
        store: where it is kept, so that only files that are new or were touched are read; without effect where it
            cannot be written.
        check: is given each file that is read, with its content, and may refuse it.
        look: is given its content, and says what is to be known of it, as a number from 0 to 32767. It has to be a
            function of the content alone, and the same one for a store.

    Raises:
        OSError: a file is missing, or is no file that can be read.
    """
    known, found, fresh = _load(store), [], {}
    for path in map(Path, paths):
        key = _key(path)
        one = known.get(key)
        if one is None or (look is not None and one.seen == _UNSEEN):
            started = time.time()
            content = path.read_bytes()
            if check is not None:
                check(path, content)
            digest = hashlib.blake2b(content, digest_size=_DIGEST).digest()
            one = Content(digest, _UNSEEN if look is None else look(content))
            if path.stat().st_ctime < started - _SETTLED:
                fresh[key] = one
        found.append(one)
    if fresh:
        with contextlib.suppress(OSError):
            _save(store, known | fresh)
    return found


def tell_repeated(name: str, seen: Iterable[bytes], tested: Sequence[bytes]) -> int:
    """Say how many test images are to be trained or validated on as well, byte by byte; returns their number.

    Args:
        name: of the data set.
        seen: contents or their hashes, of images to train or validate on.
        tested: the same of those to test on.
    """
    known = set(seen)
    repeated = [index for index, content in enumerate(tested) if content in known]
    if repeated and is_first():
        print(
            f"warning: {len(repeated)} of {len(tested)} test images of {name} are among those to train or validate on "
            f"as well, such as test image {repeated[0]}; the test accuracy tells less",
            file=sys.stderr,
        )
    return len(repeated)


def require_uncut(path: Path | str, content: bytes, prepared: bool = False) -> None:
    """Raise `ExperimentError` where a JPEG or PNG file has no end, which some readers fill up with grey.

    A JPEG file without any scan, which is not found either, was cut in its head. `prepared` as of `unreadable`.
    """
    jpeg, png = content.startswith(b"\xff\xd8"), content.startswith(b"\x89PNG")
    if (jpeg and content.rfind(b"\xff\xd9") <= content.rfind(b"\xff\xda")) or (png and b"IEND" not in content[-4096:]):
        raise unreadable(path, "it was cut: its end is missing", prepared)


def unreadable(path: Path | str, reason: object, prepared: bool = False) -> ExperimentError:
    """The error of an image that cannot be read; `prepared`: of a data set that can be prepared again."""
    further = ", or delete the data set and prepare it again" if prepared else " by one that can, or remove it"
    return ExperimentError(f"image {path} cannot be read ({reason}); replace it{further}")


def _key(path: Path) -> bytes:
    at = path.stat()
    stated = f"{path.absolute()}\0{at.st_size}\0{at.st_mtime_ns}\0{at.st_ctime_ns}\0{at.st_dev}\0{at.st_ino}"
    return hashlib.blake2b(stated.encode(errors="surrogateescape"), digest_size=_KEY).digest()


def _load(store: Path) -> dict[bytes, Content]:
    """Contents by key; none where the file is missing or damaged, as everything is then read again."""
    try:
        with np.load(io.BytesIO(store.read_bytes()), allow_pickle=False) as content:
            keys, digests = content["keys"], content["digests"]
            # A store of before it held what was seen knows nothing of that.
            seen = content["seen"] if "seen" in content else np.full(len(keys), _UNSEEN, np.int16)
            kinds = (keys.dtype, digests.dtype, seen.dtype)
            if kinds != (np.uint8, np.uint8, np.int16) or not len(keys) == len(digests) == len(seen):
                return {}
            rows = zip(keys.reshape(-1, _KEY), digests.reshape(-1, _DIGEST), seen.reshape(-1), strict=True)
            return {key.tobytes(): Content(digest.tobytes(), int(number)) for key, digest, number in rows}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, TypeError):
        return {}


def _save(store: Path, known: dict[bytes, Content]) -> None:
    file = io.BytesIO()
    rows = (list(known), [one.digest for one in known.values()])
    keys, digests = (np.frombuffer(b"".join(row), np.uint8) for row in rows)
    seen = np.array([one.seen for one in known.values()], np.int16)
    np.savez(file, keys=keys.reshape(-1, _KEY), digests=digests.reshape(-1, _DIGEST), seen=seen)
    write_whole(store, file.getvalue())

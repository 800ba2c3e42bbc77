"""Archives from elsewhere, unpacked so that nothing lands outside the folder and no disk fills up."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from pathlib import Path

from experiment.errors import ExperimentError

MOST_FILES = 5_000_000
_DAMAGED = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def unpack(archive: Path, folder: Path, most_bytes: int) -> None:
    """Unpack a tar archive, compressed or not, into a folder.

    Only files and folders are taken: a link, a device, or a name that leads out of the folder refuses the archive.

    Args:
        archive: the file.
        folder: where its content goes; made if it is not there.
        most_bytes: what its files may have in all when unpacked.

    Raises:
        ExperimentError: the archive is damaged, or holds what it must not hold. The folder may then hold a part of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = nbytes = 0
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()):
                    raise ExperimentError(f"archive {archive} is refused: {member.name!r} is no file and no folder")
                files, nbytes = files + 1, nbytes + member.size
                if files > MOST_FILES or nbytes > most_bytes:
                    raise ExperimentError(
                        f"archive {archive} is refused: unpacked it has more than {most_bytes} bytes, or more than "
                        f"{MOST_FILES} files"
                    )
                tar.extract(member, folder, filter="data")
            _read_on(tar, most_bytes)
    except tarfile.FilterError as error:
        raise ExperimentError(f"archive {archive} is refused: {error}") from None
    except _DAMAGED as error:
        raise ExperimentError(
            f"archive {archive} is damaged ({' '.join(str(error).split())}); fetch it again"
        ) from None
    except OSError as error:
        raise ExperimentError(f"archive {archive} cannot be unpacked to {folder} ({error})") from None


def _read_on(tar: tarfile.TarFile, most_bytes: int) -> None:
    """Read what is behind the last member, so that the compressed file's own checksum is compared."""
    assert tar.fileobj is not None
    for _ in range(0, most_bytes + 2**20, 2**20):
        if not tar.fileobj.read(2**20):
            return
    raise ExperimentError(f"archive {tar.name!s} is refused: it has more than {most_bytes} bytes behind its last file")

"""Archives from elsewhere, unpacked so that nothing lands outside the folder and no disk fills up."""

from __future__ import annotations

import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from experiment.errors import ExperimentError

MOST_FILES = 5_000_000
MOST_HEADER = 2**20  # bytes of one member's names and notes
_CHUNK = 2**20
_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def unpack(archive: Path, folder: Path, most_bytes: int) -> None:
    """Unpack a tar archive, compressed or not, or a zip archive into a folder; all of its checksums are compared.

    Only files and folders are taken: a link, a device, a name that leads out of the folder, or a password refuses the
    archive.

    Args:
        archive: the file.
        folder: where its content goes; made if it is not there.
        most_bytes: what its files may have in all when unpacked.

    Raises:
        ExperimentError: the archive is missing or damaged, or holds what it must not hold. The folder may then hold a
            part of it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        limits = _Limits(archive, most_bytes)
        if zipfile.is_zipfile(archive) and not _begins_as_tar(archive):
            _unzip(archive, folder, limits)
        else:
            _untar(archive, folder, limits)
    except tarfile.FilterError as error:
        raise ExperimentError(f"archive {archive} is refused: {error}") from None
    except _DAMAGED as error:
        raise ExperimentError(
            f"archive {archive} is damaged ({' '.join(str(error).split())}); fetch it again"
        ) from None
    except (OSError, ValueError, NotImplementedError) as error:
        raise ExperimentError(
            f"archive {archive} cannot be unpacked to {folder} ({' '.join(str(error).split())})"
        ) from None


def _begins_as_tar(archive: Path) -> bool:
    """Whether it is a tar archive, which may hold a zip archive and then looks like one."""
    try:
        with tarfile.open(archive, tarinfo=_Member):
            return True
    except (tarfile.TarError, EOFError):
        return False


class _Limits:
    """What an archive may still hold."""

    def __init__(self, archive: Path, most_bytes: int) -> None:
        self.archive, self.most_bytes = archive, most_bytes
        self.files = self.nbytes = 0

    def refuse(self, why: str) -> ExperimentError:
        """The error of an archive that holds what it must not hold."""
        return ExperimentError(f"archive {self.archive} is refused: {why}")

    def add(self, nbytes: int, files: int = 1) -> None:
        """Count a member, before it is written."""
        self.files, self.nbytes = self.files + files, self.nbytes + nbytes
        if self.files > MOST_FILES or self.nbytes > self.most_bytes:
            raise self.refuse(f"unpacked it has more than {self.most_bytes} bytes, or more than {MOST_FILES} files")


class _Member(tarfile.TarInfo):
    """A member whose headers are of a sensible size: tarfile takes all of one into memory at once."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > MOST_HEADER:
            raise ExperimentError(f"archive {tar.name!s} is refused: it has a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _untar(archive: Path, folder: Path, limits: _Limits) -> None:
    with tarfile.open(archive, tarinfo=_Member) as tar:
        for member in tar:
            if not (member.isreg() or member.isdir()):
                raise limits.refuse(f"{member.name!r} is no file and no folder")
            limits.add(member.size)
            tar.extract(member, folder, filter="data")
        assert tar.fileobj is not None
        # Behind the last member, so that the compressed file's own checksum is compared.
        for _ in range(0, limits.most_bytes + _CHUNK, _CHUNK):
            if not tar.fileobj.read(_CHUNK):
                return
    raise limits.refuse(f"it has more than {limits.most_bytes} bytes behind its last file")


def _unzip(archive: Path, folder: Path, limits: _Limits) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise limits.refuse(f"{member.filename!r} is no file and no folder")
            if member.flag_bits & 1:
                raise limits.refuse(f"{member.filename!r} is encrypted; unpack it by hand")
        for member in members:
            target = _inside(member.filename, folder, limits)
            if member.is_dir():
                limits.add(0)
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            limits.add(0)
            with file.open(member) as source, target.open("wb") as written:
                for chunk in _chunks(source):
                    limits.add(len(chunk), files=0)  # what really comes, whatever the archive says of it
                    written.write(chunk)


def _inside(name: str, folder: Path, limits: _Limits) -> Path:
    """Where a member goes: an absolute name counts from the folder, as in a tar archive."""
    parts = name.replace("\\", "/").lstrip("/").split("/")
    if ".." in parts or (parts and parts[0].endswith(":")):
        raise limits.refuse(f"{name!r} would be extracted outside of the folder")
    return folder.joinpath(*parts)


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK):
        yield chunk

"""Archives: whole ones are unpacked; damaged and hostile ones are refused and leave nothing outside."""

import gzip
import io
import os
import stat
import tarfile
import zipfile

import pytest

from experiment import ExperimentError
from experiment.archives import unpack


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    """A member of a tar archive with its content."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def pack(path, *members, mode="w:gz"):
    """A tar archive."""
    with tarfile.open(path, mode) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def outside(tmp_path):
    """A folder beside the target, in which nothing may change."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("mine")
    yield folder
    assert [path.read_text() for path in folder.rglob("*")] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) in (["a.tar", "outside"], ["a.tar", "outside", "target"])


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_an_archive_is_unpacked(tmp_path, mode):
    folder = member("a", kind=tarfile.DIRTYPE)
    path = pack(tmp_path / "a.tar", folder, member("a/b.txt", b"one"), member("c/d.txt", b"two"), mode=mode)
    unpack(path, tmp_path / "target" / "deep", 6)
    assert (tmp_path / "target/deep/a/b.txt").read_bytes() == b"one"
    assert (tmp_path / "target/deep/c/d.txt").read_bytes() == b"two"


HOSTILE = {
    "out by dots": [member("../outside/file", b"theirs")],
    "out by dots inside": [member("a/../../outside/new", b"theirs")],
    "symlink": [member("a", kind=tarfile.SYMTYPE, link="../outside"), member("a/file", b"theirs")],
    "symlink to a file": [member("a", kind=tarfile.SYMTYPE, link="/etc/passwd")],
    "hard link": [member("a", kind=tarfile.LNKTYPE, link="../outside/file"), member("a", b"theirs")],
    "device": [member("a", kind=tarfile.CHRTYPE)],
    "pipe": [member("a", kind=tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused(tmp_path, outside, kind):
    path = pack(tmp_path / "a.tar", *HOSTILE[kind])
    with pytest.raises(ExperimentError, match=r"a\.tar is refused"):
        unpack(path, tmp_path / "target", 1000)
    assert all(path.is_dir() for path in (tmp_path / "target").rglob("*"))


def test_an_absolute_name_stays_in_the_folder(tmp_path, outside):
    unpack(pack(tmp_path / "a.tar", member(f"{outside}/file", b"theirs")), tmp_path / "target", 1000)
    assert len([path for path in (tmp_path / "target").rglob("*") if path.is_file()]) == 1


def test_an_archive_that_grows_too_large_is_refused_before_it_has_grown(tmp_path):
    path = pack(tmp_path / "a.tar", member("small", b"x"), member("large", bytes(50 * 2**20)))
    assert path.stat().st_size < 2**17
    with pytest.raises(ExperimentError, match="refused: unpacked it has more than 1048576 bytes"):
        unpack(path, tmp_path / "target", 2**20)
    assert sum(found.stat().st_size for found in (tmp_path / "target").rglob("*") if found.is_file()) == 1


def test_an_archive_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("experiment.archives.MOST_FILES", 3)
    path = pack(tmp_path / "a.tar", *(member(f"file{number}") for number in range(4)))
    with pytest.raises(ExperimentError, match="more than 3 files"):
        unpack(path, tmp_path / "target", 1000)


def damaged(whole):
    """Ways in which a gzipped archive can be damaged."""
    yield "truncated", whole[: len(whole) // 2]
    yield "empty", b""
    yield "text", b"<html>please log in</html>"
    yield "another byte", whole[:500] + bytes([whole[500] ^ 255]) + whole[501:]
    yield "truncated inside", gzip.compress(gzip.decompress(whole)[:5000])


def test_a_damaged_archive_is_one_clear_line(tmp_path):
    content = bytes(range(256)) * 40
    whole = pack(tmp_path / "whole.tar", member("a", content), member("b", content)).read_bytes()
    for kind, part in damaged(whole):
        path = tmp_path / f"{kind}.tar"
        path.write_bytes(part)
        with pytest.raises(ExperimentError, match=rf"{kind}\.tar is damaged") as raised:
            unpack(path, tmp_path / kind, 10**6)
        assert "\n" not in str(raised.value)


def test_a_missing_archive_is_one_line(tmp_path):
    with pytest.raises(ExperimentError, match="cannot be unpacked"):
        unpack(tmp_path / "nowhere.tar", tmp_path / "target", 1)


# Zip archives.


def zipped(path, *members, method=zipfile.ZIP_DEFLATED):
    """A zip archive of names, contents and, where they are given, kinds of files."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content, *kind in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.external_attr = ((kind[0] if kind else stat.S_IFREG) | 0o644) << 16
            file.writestr(info, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_archive_is_unpacked(tmp_path, method):
    path = zipped(
        tmp_path / "a.zip", ("a/", b"", stat.S_IFDIR), ("a/b.txt", b"one"), ("c/d.txt", b"two"), method=method
    )
    unpack(path, tmp_path / "target" / "deep", 6)
    assert (tmp_path / "target/deep/a/b.txt").read_bytes() == b"one"
    assert (tmp_path / "target/deep/c/d.txt").read_bytes() == b"two"


HOSTILE_ZIPS = {
    "out by dots": ("../outside/file", b"theirs"),
    "out by dots inside": ("a/../../outside/new", b"theirs"),
    "out by backslashes": ("..\\outside\\file", b"theirs"),
    "a drive": ("C:/outside/file", b"theirs"),
    "symlink": ("a", b"../outside", stat.S_IFLNK),
    "device": ("a", b"", stat.S_IFCHR),
    "pipe": ("a", b"", stat.S_IFIFO),
}


@pytest.mark.parametrize("kind", HOSTILE_ZIPS)
def test_a_hostile_zip_archive_is_refused(tmp_path, outside, kind):
    path = zipped(tmp_path / "a.tar", HOSTILE_ZIPS[kind])
    with pytest.raises(ExperimentError, match=r"a\.tar is refused"):
        unpack(path, tmp_path / "target", 1000)
    assert all(path.is_dir() for path in (tmp_path / "target").rglob("*"))


def test_an_absolute_name_in_a_zip_archive_stays_in_the_folder(tmp_path, outside):
    unpack(zipped(tmp_path / "a.tar", (f"{outside}/file", b"theirs")), tmp_path / "target", 1000)
    assert len([path for path in (tmp_path / "target").rglob("*") if path.is_file()]) == 1


def test_an_encrypted_zip_archive_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", ("a", b"x"))
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # of the member
    raw[raw.index(b"PK\1\2") + 8] |= 1  # of the list of members
    path.write_bytes(raw)
    with pytest.raises(ExperimentError, match="refused: 'a' is encrypted"):
        unpack(path, tmp_path / "target", 1000)


@pytest.mark.parametrize("stated", [True, False])
def test_a_zip_archive_that_grows_too_large_is_refused_before_it_has_grown(tmp_path, stated):
    path = zipped(tmp_path / "a.zip", ("small", b"x"), ("large", bytes(20 * 2**20)))
    if not stated:  # the archive says that it is small
        size = (20 * 2**20).to_bytes(4, "little")
        path.write_bytes(path.read_bytes().replace(size, (5).to_bytes(4, "little")))
    with pytest.raises(ExperimentError, match=r"more than 1048576 bytes|is damaged"):
        unpack(path, tmp_path / "target", 2**20)
    assert sum(found.stat().st_size for found in (tmp_path / "target").rglob("*") if found.is_file()) <= 2**20 + 1


def test_a_zip_archive_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("experiment.archives.MOST_FILES", 3)
    path = zipped(tmp_path / "a.zip", *((f"file{number}", b"") for number in range(4)))
    with pytest.raises(ExperimentError, match="more than 3 files"):
        unpack(path, tmp_path / "target", 1000)


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_one_flipped_bit_in_any_place_is_noticed_or_changes_no_file(tmp_path, kind):
    """Of stored random bytes, so that no code of the compression notices it."""
    contents = {f"img/{number}.jpg": os.urandom(600) for number in range(4)}
    if kind == "tgz":
        path = pack(tmp_path / "a", *(member(name, content) for name, content in contents.items()))
    else:
        path = zipped(tmp_path / "a", *contents.items(), method=zipfile.ZIP_STORED)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        target = tmp_path / f"target{place}"
        try:
            unpack(path, target, 10**6)
        except ExperimentError:
            noticed += 1
            continue
        found = {str(file.relative_to(target)): file.read_bytes() for file in target.rglob("*") if file.is_file()}
        assert set(contents.values()) == set(found.values()), place
    assert noticed > len(whole) // 97 // 2


def test_a_tar_archive_with_a_huge_header_is_refused_before_it_is_read(tmp_path):
    header, _ = member("././@LongLink", kind=tarfile.GNUTYPE_LONGNAME)
    header.size = 50 * 2**20
    path = tmp_path / "a.tar"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf())
        file.write(bytes(50 * 2**20))
    with pytest.raises(ExperimentError, match="refused: it has a header of 52428800 bytes"):
        unpack(path, tmp_path / "target", 10**6)

"""Archives: whole ones are unpacked; damaged and hostile ones are refused and leave nothing outside."""

import gzip
import io
import tarfile

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

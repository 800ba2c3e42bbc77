import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from experiment.files import below, beside, file_lock, part_of, write_whole


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("first, somewhat longer", "sécond"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["file.txt"]  # noqa: PTH208 - hidden files as well


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file_whole_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_cannot_be_encoded_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "lone surrogate \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_meets_half_of_the_text(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")
    seen = []
    replace = Path.replace

    def watched(part, target):
        seen.append((path.read_text(), Path(part).read_text()))
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_whole(path, "new" * 1000)
    assert seen == [("old", "new" * 1000)]


def test_the_holder_of_a_file_removes_what_killed_writers_left_of_it(tmp_path):
    path, others = tmp_path / "a[1].pt", [tmp_path / "a1.pt", tmp_path / "a[1].pt.pt"]
    left, kept = part_of(path), [part_of(other) for other in others]
    for part in (left, *kept):
        part.touch()
    with file_lock(path):
        assert not left.exists()
        with pytest.raises(BlockingIOError), file_lock(path, wait=False):
            pass
    assert all(part.exists() for part in kept)


def test_what_is_made_beside_a_folder_is_gone_at_the_end_whatever_happens(tmp_path):
    path = tmp_path / "set"

    def fail():
        with beside(path) as part:
            (part / "inner").mkdir()
            raise KeyError

    with file_lock(path):
        with pytest.raises(KeyError):
            fail()
        assert [one.name for one in tmp_path.iterdir()] == [".set.lock"]
    child = os.fork()
    if not child:
        with file_lock(path), beside(path) as part:
            (part / "inner").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.glob(".set.*.part/inner"))) == 1
    with file_lock(path), beside(path) as part:
        assert list(tmp_path.glob(".set.*.part")) == [part]
        part.rename(path)
    assert {one.name for one in tmp_path.iterdir()} == {"set", ".set.lock"}


def test_without_locks_in_the_file_system_nothing_is_refused_and_nothing_of_others_removed(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "set"
    with file_lock(path), beside(path) as first, file_lock(path, wait=False), beside(path) as second:
        assert first.is_dir()
        assert second.is_dir()


def test_files_are_found_through_links_each_once_and_nothing_above_the_folder(tmp_path, capsys):
    runs, disk = tmp_path / "runs", tmp_path / "disk"
    for place in (runs / "b", disk / "c", tmp_path / "other"):
        place.mkdir(parents=True)
        (place / "x").touch()
    (runs / "a").symlink_to(disk)
    (disk / "again").symlink_to(runs / "b")
    (disk / "loop").symlink_to(disk)
    (runs / "up").symlink_to(tmp_path)
    (runs / "gone").symlink_to(tmp_path / "nowhere")
    assert below(runs, "x") == [runs / "a" / "again" / "x", runs / "a" / "c" / "x"]
    assert below(tmp_path / "nowhere", "x") == []
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_who_may_read_a_file_is_as_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "own", "x")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "own").stat().st_mode == (tmp_path / "plain").stat().st_mode

import os
from pathlib import Path

import pytest

from experiment.files import write_whole


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("first, somewhat longer", "sécond"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["file.txt"]  # noqa: PTH208 - hidden files as well


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.chmod"])
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

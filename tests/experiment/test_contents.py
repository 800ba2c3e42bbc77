"""Files are known by their bytes, and read again only where something says that they were touched."""

import hashlib
import os
import time

import pytest

from experiment.contents import content_hashes


@pytest.fixture
def files(tmp_path):
    """Three files, two of them equal, that were written long ago as far as anyone can tell."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, content in zip(paths, (b"one", b"two", b"one"), strict=True):
        path.write_bytes(content)
    return paths


@pytest.fixture
def _later(monkeypatch):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)


def reads(paths, store):
    """Hashes, and which files were read for them."""
    seen = []
    return content_hashes(paths, store, lambda path, content: seen.append(path.name)), seen


def test_a_hash_is_of_the_bytes_alone(files, tmp_path):
    found, seen = reads(files, tmp_path / "store.npz")
    assert found[0] == found[2] != found[1]
    assert found[1] == hashlib.blake2b(b"two", digest_size=16).digest()
    assert seen == ["a", "b", "c"]


@pytest.mark.usefixtures("_later")
def test_what_is_known_is_not_read_again_until_it_is_touched(files, tmp_path):
    store = tmp_path / "store.npz"
    first, _ = reads(files, store)
    assert reads(files, store) == (first, [])
    times = files[1].stat()
    files[1].write_bytes(b"tow")  # as large as before
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    second, seen = reads(files, store)
    assert seen == ["b"]
    assert second[1] != first[1]
    files[0].replace(tmp_path / "d")
    (tmp_path / "d").replace(files[0])
    assert reads(files, store)[0] == second


def test_what_was_just_written_is_read_again(files, tmp_path):
    """It could be written once more without another time."""
    store = tmp_path / "store.npz"
    reads(files, store)
    assert reads(files, store)[1] == ["a", "b", "c"]


@pytest.mark.usefixtures("_later")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "folder"])
def test_a_damaged_store_is_made_again(files, tmp_path, damage):
    store = tmp_path / "store.npz"
    first, _ = reads(files, store)
    content = bytearray(store.read_bytes())
    content[len(content) // 3] ^= 0x10
    if damage == "folder":
        store.unlink()
        store.mkdir()
    else:
        cut = store.read_bytes()[:-30]
        store.write_bytes({"cut": cut, "flipped": bytes(content), "empty": b"", "text": b"abc"}[damage])
    assert reads(files, store)[0] == first


def test_a_missing_file_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        content_hashes([tmp_path / "nowhere"], tmp_path / "store.npz")

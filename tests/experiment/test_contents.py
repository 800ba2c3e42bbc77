"""Files are known by their bytes, and read again only where something says that they were touched."""

import hashlib
import io
import os
import time

import numpy as np
import pytest
from PIL import Image

from experiment import ExperimentError
from experiment.contents import content_hashes, require_uncut, tell_repeated


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


def test_what_was_just_written_is_read_again(files, tmp_path, monkeypatch):
    """It could be written once more without another time."""
    written = files[0].stat().st_ctime
    monkeypatch.setattr(time, "time", lambda: written + 1)
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


def picture(kind, **options):
    """A picture as a file has it, with a small one of itself in its head where it is a JPEG."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    small, file = io.BytesIO(), io.BytesIO()
    image.resize((8, 8)).save(small, "JPEG")
    exif = {"exif": b"Exif\0\0" + small.getvalue()} if kind == "JPEG" else {}
    image.save(file, kind, **exif, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})])
def test_a_cut_image_is_told_wherever_it_was_cut(kind, options):
    whole = picture(kind, **options)
    require_uncut("x", whole)
    require_uncut("x", whole + b"\0" * 2000 if kind == "PNG" else whole + b"behind it" * 500)
    first = whole.rindex(b"\xff\xda") if kind == "JPEG" else 60  # the last of its scans begins
    last = len(whole) - (6 if kind == "JPEG" else 24)  # after which Pillow misses nothing of a PNG
    for end in range(first + 2, last, 7):
        with pytest.raises((OSError, SyntaxError)):
            Image.open(io.BytesIO(whole[:end])).load()
        with pytest.raises(ExperimentError, match=r"image x cannot be read \(it was cut"):
            require_uncut("x", whole[:end])


def test_a_jpeg_that_was_cut_ahead_of_its_pixels_is_told():
    file = io.BytesIO()
    Image.new("RGB", (24, 24)).save(file, "JPEG")
    for end in range(2, file.getvalue().rindex(b"\xff\xda"), 7):
        with pytest.raises(ExperimentError, match=r"image x cannot be read \(it was cut"):
            require_uncut("x", file.getvalue()[:end])


def test_images_that_are_tested_and_trained_on_are_counted(capsys):
    assert tell_repeated("fish", [b"a", b"b"], [b"c", b"d"]) == 0
    assert capsys.readouterr().err == ""
    assert tell_repeated("fish", [b"a", b"b"], [b"c", b"b", b"a"]) == 2
    assert capsys.readouterr().err.startswith("warning: 2 of 3 test images of fish are among those to train or ")

"""Sentences of film reviews in small, in the published format: prepared in every form, labelled, and refused."""

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from miniatures import checksum
from publishing import prepare, refused

from classification.data import load_splits
from classification.data.registry import source
from classification.data.review_sentences import FILE, FOLDER, INSIDE

NAME = "review_sentences"
CLEAR = [(rating, f"sentence of {rating} number {n}") for n in range(10) for rating in (-3.25, 0.5, -0.5, 2.0)]
UNDECIDED = [(0.0, "neither"), (0.4999, "hardly good"), (-0.25, "hardly bad")]
AGAIN = [(1.5, "sentence of 2.0 number 0")]
TRAIN, TEST = 32, 8  # of the clear ones


def text(rows):
    """The file as it is published, without an end of the last line."""
    return "\r\n".join(f"{n}\t{rating}\t{said}" for n, (rating, said) in enumerate(rows, start=1)).encode()


def packed(path, name, content):
    """A compressed tar archive of one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return path


def publish(folder, monkeypatch, content):
    """The text, the archive with it and the distribution with that; `prepare` is told to expect just them."""
    file = folder / FOLDER / FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    inner = packed(folder / "resources" / f"{FOLDER}.tar.gz", f"{FOLDER}/{FILE}", content)
    whole = packed(folder / "vaderSentiment-3.3.2.tar.gz", INSIDE, inner.read_bytes())
    real = source.find(NAME)
    expected = replace(
        real,
        archives=(replace(real.archives[0], checksum=checksum(whole)),),
        instead=tuple(
            replace(archive, checksum=checksum(path)) for archive, path in zip(real.instead, (inner, file), strict=True)
        ),
        checksums=((FILE, checksum(file)),),
        train=TRAIN,
        test=TEST,
    )
    monkeypatch.setitem(source.entries, NAME, expected)
    return {"whole": whole, "inner": inner, "file": file, "folder": file.parent, "folder of the inner": inner.parent}


@pytest.fixture
def published(tmp_path, monkeypatch):
    return publish(tmp_path / "published", monkeypatch, text(UNDECIDED + CLEAR + AGAIN))


@pytest.mark.parametrize("way", ["whole", "inner", "file", "folder", "folder of the inner"])
def test_every_form_gives_the_same_data_set(tmp_path, published, capsys, way):
    assert prepare(NAME, tmp_path / "data", "--from", published[way]) == 0
    assert f"2 classes, 25 + 7 + {TEST} texts" in capsys.readouterr().out
    splits = load_splits(NAME, tmp_path / "data")
    parts = (splits.train, splits.val, splits.test)
    told = {said: label for part in parts for said, label in zip(part.texts, part.labels, strict=True)}
    assert told == {said: int(rating > 0) for rating, said in CLEAR}
    assert sum(len(part.labels) for part in parts) == len(CLEAR)  # none is in two parts
    assert splits.classes == ("negative", "positive")
    assert list(np.bincount(splits.test.labels)) == [TEST // 2, TEST // 2]
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        *(FOLDER, f"{NAME}.prepared.json", f".{NAME}.lock")
    }


def test_the_parts_are_the_same_on_every_machine(tmp_path, published):
    assert prepare(NAME, tmp_path / "data", "--from", published["file"]) == 0
    splits = load_splits(NAME, tmp_path / "data")
    order = [said for _, said in CLEAR]
    # Written down: scikit-learn's stratified split with the seed 233.
    assert [order.index(said) for said in splits.test.texts] == [3, 6, 14, 17, 29, 33, 34, 38]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text([*CLEAR[:-1], (4.5, "too good")]), "line 40 is no number 40, rating from -4 to 4 and sentence"),
        (text([*CLEAR[:-1], ("nan", "none")]), "line 40 is no number 40"),
        (text([*CLEAR[:-1], (1.0, " ")]), "line 40 is no number 40"),
        (text(CLEAR)[4:], "line 1 is no number, rating and sentence"),
        (text(CLEAR).replace(b"\r\n3\t", b"\r\n7\t"), "line 3 is no number 3"),
        (b"\xff" + text(CLEAR), "is damaged (UnicodeDecodeError"),
        (text(CLEAR[:20]), "is not whole: it has 16 + 4 texts"),
        (b"", "is damaged"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, monkeypatch, capsys, content, message):
    published = publish(tmp_path / "published", monkeypatch, content)
    refused(capsys, NAME, tmp_path / "data", message, "--from", published["file"])


def test_another_archive_is_refused_and_the_right_ones_are_named(tmp_path, published, capsys):
    root = tmp_path / "data"
    other = packed(tmp_path / "other.tar.gz", "x", b"x")
    refused(capsys, NAME, root, f"is no archive of {NAME}; allowed: {FOLDER}.tar.gz, {FILE}", "--from", other)
    renamed = packed(tmp_path / f"{FOLDER}.tar.gz", "x", b"x")
    refused(capsys, NAME, root, f"{FOLDER}.tar.gz", "--from", renamed)
    (tmp_path / "empty").mkdir()
    refused(capsys, NAME, root, f"lacks the file {FILE}", "--from", tmp_path / "empty")
    refused(capsys, NAME, root, "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2")

"""`prepare` on miniatures: from a server on this machine, from local archives and folders; and whatever goes wrong."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from local_server import serving
from miniatures import WNIDS, WRITERS, write, write_prepared
from publishing import TOTALS, Published, prepare, refused, totals

from classification.data import load_splits
from classification.prepare import Preparation
from experiment.files import part_of

DOWNLOADED = [name for name in WRITERS if name != "imagenet"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("experiment.download.WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Makes a data set that is published on a server of this machine."""
    with serving() as server:
        folder = tmp_path / "published"
        folder.mkdir()
        yield lambda name: Published(name, folder, server, monkeypatch)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_data_set_is_downloaded_checked_unpacked_and_noted(tmp_path, publish, capsys, name):
    published, root = publish(name), tmp_path / "data"
    assert prepare(name, root) == 0
    assert "is ready: 4 classes" in capsys.readouterr().out
    assert totals(load_splits(name, root)) == TOTALS
    assert sorted(path.name for path in root.iterdir() if path.name != ".downloads") == sorted(
        [published.source.folder, f"{name}.prepared.json", f".{name}.lock"]
    )
    assert list((root / ".downloads").iterdir()) == []
    asked = len(published.server.asked)
    assert asked == len(published.source.archives)
    assert prepare(name, root) == 0  # and then there is nothing to do
    assert len(published.server.asked) == asked
    write(name, tmp_path / "again")
    written = {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.jpg")}
    assert written == {path.relative_to(root) for path in root.rglob("*.jpg")}


def test_imagenet_is_prepared_from_its_archives(tmp_path, publish, capsys):
    published, root = publish("imagenet"), tmp_path / "data"
    assert prepare("imagenet", root, "--from", *published.archives) == 0
    splits = load_splits("imagenet", root)
    assert (splits.classes, totals(splits)) == (WNIDS, TOTALS)
    write("imagenet", tmp_path / "again")
    for part in ("train", "val"):  # each image in the folder of its class
        found, written = (
            {
                path.relative_to(folder / "imagenet"): path.read_bytes()
                for path in (folder / "imagenet" / part).rglob("*.*")
            }
            for folder in (root, tmp_path / "again")
        )
        assert found == written
    assert all(path.exists() for path in published.archives)  # the user's own files stay
    assert published.server.asked == []


def test_imagenet_says_what_to_place_where(tmp_path, publish, capsys):
    publish("imagenet")
    printed = refused(capsys, "imagenet", tmp_path / "data", "image-net.org")
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz", "--from FOLDER"):
        assert name in printed


def test_an_existing_imagenet_is_linked_to_and_left_as_it_is(tmp_path, publish):
    published = publish("imagenet")
    there = published.folder / "unpacked" / "imagenet"
    for given in (there, there.parent):
        root = tmp_path / f"data beside {given.name}"
        assert prepare("imagenet", root, "--from", given) == 0
        assert (root / "imagenet").resolve() == there
        assert totals(load_splits("imagenet", root)) == TOTALS


def test_validation_images_of_unknown_number_are_refused(tmp_path, publish, capsys):
    published = publish("imagenet")
    with tarfile.open(published.folder / "ILSVRC2012_img_val.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG"), io.BytesIO())
    published.serve()
    refused(capsys, "imagenet", tmp_path / "data", "do not fit together", "--from", published.folder)


@pytest.mark.parametrize("name", WRITERS)
def test_archives_at_hand_are_taken_and_nothing_is_downloaded(tmp_path, publish, name):
    published = publish(name)
    shutil.rmtree(published.folder / "unpacked")
    for way, given in (("files", published.archives), ("folder", [published.folder])):
        assert prepare(name, tmp_path / way, "--from", *given) == 0
        assert totals(load_splits(name, tmp_path / way)) == TOTALS
    assert published.server.asked == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_is_there_already_is_checked_and_noted(tmp_path, publish, capsys, name):
    published, root = publish(name), tmp_path / "data"
    folder = write(name, root)
    assert prepare(name, root) == 0
    assert published.server.asked == []
    assert totals(load_splits(name, root)) == TOTALS
    (root / f"{name}.prepared.json").unlink()
    some = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ""))
    next(path for path in some if path.is_file()).unlink()
    assert prepare(name, root) == 2
    printed = capsys.readouterr().err
    assert "is there already, but: " in printed
    assert not (root / f"{name}.prepared.json").exists()


def test_a_download_that_broke_off_is_resumed_by_the_next_command(tmp_path, publish, capsys):
    published, root = publish("pets"), tmp_path / "data"
    published.server.breaks = [1000, 0, 0, 0]
    refused(capsys, "pets", root, "what there is of it is kept")
    assert (root / ".downloads" / "pets" / "images.tar.gz.part").stat().st_size == 1000
    assert prepare("pets", root) == 0
    assert ("/images.tar.gz", "bytes=1000-") in published.server.asked


def test_what_a_killed_command_left_is_removed(tmp_path, publish):
    publish("pets")
    left = part_of(tmp_path / "data" / "pets") / "oxford-iiit-pet"
    other = part_of(tmp_path / "data" / "pets2")
    left.mkdir(parents=True)
    other.mkdir()
    assert prepare("pets", tmp_path / "data") == 0
    assert not left.parent.exists()
    assert other.exists()


def test_a_second_command_at_the_same_time_is_refused(tmp_path, publish, capsys):
    published, root = publish("pets"), tmp_path / "data"
    with Preparation("pets", root)._lock():
        refused(capsys, "pets", root, "another process is preparing pets")
    assert published.server.asked == []
    assert prepare("pets", root) == 0


def test_what_was_downloaded_is_not_downloaded_again(tmp_path, publish, capsys):
    published, root = publish("flowers102"), tmp_path / "data"
    whole = published.server.files.pop("/imagelabels.mat")
    refused(capsys, "flowers102", root, "404")
    published.server.files["/imagelabels.mat"] = whole
    assert prepare("flowers102", root) == 0
    asked = [path for path, _ in published.server.asked]
    assert asked.count("/102flowers.tgz") == 1


def test_another_file_than_the_published_one_is_refused(tmp_path, publish, capsys):
    published, root = publish("cifar10"), tmp_path / "data"
    whole = published.server.files["/cifar-10-python.tar.gz"]
    published.server.files["/cifar-10-python.tar.gz"] = whole[:-1] + b"?"
    refused(capsys, "cifar10", root, "damaged or another file: its md5 is")
    assert list((root / ".downloads" / "cifar10").iterdir()) == []
    (published.folder / "cifar-10-python.tar.gz").write_bytes(whole[:-1] + b"?")
    refused(capsys, "cifar10", root, "damaged or another file", "--from", published.folder)
    assert (published.folder / "cifar-10-python.tar.gz").exists()  # the user's own file is not deleted


def hostile(kind):
    """A member that no archive may have."""
    info = tarfile.TarInfo("../../outside" if kind == "a way out" else "images/zzz")
    if kind == "a link":
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize("kind", ["a way out", "a link", "a bomb", "a damaged end"])
def test_a_hostile_or_damaged_archive_leaves_nothing(tmp_path, publish, capsys, kind):
    published, root = publish("pets"), tmp_path / "data"
    path = published.folder / "images.tar.gz"
    if kind == "a damaged end":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "a bomb":
        published.expect(most_bytes=1000)
    else:
        with tarfile.open(path, "w:gz") as tar:
            tar.add(published.folder / "unpacked" / "oxford-iiit-pet" / "images", "images")
            tar.addfile(hostile(kind))
    published.serve()
    message = "is damaged" if kind == "a damaged end" else "is refused"
    refused(capsys, "pets", root, message)
    assert not list(tmp_path.rglob("outside"))
    assert not (root / "oxford-iiit-pet").exists()


@pytest.mark.parametrize("changes", [{"train": 41}, {"test": 15}, {"classes": 5}], ids=str)
@pytest.mark.parametrize("name", ["pets", "cifar100", "flowers102"])
def test_other_numbers_than_the_official_ones_are_refused(tmp_path, publish, capsys, name, changes):
    published = publish(name)
    published.expect(**changes)
    refused(capsys, name, tmp_path / "data", "40 + 16 images of 4 and 4 classes; it is to have")


def test_a_batch_of_another_content_is_refused_before_it_is_opened(tmp_path, publish, capsys):
    published = publish("cifar10")
    batch = published.folder / "unpacked" / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "executed").encode() + b"'\ntR.")
    with tarfile.open(published.folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(batch.parent, batch.parent.name)
    published.serve()
    refused(capsys, "cifar10", tmp_path / "data", "data_batch_3 is damaged or another file")
    assert not (tmp_path / "executed").exists()


def test_a_missing_list_is_refused(tmp_path, publish, capsys):
    published = publish("cub200")
    (published.folder / "unpacked" / "CUB_200_2011" / "train_test_split.txt").unlink()
    with tarfile.open(published.folder / "CUB_200_2011.tgz", "w:gz") as tar:
        tar.add(published.folder / "unpacked" / "CUB_200_2011", "CUB_200_2011")
    published.serve()
    refused(capsys, "cub200", tmp_path / "data", "train_test_split.txt")


def test_mistakes_are_one_line(tmp_path, publish, capsys):
    published = publish("pets")
    refused(capsys, "mnist", tmp_path / "data", "'mnist'; allowed: cifar10")
    refused(capsys, "digits", tmp_path / "data", "'digits'; allowed: cifar10")
    refused(capsys, "pets", tmp_path / "data", "nowhere is not there", "--from", tmp_path / "nowhere")
    refused(capsys, "pets", tmp_path / "data", "allowed: annotations.tar.gz, images.tar.gz", "--from", Path(__file__))
    (tmp_path / "file").write_text("in the way")
    assert prepare("pets", tmp_path / "file") == 2
    assert "--root" in capsys.readouterr().err
    assert published.server.asked == []


def test_a_changed_data_set_is_not_called_ready(tmp_path, publish, capsys):
    publish("pets")
    folder = write_prepared("pets", tmp_path)
    sorted((folder / "images").iterdir())[0].unlink()
    assert prepare("pets", tmp_path) == 2
    assert "delete it and run" in capsys.readouterr().err


def test_the_note_says_what_is_there(tmp_path, publish):
    publish("pets")
    assert prepare("pets", tmp_path / "data") == 0
    noted = json.loads((tmp_path / "data" / "pets.prepared.json").read_text())
    assert (noted["classes"], noted["train"], noted["val"], noted["test"]) == (4, 32, 8, 16)
    (tmp_path / "data" / "pets.prepared.json").write_text("{")
    assert prepare("pets", tmp_path / "data") == 2

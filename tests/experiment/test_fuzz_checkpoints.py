"""Checkpoints and archives damaged in any place: what they held, or the package's own error."""

import io
import tarfile
import zipfile

import pytest
import torch
from fuzzing import SECONDS, assert_told, damaged
from hypothesis import given

from experiment import ExperimentError
from experiment.archives import unpack
from experiment.checkpoints import CheckpointError, load_checkpoint, resumable, save_checkpoint

STATE = {"epoch": 3, "state_dict": {"weight": torch.arange(24.0).reshape(4, 6), "bias": torch.ones(4)}}


def saved():
    content = io.BytesIO()
    torch.save(STATE | {"lowrank_run": "mine"}, content)
    return content.getvalue()


def assert_same(content):
    assert content["epoch"] == 3
    assert all(torch.equal(content["state_dict"][name], value) for name, value in STATE["state_dict"].items())


@SECONDS
@given(content=damaged(saved()))
def test_a_damaged_checkpoint_holds_what_was_saved_or_is_refused(tmp_path, content):
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    try:
        found = load_checkpoint(path)
    except CheckpointError as error:
        assert_told(error, path)
        return
    assert_same(found)


@pytest.mark.slow
@SECONDS
@given(last=damaged(saved()))
def test_a_run_goes_on_from_what_was_saved_whatever_became_of_the_last(tmp_path_factory, last):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    save_checkpoint(STATE, folder / "previous.ckpt", "mine")
    (folder / "last.ckpt").write_bytes(last)
    found = resumable(folder, "mine", first_best=99)
    assert found is not None
    assert_same(load_checkpoint(found))


FILES = {"a.txt": b"one" * 50, "b/c.txt": bytes(range(256))}


def packed(kind):
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as archive:
            for name, inside in FILES.items():
                archive.writestr(name, inside)
    else:
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            for name, inside in FILES.items():
                member = tarfile.TarInfo(name)
                member.size = len(inside)
                archive.addfile(member, io.BytesIO(inside))
    return content.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@SECONDS
@given(seed=damaged(bytes(400)), place=damaged(bytes(3)))
def test_a_damaged_archive_is_unpacked_as_it_was_or_refused(tmp_path_factory, kind, seed, place):
    root = tmp_path_factory.mktemp("archive")
    good = packed(kind)
    mask = (seed + bytes(len(good)))[: len(good)]
    shift = sum(place) % len(good)
    mask = mask[shift:] + mask[:shift]
    path = root / f"archive.{kind}"
    path.write_bytes(bytes(one ^ other for one, other in zip(good, mask, strict=True)))
    try:
        unpack(path, root / "inside", 10_000)
    except ExperimentError as error:
        assert_told(error, path.name)
    inside = [found for found in root.rglob("*") if found.is_file() and found != path]
    assert all((root / "inside") in found.parents for found in inside)
    assert all(found.stat().st_size <= 10_000 for found in inside)

"""Tensors that are made once and read by all."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from experiment import shared_tensors as module
from experiment.shared_tensors import shared_tensors


def content():
    return {"train": [torch.arange(6.0).reshape(2, 3), torch.tensor([1, 0])], "val": []}


def never():
    raise AssertionError("it was made again")


def assert_same(found):
    assert found.keys() == content().keys()
    for name, tensors in content().items():
        assert all(torch.equal(a, b) for a, b in zip(found[name], tensors, strict=True))


def test_what_was_made_once_is_read(tmp_path):
    path = tmp_path / "fronts" / "x.pt"
    assert_same(shared_tensors(path, content))
    lock = path.with_name(".x.pt.lock")
    lock.unlink()
    lock.mkdir()  # stands for a folder in which nothing can be written
    assert_same(shared_tensors(path, never))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: b"", lambda data: data.replace(b"@", b"A", 1)]
)
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    path = tmp_path / "x.pt"
    shared_tensors(path, content)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    assert_same(shared_tensors(path, content))
    assert_same(shared_tensors(path, never))


def test_where_it_cannot_be_written_it_is_kept_with_a_word(tmp_path, capsys, monkeypatch):
    def full(*words):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.pt"
    with monkeypatch.context() as patch:
        patch.setattr(module, "whole", full)
        assert_same(shared_tensors(path, content))
    assert "x.pt cannot be written (No space left on device), so it is kept in memory" in capsys.readouterr().out
    assert not path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "file_lock", full)
        assert_same(shared_tensors(path, content))


def make_and_note(path):
    def make():
        with path.with_name("made").open("a") as file:
            file.write("x")
        return content()

    assert_same(shared_tensors(path, make))


@pytest.mark.slow
def test_of_processes_that_come_at_once_one_makes_it(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make_and_note, args=(tmp_path / "x.pt",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "made").read_text() == "x"

"""Tensors that several runs need and that take long to make: made once, and read from a file by all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiment.checkpoints import damage_of, disk_error
from experiment.files import file_lock, whole
from experiment.signals import held

Content = dict[str, list[Tensor]]


def shared_tensors(path: Path, make: Callable[[], Content]) -> Content:
    """The tensors in a file, mapped into memory; made and written by the first process that needs them.

    Other processes wait for it. A file that is damaged is made anew. Where none can be written, which is said, the
    tensors are in the memory of this process alone.

    Args:
        path: the file; its name holds a hash of all that its content depends on.
        make: makes the content.
    """
    with contextlib.ExitStack() as stack:
        if _is_whole(path):  # also where nothing can be written
            return _read(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(path))
        except OSError as error:
            return _kept(make(), path, error)
        if not _is_whole(path):
            content = make()
            problem = _written(content, path)
            if problem is not None:
                return _kept(content, path, problem)
    return _read(path)


def _read(path: Path) -> Content:
    content: Content = torch.load(path, mmap=True, weights_only=True)
    return content


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        return damage_of(file) is None


def _written(content: Content, path: Path) -> OSError | None:
    """What kept the content from being written, None if nothing did."""
    try:
        with held(), whole(path) as file:
            torch.save(content, file)
    except Exception as error:  # torch's writer raises its own over the disk's
        cause = disk_error(error)
        if cause is None:
            raise
        return cause
    return None


def _kept(content: Content, path: Path, error: OSError) -> Content:
    print(f"  {path} cannot be written ({error.strerror or error}), so it is kept in memory", flush=True)
    return content

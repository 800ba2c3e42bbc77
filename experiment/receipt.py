"""A note beside a run's result of the very command that led to it: a sweep that is run again need not load anything.

It holds hashes of the command, of the files that this names and of what configs among them are based on, of those that
hold the code of the run's method and model, and of the result. What a command does not name, such as images, is not
looked at; the command of the single run does that.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiment.files import write_whole
from experiment.record import RESULT
from experiment.sources import load_sources

RECEIPT = ".done_by"
_LARGE = 2**22  # bytes, from which on a file counts by its size and time


def write_receipt(result: Path, arguments: Sequence[str]) -> None:
    """Note by which command a result was made, where the folder can be written."""
    with contextlib.suppress(OSError):
        write_whole(result.with_name(RECEIPT), _hash(result, arguments))


def has_receipt(result: Path, arguments: Sequence[str]) -> bool:
    """Whether a result was made by this very command, and nothing that it names has changed since."""
    try:
        return result.with_name(RECEIPT).read_text(encoding="utf-8") == _hash(result, arguments)
    except (OSError, ValueError):
        return False


def _hash(result: Path, arguments: Sequence[str]) -> str:
    stated = [_content(str(result)), *arguments, *_contents(arguments)]
    stated += [_content(source["file"]) for source in load_sources(result.parent).values()]
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()


def _contents(arguments: Sequence[str]) -> Iterator[str]:
    """Of each file that is named, of those that it is based on, and of the result in each folder of a run."""
    for word in arguments:
        name = word.partition("=")[2] if word.startswith("--") else word
        if name:
            yield from map(_content, _with_bases(name))
            yield _content(f"{name}/{RESULT}")


def _with_bases(name: str) -> list[str]:
    """A file's name, and, of a config of MMEngine, the names of all that it is based on."""
    found = {name: None}
    left = [name]
    while left:
        path = Path(left.pop())
        if path.suffix == ".py" and path.is_file():
            at = path.stat()
            new = [base for base in _bases(str(path), at.st_size, at.st_mtime_ns) if base not in found]
            found |= dict.fromkeys(new)
            left += new
    return list(found)


@functools.lru_cache(maxsize=4096)
def _bases(name: str, size: int, changed: int) -> tuple[str, ...]:
    """The files that a config's `_base_` names; that of another package is as its version is."""
    try:
        lines = ast.parse(Path(name).read_text(encoding="utf-8")).body
        values = [
            ast.literal_eval(line.value)
            for line in lines
            if isinstance(line, ast.Assign) and any(ast.unparse(target) == "_base_" for target in line.targets)
        ]
    except (OSError, ValueError, SyntaxError):
        return ()  # it is no config, and its content counts in any case
    named = [one for value in values for one in ([value] if isinstance(value, str) else value)]
    return tuple(str(Path(name).parent / one) for one in named if "::" not in one)


def _content(name: str) -> str:
    try:
        found = Path(name).stat()
    except (OSError, ValueError):
        return ""
    return _read(name, found.st_size, found.st_mtime_ns) if Path(name).is_file() else ""


@functools.lru_cache(maxsize=4096)
def _read(name: str, size: int, changed: int) -> str:
    if size >= _LARGE:
        return f"{size} {changed}"
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()

"""Config files read once more, strictly: what YAML lets pass and no one means is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from experiment import ExperimentError

MOST_BYTES, DEEPEST = 2**20, 50
_OPTIONS = ("--config", "-c")


def check_config_files(arguments: Sequence[str]) -> None:
    """Check every file that arguments name as a config; what is not there or no YAML is left to the parser.

    Raises:
        ExperimentError: a file is no text, holds a key twice, refers to itself, or is nested beyond reason.
    """
    for path in _named(arguments):
        if path.is_file():
            _check(path)


def _named(arguments: Sequence[str]) -> Iterator[Path]:
    for word, following in pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name in _OPTIONS and (equals or following):
            yield Path(value if equals else following)


def _check(path: Path) -> None:
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            raise ExperimentError(f"config {path} has {len(content)} bytes; allowed are {MOST_BYTES}")
        text = content.decode()
    except OSError as error:
        raise ExperimentError(f"config {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ExperimentError(f"config {path} is no UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        _check_events(text, path)
    except yaml.YAMLError:
        return  # the parser says what is wrong


def _check_events(text: str, path: Path) -> None:
    open_blocks: list[set[str] | None] = []  # the keys of each mapping, None for a list
    is_key: list[bool] = []
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ExperimentError(f"config {path} has the alias *{event.anchor}; write out what it stands for")
        if isinstance(event, yaml.CollectionEndEvent):
            open_blocks.pop()
            is_key.pop()
        if isinstance(event, yaml.ScalarEvent) and open_blocks and is_key[-1]:
            keys = open_blocks[-1]
            assert keys is not None
            if event.value in keys:
                line = event.start_mark.line + 1
                raise ExperimentError(f"config {path} has the key {event.value!r} twice, again in line {line}")
            keys.add(event.value)
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionEndEvent) and open_blocks:
            is_key[-1] = open_blocks[-1] is not None and not is_key[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            open_blocks.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            is_key.append(isinstance(event, yaml.MappingStartEvent))
        if len(open_blocks) > DEEPEST:
            raise ExperimentError(f"config {path} is nested more than {DEEPEST} deep")

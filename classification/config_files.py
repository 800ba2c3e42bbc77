"""What a command line gives as YAML, checked before the parser sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from experiment import ExperimentError
from experiment.strict_yaml import check_yaml, check_yaml_file, misread_number

_CONFIG = ("--config", "-c")
_TEXTS = ("--trainer.max_time",)  # options of times, whose values may look like numbers


def check_config_files(arguments: Sequence[str]) -> None:
    """Check every file that arguments name as a config, and every value in them that is YAML.

    What is not there or no YAML is left to the parser.

    Raises:
        ExperimentError: see `experiment.strict_yaml`.
    """
    for name, value in _options(arguments):
        path = Path(value)
        if name in _CONFIG:
            if path.is_file():
                check_yaml_file(path)
            continue
        misread = misread_number(value) if ":" in value and name not in _TEXTS else None  # 010 is 10 here
        if misread is not None:
            raise ExperimentError(f"{name} is {value}, which would be read as {misread}; write it in base ten")
        if value.lstrip().startswith(("{", "[")):
            check_yaml(value, name)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values."""
    for word, following in pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("-") and (equals or following):
            yield name, value if equals else following

"""What a command line gives as YAML, checked before the parser sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from experiment import ExperimentError
from experiment.command import dashed
from experiment.strict_yaml import check_settings_file, check_yaml, misread_number

GROUPS = {"model": "layers", "data": "dataset", "trainer": "max_epochs"}  # of settings, and one of each
# Settings that are what others are, which a parser sets over what a config says of them.
LINKED = {
    "data.shuffle_seed": "seed_everything",
    "model.rank_seed": "seed_everything",
    "model.num_classes": "data.num_classes",
}
AS_LINKED = "is what {} is, whatever is given; leave it out"
_CONFIG = ("--config", "-c")
_TEXTS = ("--trainer.max_time",)  # options of times, whose values may look like numbers


def check_config_files(arguments: Sequence[str]) -> None:
    """Check every file that arguments name as a config, and every value in them that is YAML.

    What an option has that is no YAML is left to the parser.

    Raises:
        ExperimentError: see `experiment.strict_yaml`.
    """
    for name, value in _options(arguments):
        if name in _CONFIG:
            _check_config(value)
        else:
            _check_value(name, value)
        for key, given, shown in _given(name, value):
            if key in LINKED and given is not None:
                raise ExperimentError(f"{shown} {AS_LINKED.format(LINKED[key])}")


def _check_value(name: str, value: str) -> None:
    """Check what an option has that is no config."""
    misread = misread_number(value) if ":" in value and name not in _TEXTS else None  # 010 is 10 here
    if misread is not None:
        raise ExperimentError(f"{name} is {value}, which would be read as {misread}; write it in base ten")
    if value.lstrip().startswith(("{", "[")):
        check_yaml(value, name)


def _check_config(name: str) -> None:
    """Check what is given as a config: a file, or settings as a text in its place."""
    path = Path(name)
    if path.is_file():
        check_settings_file(path)
    elif ":" not in name or path.exists():
        what = "is a folder" if name and path.is_dir() else "is not there"
        raise ExperimentError(
            f"config {name or repr(name)} {what}; give a file of settings, such as those in configs/classification"
        )
    settings = _settings(name, is_config=True)
    for group in GROUPS if isinstance(settings, Mapping) else ():
        if group in settings and not isinstance(settings[group], Mapping):
            raise ExperimentError(
                f"config {name} has {settings[group]!r} as `{group}`; it has to hold settings by name, such as "
                f"{GROUPS[group]}: ..."
            )


def settings_in(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every setting that arguments give within a config, or within an option that is a group of settings.

    Yields:
        the setting as the option with dashes that it stands for, and as an error names it.

    Raises:
        ExperimentError: a config that cannot be read.
    """
    check_config_files(arguments)
    for name, value in _options(arguments):
        for key, _, shown in _given(name, value):
            yield dashed([f"--{key}"])[0], shown


def _given(name: str, value: str) -> Iterator[tuple[str, Any, str]]:
    """What a config or a group of settings sets: full names, values, and how errors name each."""
    prefix = "" if name in _CONFIG else name.removeprefix("--")
    for key, given in _pairs(_settings(value, name in _CONFIG), prefix):
        yield key, given, f"{key} in {name} {value}"


def _settings(value: str, is_config: bool) -> Any:
    """What a value holds as YAML: in place, or in the file of this name."""
    try:
        is_file = (is_config or Path(value).suffix in (".yaml", ".yml", ".json")) and Path(value).is_file()
        return yaml.safe_load(Path(value).read_text(encoding="utf-8") if is_file else value)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None  # no settings, or the parser says what is wrong


def _pairs(content: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """All settings in a mapping by their full names, such as "model.method.class_path"."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            name = f"{prefix}.{key}".removeprefix(".")
            yield name, value
            yield from _pairs(value, name)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values."""
    for word, following in zip_longest(arguments, arguments[1:]):
        name, equals, value = word.partition("=")
        if name.startswith("-") and (equals or following is not None):
            yield name, value if equals else following

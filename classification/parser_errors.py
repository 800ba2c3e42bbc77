"""What the parser says of a setting that it refuses, as one line: which, what it is, and what is allowed."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from argparse import ArgumentError
from collections.abc import Sequence

from classification.config_files import AS_LINKED, settings_in
from experiment import ExperimentError
from experiment.command import dashed

_KEY = re.compile(r'\s*Parser key "([^"]+)":\s*(.*)', re.DOTALL)
_UNKNOWN = re.compile(r"Subcommand '(\w+)' does not accept option '([^']+)'")
_LINKED = re.compile(r'argument (\S+) --> ([^\s:]+):|Linked "([^"]+)" must be given via "([^"]+)"')
_CLASS = re.compile(r"^( *)- Problem with given class_path '([^']+)':\n((?:\1   .*(?:\n|$))+)", re.MULTILINE)
_EXPECTED = re.compile(
    r"Expected an? (<class '[^']+'>|typing\.Literal\[[^]]*\]|dot import path|tuple with \d+ elements)"
)
_VALUE = re.compile(r"(?:Given|Got) value: (.*?)\s*\Z", re.DOTALL)
_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true, false",
    "<class 'str'>": "a text",
    "<class 'NoneType'>": "null",
    "<class 'list'>": "a list",
    "<class 'tuple'>": "a list such as [1, 2]",
    "<class 'collections.abc.Iterable'>": "a list",
    "dot import path": "a class by its path, such as module.Name",
}


def readable(error: ArgumentError, arguments: Sequence[str]) -> str:
    """A line for an error of the parser of a command with these arguments; the parser's own where it is no setting's.

    Where a config has set it, the line names that.
    """
    unknown = _UNKNOWN.fullmatch(str(error))
    if unknown is not None:
        command, key = unknown.groups()
        return f"{_shown(key, arguments)}: {command} has no such setting; see python -m classification {command} --help"
    linked = _LINKED.search(str(error))
    if linked is not None:
        return f"{_shown(linked[2] or linked[3], arguments)} {AS_LINKED.format(linked[1] or linked[4])}"
    found = _KEY.match(str(error))
    if found is None:
        return " ".join(str(error).split())
    key, problem = found.groups()
    return _told(key, problem, _shown(key, arguments))


def _shown(key: str, arguments: Sequence[str]) -> str:
    """A setting as the user has it: an option, or a key in a config, where no option sets it."""
    option = dashed([f"--{key}"])[0]
    if any(f"{word.partition('=')[0].rstrip('+')}.".startswith(f"{option}.") for word in dashed(arguments)):
        return f"--{key}"
    try:
        return [shown for setting, shown in settings_in(arguments) if setting == option][-1]
    except (IndexError, ExperimentError):
        return f"--{key}"


def _told(key: str, problem: str, shown: str) -> str:
    inner = _CLASS.search(problem)
    if inner is not None:
        return _of_class(key, inner[2], textwrap.dedent(inner[3]), shown)
    kinds = list(dict.fromkeys(_allowed(kind) for kind in _EXPECTED.findall(problem)))
    if "Import path does not correspond" in problem:
        kinds.insert(0, f"a class that is a {problem.partition('subclass of ')[2].split()[0]}")
    value = _VALUE.search(problem)
    if not kinds or value is None:
        return f"{shown}: {' '.join(problem.split())}"
    return f"{shown} is {' '.join(value[1].split()) or 'empty'}; allowed: {' or '.join(kinds)}"


def _of_class(key: str, path: str, problem: str, shown: str) -> str:
    """What is wrong with a class that a setting names, or with one of its own settings."""
    setting = _KEY.match(problem)
    if setting is not None:
        name = f"{key}.{setting[1]}"
        return _told(name, setting[2], f"--{name}" if shown == f"--{key}" else f"{setting[1]} of {shown}")
    unknown = re.match(r"Option '([^']+)' is not accepted", problem)
    if unknown is not None:
        return f"{shown}: {path} has no setting {unknown[1]!r}; allowed: {', '.join(_settings_of(path)) or 'none'}"
    missing = re.match(r"the following arguments are required: (.*)", problem)
    if missing is not None:
        return (
            f"{shown}: {path} needs {missing[1]}, as --{key}.{missing[1].split(',')[0]} or in `init_args` of a config"
        )
    return f"{shown} is {path}, which is not to be had: {' '.join(problem.split())}"


def _settings_of(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def _allowed(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        return ", ".join(re.findall(r"[^\s',]+", kind.partition("[")[2][:-1]))
    if kind.startswith("tuple with"):
        return kind.replace("tuple with", "a list of")
    return _KINDS.get(kind, kind.removeprefix("<class '").removesuffix("'>"))

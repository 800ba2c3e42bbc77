"""YAML read strictly: what it lets pass and no one means is refused in one line, before a parser sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from experiment.errors import ExperimentError

MOST_BYTES, DEEPEST, MOST_VALUES = 2**20, 50, 10**5
_NUMBER_OF_60 = re.compile(r"[-+]?[1-9][\d_]*(:[0-5]?\d)+(\.[\d_]*)?")  # YAML 1.1: 1:30 is 90
_OCTAL = re.compile(r"[-+]?0[0-7_]+")  # YAML 1.1: 0100 is 64


def check_yaml_file(path: Path, aliases: bool = False) -> None:
    """Check a file.

    Args:
        path: the file.
        aliases: a value may be named and be put in several places, as long as that makes no more than `MOST_VALUES`.

    Raises:
        ExperimentError: it cannot be read, is no text or no YAML, holds a key twice, refers to itself, is
            nested beyond reason, or has a number that YAML reads in another base than ten.
    """
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
        _Checks(f"config {path}", aliases).every(text)
    except RecursionError:
        return  # the parser says what is wrong
    except yaml.YAMLError as error:
        raise ExperimentError(f"config {path} is no YAML: {_what_is_wrong(error)}") from None


def _what_is_wrong(error: yaml.YAMLError) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}; mend it there or ahead of it"


def check_settings_file(path: Path) -> None:
    """Check a file that has to hold settings by name; what else is YAML, parsers leave out or say nothing clear of.

    Raises:
        ExperimentError: as of `check_yaml_file`, or it holds something else.
    """
    check_yaml_file(path)
    documents = list(yaml.compose_all(path.read_text(encoding="utf-8"), yaml.SafeLoader))
    found = documents[0] if documents else None
    if len(documents) > 1:
        held = f"several documents, the second from line {documents[1].start_mark.line + 1} on"
    elif found is None or found.tag.endswith(":null"):
        held = "nothing"
    elif isinstance(found, yaml.MappingNode):
        wrong = _no_name(found, by_text=True)
        if wrong is None:
            return
        held = f"a key that is no name in line {wrong}"
    else:
        held = "a list" if isinstance(found, yaml.SequenceNode) else f"the value {found.value[:50]!r} alone"
    raise ExperimentError(f"config {path} holds {held}; it has to hold settings by name, such as those beside it")


def _no_name(node: yaml.Node, by_text: bool = False) -> int | None:
    """The line of a key that is a list or a mapping, or with `by_text` no text; None if there is none."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or (by_text and not key.tag.endswith(":str")):
                return int(key.start_mark.line) + 1
            if (wrong := _no_name(value)) is not None:
                return wrong
    inner = node.value if isinstance(node, yaml.SequenceNode) else ()
    return next((wrong for value in inner if (wrong := _no_name(value)) is not None), None)


def check_yaml(text: str, where: str, aliases: bool = False) -> None:
    """Check a text; see `check_yaml_file`. `where` says in an error what it is. What is no YAML may be plain text."""
    try:
        _Checks(where, aliases).every(text)
    except (yaml.YAMLError, RecursionError):
        return  # the parser says what is wrong


def misread_number(text: str) -> str | None:
    """What is wrong with a word that YAML 1.1 takes for a number of another base; None if nothing is."""
    if _NUMBER_OF_60.fullmatch(text):
        return "a number to the base of 60"
    return "a number to the base of 8" if _OCTAL.fullmatch(text) else None


@dataclass
class _Block:
    """A mapping or a list that is being read: its keys, None of a list; how many values it stands for; its name."""

    keys: set[str] | None
    name: str | None
    values: int = 1
    is_key: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_key = self.keys is not None


@dataclass
class _Checks:
    where: str
    aliases: bool
    open: list[_Block] = field(default_factory=list)
    named: dict[str, int] = field(default_factory=dict)  # how many values each stands for

    def every(self, text: str) -> None:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                self.alias(event)
            elif isinstance(event, yaml.ScalarEvent):
                self.scalar(event)
            elif isinstance(event, yaml.CollectionStartEvent):
                self.begin(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                block = self.open.pop()
                self.value(block.values, block.name)

    def begin(self, event: yaml.CollectionStartEvent) -> None:
        self.open.append(_Block(set() if isinstance(event, yaml.MappingStartEvent) else None, event.anchor))
        if len(self.open) > DEEPEST:
            raise ExperimentError(f"{self.where} is nested more than {DEEPEST} deep")

    def alias(self, event: yaml.AliasEvent) -> None:
        if not self.aliases:
            raise ExperimentError(f"{self.where} has the alias *{event.anchor}; write out what it stands for")
        if event.anchor not in self.named:
            raise ExperimentError(f"{self.where} has the alias *{event.anchor} of a value that holds it, or of none")
        self.value(self.named[event.anchor])

    def scalar(self, event: yaml.ScalarEvent) -> None:
        line = event.start_mark.line + 1
        misread = misread_number(event.value) if event.implicit[0] else None
        if misread is not None:
            raise ExperimentError(
                f"{self.where} has {event.value} in line {line}, which YAML takes for {misread}; write it in base ten, "
                f"or in quotes if it is a text"
            )
        block = self.open[-1] if self.open else None
        if block is not None and block.is_key:
            assert block.keys is not None
            if event.value in block.keys:
                raise ExperimentError(f"{self.where} has the key {event.value!r} twice, again in line {line}")
            block.keys.add(event.value)
        self.value(1, event.anchor)

    def value(self, count: int, name: str | None = None) -> None:
        """One key or value is at its end, which stands for this many."""
        if name is not None:
            self.named[name] = count
        if count > MOST_VALUES:
            raise ExperimentError(f"{self.where} stands for more than {MOST_VALUES} values, by aliases in aliases")
        if self.open:
            block = self.open[-1]
            block.values += count
            block.is_key = block.keys is not None and not block.is_key

"""Things that are found by name: each module of a package registers its own."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Generic, TypeVar

from experiment import ExperimentError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name.

    Args:
        kind: what an entry is, for messages.
        package: its modules are imported before the first look-up, so that all of them have registered.
    """

    def __init__(self, kind: str, package: ModuleType) -> None:
        self.kind, self.package = kind, package
        self.entries: dict[str, Entry] = {}

    def __call__(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that registers an entry under a name."""

        def register(entry: Entry) -> Entry:
            self.entries[name] = entry
            return entry

        return register

    def names(self) -> list[str]:
        """All names, sorted."""
        for module in pkgutil.iter_modules(self.package.__path__):
            importlib.import_module(f"{self.package.__name__}.{module.name}")
        return sorted(self.entries)

    def find(self, name: str) -> Entry:
        """The entry of this name.

        Raises:
            ExperimentError: there is none; names those that there are.
        """
        names = self.names()
        if name not in names:
            raise ExperimentError(f"there is no {self.kind} {name!r}; allowed: {', '.join(names)}")
        return self.entries[name]

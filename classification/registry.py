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
        """Decorator that registers an entry under a name.

        Raises:
            ExperimentError: another module has registered the name, so that a run of that name would be one of either.
        """

        def register(entry: Entry) -> Entry:
            first, own = (getattr(one, "__module__", None) for one in (self.entries.get(name) or entry, entry))
            if first != own:
                raise ExperimentError(f"the {self.kind} {name!r} is in {first} and in {own}; rename one of them")
            self.entries[name] = entry
            return entry

        return register

    def names(self) -> list[str]:
        """All names, sorted.

        Raises:
            ExperimentError: a module of the package cannot be imported, as one of the user's own.
        """
        for module in pkgutil.iter_modules(self.package.__path__):
            name = f"{self.package.__name__}.{module.name}"
            try:
                importlib.import_module(name)
            except ExperimentError:
                raise
            except Exception as error:  # a module is code, which may fail in any way
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise ExperimentError(
                    f"{name}, whose {self.kind} is found by name, cannot be imported ({reason}); "
                    f"mend it, or remove its file"
                ) from error
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

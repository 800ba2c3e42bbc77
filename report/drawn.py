"""Figures that are there already: one that would show the same is not drawn again, which takes most of the time."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from experiment import axes, fingerprint
from report.summary import Group

NOTES = ".figures.json"  # in the folder of all outputs: what each figure was drawn of, and what its files held
_CODE = (*sorted(Path(__file__).parent.glob("*.py")), Path(axes.__file__))  # that draws


class Figures:
    """The figures of a report.

    Args:
        output: folder of all outputs.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._known = _read(output / NOTES)
        self._code = fingerprint([*(path.read_bytes() for path in _CODE), version("matplotlib").encode()])
        self._notes: dict[str, dict[str, str]] = {}

    def of(
        self, path: PurePath, draw: Callable[..., dict[str, bytes]], table: pd.DataFrame, group: Group, *more: Any
    ) -> dict[str, bytes]:
        """The files of a figure by ending, as `draw(table, group, *more)` gives them.

        Args:
            path: of the files without their ending, relative to the folder of all outputs.
            draw: gives the same bytes for the same arguments.
            table: what it shows, with
            group: what that is about, and
            more: what else it shows, told by its `repr`.
        """
        told = (draw.__name__, table.to_csv(), repr((group, more)))
        shown = fingerprint(text.encode() for text in (self._code, *told))
        files = self._there(path, shown) or draw(table, group, *more)
        self._notes[str(path)] = {"of": shown, **{ending: fingerprint([content]) for ending, content in files.items()}}
        return files

    def _there(self, path: PurePath, shown: str) -> dict[str, bytes]:
        """The files of before, if they were drawn of the same and are what they were."""
        known = dict(self._known.get(str(path), {}))
        if known.pop("of", None) != shown:
            return {}
        try:
            files = {ending: (self._output / f"{path}.{ending}").read_bytes() for ending in known}
        except (OSError, ValueError):
            return {}
        return files if all(fingerprint([content]) == known[ending] for ending, content in files.items()) else {}

    @property
    def notes(self) -> dict[Path, bytes]:
        """The file to write beside the figures."""
        return {self._output / NOTES: json.dumps(self._notes, indent=1).encode()}


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): {str(name): str(text) for name, text in value.items()} for key, value in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError):  # then all are drawn
        return {}

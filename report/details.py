"""What is shown of one run alone: its curves, ranks, memory by module, recipe, provenance, config and log."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.folder import CONFIG
from experiment.history import METRICS
from experiment.jobs import FAILURE
from experiment.record import MEMORY, RANKS, Record

POINTS, MODULES, TEXT = 200, 60, 16_000  # at most: of a curve, of memory by module, letters of a config or a log


def details(folder: Path, record: Record | None = None) -> dict[str, Any]:
    """What a run's folder holds, as JSON; without what is not there, as in runs of before it was left.

    Args:
        folder: of the run; need not exist.
        record: of the run, if it is finished.
    """
    found: dict[str, Any] = {
        "curves": _curves(folder / METRICS),
        "ranks": _ranks(folder / RANKS),
        "memory": _memory(folder / MEMORY),
        "config": _text(folder / CONFIG),
        "log": _text(folder / FAILURE, end=True),
    }
    if record is not None:
        parts = ("accuracy", "memory_bytes", "flops", "time_s", "recipe", "provenance")
        found |= {part: getattr(record, part) for part in parts}
    return {name: content for name, content in found.items() if content}


def _curves(path: Path) -> dict[str, Any] | None:
    """Columns by name, of at most `POINTS` rows; the last row is among them."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        step = -(-len(rows) // POINTS) or 1
        thinned = rows[::-1][::step][::-1]
        return {name: [float(row[place]) for row in thinned] for place, name in enumerate(names)} if rows else None
    except (OSError, ValueError, IndexError, csv.Error):
        return None


def _json(path: Path, key: str) -> list[Any] | None:
    """A list in a file; None where that is missing, damaged, or of another form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    rows = content.get(key) if isinstance(content, Mapping) else None
    return rows if isinstance(rows, list) else None


def _ranks(path: Path) -> list[Any] | None:
    rows = _json(path, "layers")
    return rows if rows is not None and all(isinstance(row, Mapping) for row in rows) else None


def _memory(path: Path) -> list[Any] | None:
    rows = _json(path, "module/kind/bytes/reason")
    if rows is None or not all(isinstance(row, list) and len(row) == 4 and type(row[2]) is int for row in rows):
        return None
    further = rows[MODULES:]
    rest = [[f"{len(further)} further modules", "", sum(row[2] for row in further), ""]] if further else []
    return [row for row in rows[:MODULES] if row[2]] + rest


def _text(path: Path, end: bool = False) -> str | None:
    """A file's text, cut to `TEXT` letters: its beginning, or its end."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if end and size > TEXT:
                file.seek(size - TEXT)
            text = file.read(TEXT).decode("utf-8", errors="replace")
    except OSError:
        return None
    cut = "" if size <= TEXT else f"({size - TEXT} further bytes in {path.name})"
    return "\n".join([cut, text] if end else [text, cut]).strip()

"""Which files hold the code of a run's method, model and what else is one's own, and whether they are what they were.

`code_version` in a record is of the whole suite, and another after each of its changes, so that it refuses no run; nor
do the methods that the library itself exports, which change with it. Any other method, the model, callbacks and
what a config of MMEngine names may be anybody's code: of each its own file counts, byte by byte.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiment.errors import ExperimentError
from experiment.files import write_whole
from experiment.method import method_class
from experiment.provenance import fingerprint

SOURCES = "sources.json"  # in a run's folder
Sources = Mapping[str, Mapping[str, str]]  # by what is defined, such as "method my_package.Mine": "file" and "hash"


def source_of(defined: Any) -> dict[str, str]:
    """File and hash of what defines a class or a function; empty where there is no file."""
    try:
        name = inspect.getsourcefile(inspect.unwrap(defined))
        return {"file": str(name), "hash": fingerprint([Path(str(name)).read_bytes()])}
    except (OSError, TypeError):
        return {}


def method_sources(identity: Any) -> dict[str, dict[str, str]]:
    """Those of the methods that a run's identity names, as either task has them, but for the library's own."""
    classes = {name: method_class(name) for name in _method_names(identity)}
    found = {f"method {name}": source_of(own) for name, own in classes.items() if not _is_exported(own)}
    return {what: source for what, source in found.items() if source}


def _is_exported(defined: Any) -> bool:
    import lowrank  # which what has its class has imported; not ahead of a command's help

    return getattr(lowrank, getattr(defined, "__name__", ""), None) is defined


def _method_names(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _method_names(inner)
    elif isinstance(value, Mapping):
        method = value.get("method")
        if isinstance(method, Mapping) and isinstance(name := method.get("class_path", method.get("type")), str):
            yield name
        for key, inner in value.items():
            yield from _method_names(inner) if key != "method" else ()


def save_sources(folder: Path, sources: Sources) -> None:
    """Note in a run's folder by which code it is done."""
    write_whole(folder / SOURCES, json.dumps(sources, indent=1, sort_keys=True) + "\n")


def load_sources(folder: Path) -> dict[str, dict[str, str]]:
    """What `save_sources` noted; empty of runs of before it did, and where that is damaged."""
    try:
        content = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
        return {str(what): {key: str(source[key]) for key in ("file", "hash")} for what, source in content.items()}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return {}


def require_same(folder: Path, sources: Sources, advice: str) -> None:
    """Refuse a run's folder that was made by other code, as far as it has noted which; `advice` says what else to do.

    Raises:
        ExperimentError: see above.
    """
    there = load_sources(folder)
    for what, source in sources.items():
        if what in there and there[what]["hash"] != source["hash"]:
            raise ExperimentError(
                f"{folder} holds a run of other code: the file of the {what} has changed since ({source['file']}, "
                f"fingerprint {there[what]['hash']} there, {source['hash']} here); restore the file, or {advice}"
            )

"""Which code of one's own a config names: classes and functions that are registered with MMEngine, or given by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mmengine.registry as roots
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

from experiment.sources import source_of

# Packages whose code is told by their versions, and the suite's own, which records name as a whole.
_TOLD = {"mmengine", "mmcv", "mmseg", "torch", "torchvision", "segmentation", "lowrank"}


def own_sources(identity: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Files and hashes of all code of one's own that a run's identity names, whatever it is: networks, losses, data
    sets, transforms, hooks, metrics; see `experiment.sources`."""
    found = {}
    for name in dict.fromkeys(_types(identity)):
        for kind, own in _called(name):
            if str(getattr(own, "__module__", "")).partition(".")[0] not in _TOLD and (source := source_of(own)):
                found[f"{kind} {getattr(own, '__name__', name)}"] = source
    return found


def _types(value: Any) -> Iterator[Any]:
    """Every `type` in nested settings but those of methods, which `experiment.sources` knows."""
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _types(inner)
    elif isinstance(value, Mapping):
        if "type" in value:
            yield value["type"]
        for key, inner in value.items():
            yield from _types(inner) if key != "method" else ()


def _called(name: Any) -> Iterator[tuple[str, Any]]:
    """What a type may stand for, each with what it is."""
    if not isinstance(name, str):  # the class itself
        yield "code of", name
        return
    known = False
    for root in [one for one in vars(roots).values() if isinstance(one, Registry)]:
        for registry in _below(root):
            if (own := registry.module_dict.get(name.rpartition(".")[2])) is not None:
                known = True
                yield root.name, own
    if not known and "." in name:
        try:
            yield "code of", get_object_from_string(name)
        except Exception:  # whoever builds it says what is wrong
            return


def _below(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _below(child)

"""The one registry of backbones."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from torch import nn

import classification.backbones as package
from classification.backbones.weights import load_weights
from experiment import ExperimentError

Builder = Callable[[int, bool], nn.Module]
_BUILDERS: dict[str, Builder] = {}


def backbone(name: str) -> Callable[[Builder], Builder]:
    """Register a builder `(num_classes, pretrained) -> module` under a name."""

    def register(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return register


def _builders() -> dict[str, Builder]:
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _BUILDERS


def names() -> list[str]:
    """Names of all backbones."""
    return sorted(_builders())


def build_model(name: str, num_classes: int = 1000, pretrained: bool = False, weights: str | None = None) -> nn.Module:
    """Build a network for images (B, 3, H, W) that returns logits (B, num_classes).

    Args:
        name: one of `names()`.
        num_classes: size of the classifier; with ImageNet weights of another size it is new and random.
        pretrained: load the published ImageNet weights; downloads them unless they are in torch's cache.
        weights: a local file to load instead: a state dict of this network, or a checkpoint of this suite.

    Raises:
        ExperimentError: unknown name, no such weights, or weights that do not fit.
    """
    builders = _builders()
    if name not in builders:
        raise ExperimentError(f"there is no backbone {name!r}; allowed: {', '.join(sorted(builders))}")
    if weights is not None:
        return load_weights(builders[name](num_classes, False), weights)
    return builders[name](num_classes, pretrained)

"""The one registry of backbones."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import classification.backbones as package
from classification.backbones.weights import load_weights
from classification.registry import Registry
from experiment.sources import source_of

Builder = Callable[[int, bool], nn.Module]
backbone: Registry[Builder] = Registry("backbone", package)  # decorates a builder `(num_classes, pretrained) -> module`
names = backbone.names


def model_sources(name: str) -> dict[str, dict[str, str]]:
    """The file that holds the builder of a network, and its hash; see `experiment.sources`.

    Raises:
        ExperimentError: unknown name.
    """
    source = source_of(backbone.find(name))
    return {f"model {name}": source} if source else {}


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
    builder = backbone.find(name)
    if weights is not None:
        return load_weights(builder(num_classes, False), weights)
    return builder(num_classes, pretrained)

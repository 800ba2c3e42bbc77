"""MobileNetV2 and ResNets of torchvision, with the published ImageNet weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.error import URLError

from torch import nn
from torchvision import models

from classification.backbones.registry import backbone
from experiment import ExperimentError


def build_pretrained(
    constructor: Callable[..., nn.Module], weights: Any, pretrained: bool, **options: Any
) -> nn.Module:
    """Build a network of torchvision, with its published weights if asked to.

    Raises:
        ExperimentError: the weights cannot be downloaded; says where to get them.
    """
    try:
        return constructor(weights=weights if pretrained else None, **options)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: what arrived has another hash
        raise ExperimentError(
            f"the ImageNet weights {weights} cannot be downloaded ({error}); download {weights.url} elsewhere and give "
            f"the file as --model.weights"
        ) from None


def with_classes(model: nn.Module, name: str, num_classes: int) -> nn.Module:
    """Replace the last linear layer unless it has the right size."""
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    if head.out_features != num_classes:
        model.set_submodule(name, nn.Linear(head.in_features, num_classes))
    return model


@backbone("mobilenet_v2")
def mobilenet_v2(num_classes: int, pretrained: bool) -> nn.Module:
    """MobileNetV2, width 1, 52 convolutions; without dropout, as in the papers."""
    weights = models.MobileNet_V2_Weights.IMAGENET1K_V2
    return with_classes(
        build_pretrained(models.mobilenet_v2, weights, pretrained, dropout=0.0), "classifier.1", num_classes
    )


@backbone("resnet18")
def resnet18(num_classes: int, pretrained: bool) -> nn.Module:
    """ResNet-18, 20 convolutions."""
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    return with_classes(build_pretrained(models.resnet18, weights, pretrained), "fc", num_classes)


@backbone("resnet34")
def resnet34(num_classes: int, pretrained: bool) -> nn.Module:
    """ResNet-34, 36 convolutions."""
    weights = models.ResNet34_Weights.IMAGENET1K_V1
    return with_classes(build_pretrained(models.resnet34, weights, pretrained), "fc", num_classes)

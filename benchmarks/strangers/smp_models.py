"""segmentation_models_pytorch: decoders for segmentation behind small encoders, where the package is there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks.strangers.stranger import Stranger

DECODERS = ("Unet", "FPN", "DeepLabV3Plus")
ENCODERS = ("resnet18", "mobilenet_v2")
SIDE, CLASSES = 64, 7


def _make(decoder: str, encoder: str) -> torch.nn.Module:
    import segmentation_models_pytorch

    made = getattr(segmentation_models_pytorch, decoder)(encoder, encoder_weights=None, classes=CLASSES)
    assert isinstance(made, torch.nn.Module)
    return made


def _images(samples: int) -> torch.Tensor:
    return torch.randn(samples, 3, SIDE, SIDE)


def smp_models() -> Iterator[Stranger]:
    """The table's rows; none where the package is not installed."""
    if find_spec("segmentation_models_pytorch") is None:
        return
    for decoder in DECODERS:
        for encoder in ENCODERS:
            name = f"{decoder}, {encoder}"
            yield Stranger(name, "segmentation_models_pytorch", partial(_make, decoder, encoder), _images)

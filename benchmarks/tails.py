"""Networks whose last layers are trained on Fashion-MNIST: what is ahead of them is computed once per image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from classification.backbones import build_model
from classification.data import load_splits
from classification.front import split

CLASSES, PER_CLASS, SIZE, BATCH = 10, 400, 96, 64
PIECE = 250  # images that are computed at once where no gradient is needed
Batch = tuple[tuple[Tensor, ...], Tensor]  # what a network, or its tail, is called with, each (N, ...); labels (N,)


def loss_of(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(*batch[0]), batch[1])


def pictures(images: np.ndarray, size: int | None = None) -> Tensor:
    """Images (N, 28, 28), uint8, as a network takes them: (N, 3, size, size) in [-1, 1]; `SIZE` by default."""
    gray, size = torch.from_numpy(images.astype(np.float32)).div_(127.5).sub_(1)[:, None], size or SIZE
    return F.interpolate(gray, size=(size, size), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)


def network(name: str, weights: str, layers: int | str, seed: int) -> tuple[nn.Module, list[str]]:
    """A network, and the names of its trained layers, the last so many or "all"; all ahead of them is frozen.

    The classifier is new where that of the weights has other classes.
    """
    torch.manual_seed(seed)
    model = build_model(name, CLASSES, weights=weights)
    names = lowrank.trailing_layers(model, layers if layers == "all" else int(layers))
    lowrank.freeze_before(model, names)
    for layer in model.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return model, names


def balanced(labels: np.ndarray, count: int | None = None) -> np.ndarray:
    """Places of the images to train on: `count` of each class (`PER_CLASS` by default), drawn once and for all."""
    draw, count = np.random.default_rng(233), count or PER_CLASS
    places = [draw.permutation(np.flatnonzero(labels == label))[:count] for label in range(CLASSES)]
    return np.sort(np.concatenate(places))


class Data:
    """Pictures of Fashion-MNIST to train on, and to test on.

    Args:
        root: folder that holds all data sets.
        device: where activations are computed, and stay.
        per_class: images of each class to train on; `PER_CLASS` by default.
        tested: how many images to test on; all by default.
    """

    def __init__(self, root: Path, device: str = "cpu", per_class: int | None = None, tested: int | None = None):
        splits = load_splits("fashion_mnist", root)
        self.device = torch.device(device)
        self.parts = [splits.train.pick(balanced(splits.train.labels, per_class))]
        self.parts.append(splits.test.pick(np.arange(len(splits.test.labels))[:tested]))
        self.sample = pictures(np.asarray(self.parts[1].images)[:4]).to(self.device)

    def ahead(self, name: str, weights: str, layers: int | str) -> tuple[Batch, Batch]:
        """What the trained tail of a network reads, of the images to train on and of those to test on."""
        model, _ = network(name, weights, layers, 0)
        front = split(model.to(self.device), self.sample).front
        learn, test = (self._through(front, np.asarray(part.images), part.labels) for part in self.parts)
        return learn, test

    def _through(self, front: nn.Module, images: np.ndarray, labels: np.ndarray) -> Batch:
        with torch.no_grad():
            pieces = [front(pictures(images[at : at + PIECE]).to(self.device)) for at in range(0, len(images), PIECE)]
        # Where the front ends within a residual block there are several, as the block's input is read again later.
        return tuple(map(torch.cat, zip(*pieces, strict=True))), torch.from_numpy(labels).to(self.device)


def batches(part: Batch, seed: int) -> Iterator[Batch]:
    """The images of an epoch in a random order, without an odd last batch."""
    order = torch.randperm(len(part[1]), generator=torch.Generator().manual_seed(seed))
    for places in order.split(BATCH):
        if len(places) == BATCH:
            places = places.to(part[1].device)
            yield tuple(given[places] for given in part[0]), part[1][places]


def parts_of(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of so many samples."""
    given = zip(*(each.split(size) for each in batch[0]), strict=True)
    return list(zip(given, batch[1].split(size), strict=True))

"""The networks and the batch that everything is measured on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import lowrank
from classification.backbones import build_model

CLASSES = 1000
NETWORKS = ("mobilenet_v2", "mcunet", "resnet18", "vit_small")
Batch = tuple[Tensor, Tensor]


def build(name: str, size: int) -> nn.Module:
    """A network with random weights, in training mode but for the statistics of its batch normalisations."""
    torch.manual_seed(233)
    if name == "vit_small":
        model: nn.Module = VisionTransformer(
            image_size=size, patch_size=16, num_layers=8, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=CLASSES
        )
        for weight in model.get_submodule("heads").parameters():  # from zeros no gradient would reach what is ahead
            nn.init.normal_(weight, std=0.02)
    else:
        model = build_model(name, CLASSES)
    for layer in model.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return model


def trained_layers(name: str, model: nn.Module, layers: int | str) -> list[str]:
    """Names of the last convolutions, of a transformer the last linear layers of its MLPs; all ahead is frozen."""
    if name == "vit_small":
        names = [n for n in lowrank.trailing_layers(model, "all", kind="linear") if ".mlp." in n]
        names = names if layers == "all" else names[-int(layers) :]
    else:
        names = lowrank.trailing_layers(model, layers if layers == "all" else int(layers))
    lowrank.freeze_before(model, names)
    return names


def batch_of(count: int, size: int) -> Batch:
    """The first handwritten digits of scikit-learn, enlarged: images (count, 3, size, size) in [-1, 1], and labels."""
    digits = load_digits()
    gray = torch.from_numpy(digits.images[:count]).float().div(8).sub(1)[:, None]
    images = F.interpolate(gray, size=(size, size), mode="bilinear", antialias=True).expand(-1, 3, -1, -1).contiguous()
    return images, torch.from_numpy(digits.target[:count]).long()


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def step(model: nn.Module, batch: Batch) -> None:
    """One step, but for the optimizer's part."""
    model.zero_grad()
    loss_of(model, batch).backward()

"""torchvision's models for classification, segmentation and video.

Of every family the members of up to 30 million parameters; the larger ones are the same blocks, wider and more often.
Families that have none so small are built from the same classes with smaller settings. s3d is left out, which takes
clips of 224 x 224 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import segmentation, video

from benchmarks.strangers.stranger import Stranger

CLASSIFICATION = (
    "convnext_tiny densenet121 efficientnet_b0 efficientnet_b1 efficientnet_b3 efficientnet_v2_s googlenet "
    "inception_v3 mnasnet0_5 mnasnet1_0 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf "
    "regnet_x_800mf regnet_x_1_6gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf resnet18 resnet34 resnet50 "
    "resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_t "
    "swin_v2_t"
)
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")
SIDE = {"inception_v3": 96}
CLASSES = 7


def _small_vgg(layers: str, norm: bool) -> nn.Module:
    model = getattr(models, f"{layers}{'_bn' if norm else ''}")(init_weights=False)
    head = [nn.Linear(512 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, CLASSES)]
    model.classifier = nn.Sequential(*head)
    return model


def _alexnet() -> nn.Module:
    model = models.alexnet()
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 36, 64), nn.ReLU(True), nn.Linear(64, CLASSES))
    return model


def _vit() -> nn.Module:
    model = models.VisionTransformer(64, 8, 4, 4, 128, 256, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision's is zero, and so would be every gradient
    return model


def _maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.1, num_classes=CLASSES)


def _swin3d() -> nn.Module:
    kind = video.swin_transformer.SwinTransformer3d
    return kind([2, 4, 4], 32, [2, 2], [2, 4], [2, 4, 4], stochastic_depth_prob=0.1, num_classes=CLASSES)


def _mvit() -> nn.Module:
    config = partial(video.mvit.MSBlockConfig, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3])
    blocks = [
        config(1, 32, 64, stride_q=[1, 1, 1], stride_kv=[1, 2, 2]),
        config(2, 64, 64, stride_q=[1, 2, 2], stride_kv=[1, 2, 2]),
    ]
    return video.mvit.MViT((32, 32), 4, blocks, True, True, True, 0.0, stochastic_depth_prob=0.1, num_classes=CLASSES)


SMALLER: dict[str, Callable[[], nn.Module]] = {
    "alexnet": _alexnet,
    "vgg11": partial(_small_vgg, "vgg11", False),
    "vgg11_bn": partial(_small_vgg, "vgg11", True),
    "vit (4 layers, 128 wide)": _vit,
    "maxvit (2 stages)": _maxvit,
}
SMALLER_VIDEO = {"swin3d (2 stages)": _swin3d, "mvit (2 blocks)": _mvit}


def _images(name: str, samples: int) -> torch.Tensor:
    side = SIDE.get(name, 64)
    return torch.randn(samples, 3, side, side)


def _clips(samples: int) -> torch.Tensor:
    return torch.randn(samples, 3, 4, 32, 32)


def _get(name: str, **options: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}  # the side classifiers need larger images
    return models.get_model(name, weights=None, num_classes=CLASSES, **options)


def torchvision_models() -> Iterator[Stranger]:
    """The table's rows."""
    for name in CLASSIFICATION.split():
        yield Stranger(name, "torchvision", partial(_get, name), partial(_images, name))
    for name, make in SMALLER.items():
        yield Stranger(name, "torchvision", make, partial(_images, name))
    for name in SEGMENTATION:
        make = partial(getattr(segmentation, name), weights=None, weights_backbone=None, num_classes=CLASSES)
        yield Stranger(name, "torchvision segmentation", make, partial(_images, name))
    for name in VIDEO:
        yield Stranger(name, "torchvision video", partial(_get, name), _clips)
    for name, make in SMALLER_VIDEO.items():
        yield Stranger(name, "torchvision video", make, _clips)

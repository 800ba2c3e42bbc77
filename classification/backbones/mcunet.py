"""MCUNet (`mcunet-in1`, 0.64 M parameters; Lin et al., NeurIPS 2020): 42 convolutions, native resolution 96."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from classification.backbones.registry import backbone
from classification.backbones.weights import load_weights
from experiment import ExperimentError

# in, expanded, kernel, stride, out; a block whose expanded size is its input size has no expansion layer.
BLOCKS = (
    (16, 16, 3, 1, 8),
    (8, 32, 3, 2, 16),
    (16, 48, 3, 1, 16),
    (16, 48, 7, 2, 24),
    (24, 120, 3, 1, 24),
    (24, 120, 3, 2, 40),
    (40, 160, 7, 1, 40),
    (40, 160, 5, 1, 48),
    (48, 144, 3, 1, 48),
    (48, 192, 3, 1, 48),
    (48, 240, 7, 2, 96),
    (96, 384, 5, 1, 96),
    (96, 384, 5, 1, 96),
    (96, 576, 3, 1, 160),
)


def _conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int, activation: bool) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU6(inplace=True)] if activation else [])]


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, expanded: int, kernel: int, stride: int, outputs: int) -> None:
        super().__init__()
        expansion = _conv(inputs, expanded, 1, 1, 1, True) if expanded != inputs else []
        self.layers = nn.Sequential(
            *expansion,
            *_conv(expanded, expanded, kernel, stride, expanded, True),
            *_conv(expanded, outputs, 1, 1, 1, False),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.layers(x)
        return x + y if self.shortcut else y


class MCUNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes); the feature map is 1/32 of the image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        assert all(before[4] == after[0] for before, after in pairwise(BLOCKS))
        self.stem = nn.Sequential(*_conv(3, BLOCKS[0][0], 3, 2, 1, True))
        self.blocks = nn.Sequential(*(InvertedResidual(*row) for row in BLOCKS))
        self.classifier = nn.Linear(BLOCKS[-1][4], num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


@backbone("mcunet")
def mcunet(num_classes: int, pretrained: bool) -> nn.Module:
    """MCUNet; the published weights are those that `python -m classification weights mcunet` has converted."""
    if not pretrained:
        return MCUNet(num_classes)
    if not released_weights().exists():
        raise ExperimentError(
            "the ImageNet weights of mcunet are not on this machine; run: python -m classification weights mcunet, or "
            "give a file as --model.weights"
        )
    return load_weights(MCUNet(num_classes), str(released_weights()))


def released_weights() -> Path:
    """Where the published weights are kept once they are converted, among those that torch downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "mcunet-in1.pt"

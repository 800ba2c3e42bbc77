"""Networks that no part of the suite knows, in the ways people write them: as modules, as functions, in loops."""

import torch
import torch.nn.functional as F
from torch import nn


class Inverted(nn.Module):
    """Expand, convolve each channel, project, with a shortcut; activations as modules in a Sequential."""

    def __init__(self, channels, expanded, kernel=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            nn.ReLU6(inplace=True),
            nn.Conv2d(expanded, expanded, kernel, padding=kernel // 2, groups=expanded),
            nn.BatchNorm2d(expanded),
            nn.ReLU6(inplace=True),
            nn.Conv2d(expanded, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.body(x)


class Bottleneck(nn.Module):
    """A strided bottleneck in plain functions; its shortcut reads the same input as its first convolution."""

    def __init__(self, inputs, width, outputs, stride=2):
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv, self.norm2 = nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width, affine=False)
        self.expand, self.norm3 = nn.Conv2d(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut, self.norm4 = nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = F.relu(self.norm1(self.reduce(x)))
        y = torch.relu(self.norm2(self.conv(y)))
        y = self.norm3(self.expand(y))
        y += self.norm4(self.shortcut(x))
        return y.relu_()


class Own(nn.Module):
    """All of it in one network, with pooling, dropout and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.1))
        self.inverted = Inverted(6, 12, 5)
        self.bottleneck = Bottleneck(6, 5, 8)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(8, 4)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        x = self.pool(self.bottleneck(self.inverted(x)))
        return self.head(F.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1), 0.3, self.training))


def with_statistics(network, zero_scale=True):
    """Stored statistics, scales and shifts as training leaves them; one scale of each layer is zero."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
                if zero_scale:
                    layer.weight.data[0] = 0
    return network


def frozen_statistics(network):
    """Training mode, but for the batch normalisations."""
    network.train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return network

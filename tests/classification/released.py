"""MCUNet as it was released: its structure, its names, its JSON file; and the command that takes it over."""

import re

import torch
from torch import nn

from classification import convert_weights
from classification.backbones.mcunet import BLOCKS


def conv_bn(inputs, outputs, kernel, stride=1, groups=1, activation=True):
    """A convolution with normalisation, its parts named as in MCUNet's release."""
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(outputs))
    if activation:
        layers.add_module("act", nn.ReLU6())
    return layers


class ReleasedBlock(nn.Module):
    """A block with the names of the release."""

    def __init__(self, inputs, expanded, kernel, stride, outputs):
        super().__init__()
        layers = self.mobile_inverted_conv = nn.Sequential()
        if expanded != inputs:
            layers.add_module("inverted_bottleneck", conv_bn(inputs, expanded, 1))
        layers.add_module("depth_conv", conv_bn(expanded, expanded, kernel, stride, expanded))
        layers.add_module("point_linear", conv_bn(expanded, outputs, 1, activation=False))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.mobile_inverted_conv(x)
        return x + y if self.residual else y


class Released(nn.Module):
    """MCUNet with the names and the structure of the release."""

    def __init__(self, classes=1000, epsilon=1e-5):
        super().__init__()
        self.first_conv = conv_bn(3, 16, 3, 2)
        self.blocks = nn.ModuleList(ReleasedBlock(*row) for row in BLOCKS)
        self.classifier = nn.Sequential()
        self.classifier.add_module("linear", nn.Linear(160, classes))
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = epsilon

    def forward(self, x):
        x = self.first_conv(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(3).mean(2))


class Half(nn.Module):
    """MCUNet in a trainer's module, as it was published after pretraining on a half."""

    def __init__(self, released):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.model = nn.Sequential(released.first_conv, *released.blocks)
        self.classifier = released.classifier.linear


def described(epsilon=1e-5):
    """The JSON file of the release."""
    blocks = []
    for inputs, expanded, kernel, stride, outputs in BLOCKS:
        layer = {"name": "MBInvertedConvLayer", "in_channels": inputs, "out_channels": outputs, "kernel_size": kernel}
        layer |= {"stride": stride, "expand_ratio": expanded / inputs, "act_func": "relu6", "use_se": False}
        layer["mid_channels"] = None if expanded == inputs else expanded
        shortcut = {"name": "IdentityLayer", "in_channels": [inputs], "out_channels": [outputs]}
        residual = stride == 1 and inputs == outputs
        blocks.append(
            {
                "name": "MobileInvertedResidualBlock",
                "mobile_inverted_conv": layer,
                "shortcut": shortcut if residual else None,
            }
        )
    first = {"name": "ConvLayer", "kernel_size": 3, "stride": 2, "dilation": 1, "groups": 1, "bias": False}
    first |= {"in_channels": 3, "out_channels": 16, "use_bn": True, "act_func": "relu6", "ops_order": "weight_bn_act"}
    classifier = {"name": "LinearLayer", "in_features": 160, "out_features": 1000, "bias": True, "use_bn": False}
    return {
        "name": "ProxylessNASNets",
        "bn": {"momentum": 0.1, "eps": epsilon, "ws_eps": None},
        "first_conv": first,
        "blocks": blocks,
        "feature_mix_layer": None,
        "classifier": classifier | {"act_func": None, "dropout_rate": 0},
        "resolution": 96,
    }


def trained(network, size=48):
    """The network with statistics of its own, in evaluation mode."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(8, 3, size, size))
    return network.eval()


def weights(*arguments):
    return convert_weights.main([str(argument) for argument in arguments])


def refused(capsys, message, *arguments):
    capsys.readouterr()
    assert weights(*arguments) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", printed), printed
    assert re.search(message, printed), printed

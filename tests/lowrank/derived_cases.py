"""A block whose wide inputs follow from its narrow one, and its gradients by hand."""

from dataclasses import dataclass

import torch
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, FixedBases, Rounded


class Inverted(nn.Module):
    """An inverted residual, as mobile networks have it."""

    def __init__(self, activation=nn.ReLU6, stride=1, inside=4, wide=24):
        super().__init__()
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.expand = nn.Sequential(nn.Conv2d(inside, wide, 1), nn.BatchNorm2d(wide), activation(inplace=True))
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), activation(inplace=True))
        self.project = nn.Sequential(nn.Conv2d(wide, inside, 1), nn.BatchNorm2d(inside))
        self.shortcut = stride == 1

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class Sine(nn.Module):
    """Of what it gives nothing is known, so that it does not follow from the image."""

    def forward(self, x):
        return torch.sin(x)


class Stem(nn.Conv2d):
    """The same, of what a convolution gives."""

    def forward(self, x):
        return torch.sin(super().forward(x))


EXPAND, DEPTHWISE, PROJECT = "1.expand.0", "1.depthwise.0", "1.project.0"
NAMES = [EXPAND, DEPTHWISE, PROJECT]


def settled(model):
    """With normalisations as they are after some training, by stored statistics, in float64."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.uniform_(-0.3, 0.3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.double().eval()


def network(activation=nn.ReLU6, stride=1):
    torch.manual_seed(0)
    return settled(nn.Sequential(Stem(3, 4, 3, padding=1), Inverted(activation, stride), nn.Conv2d(4, 3, 1)))


def loss_of(model, x):
    return model(x).square().sum()


def by_hand(stock, x, narrow):
    """Weight gradients of the block from a `narrow` input in the place of its own, with stock's output gradients."""
    grads, inputs = {}, {}

    def note(name):
        def hook(layer, given, output):
            output.register_hook(lambda grad: grads.setdefault(name, grad))

        return hook

    handles = [stock.get_submodule(name).register_forward_hook(note(name)) for name in NAMES]
    loss_of(stock, x).backward()
    for handle in handles:
        handle.remove()
    block = stock[1]
    with torch.no_grad():
        inputs[EXPAND] = narrow
        inputs[DEPTHWISE] = block.expand(narrow)
        inputs[PROJECT] = block.depthwise(inputs[DEPTHWISE])
    found = {}
    for name in NAMES:
        layer = stock.get_submodule(name)
        form = (layer.weight.shape, grads[name], layer.stride, layer.padding, layer.dilation, layer.groups)
        found[f"{name}.weight"] = torch.nn.grad.conv2d_weight(inputs[name], *form)
    return found


METHODS = [
    HOSVD(0.7, derive=True),
    HOSVD(0.9, storage="int8", derive=True),
    SVD(0.5, derive=True),
    ASI((3, 3, 3, 4), derive=True),
    FixedBases((3, 3, 3, 4), storage="bfloat16", derive=True),
    Rounded(derive=True),
]


def gradients(model, x, passes=1):
    for _ in range(passes):
        model.zero_grad()
        x = x.detach().requires_grad_()
        loss_of(model, x).backward()
    return {"input": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def layers_of(model):
    return {layer._lowrank.name: layer._lowrank for layer in lowrank.converted_layers(model)}


def derived(model):
    return {name: state.derived for name, state in layers_of(model).items() if state.derived}


@dataclass(frozen=True)
class Noted(HOSVD):
    """Tells what it gives again of an input."""

    def restored(self, kept, dtype):
        SEEN.append(super().restored(kept, dtype))
        return SEEN[-1]


SEEN = []

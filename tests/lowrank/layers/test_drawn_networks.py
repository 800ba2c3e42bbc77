"""Networks drawn at random, of blocks that hand tensors to several readers and change them in place, against stock."""

import copy
import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from lowrank.kernels import library

CHANNELS = 6
ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.SiLU(),
    nn.Hardswish(inplace=True),
    nn.LeakyReLU(0.1, inplace=True),
    nn.GELU(),
]
NORMALISATIONS = [
    lambda: nn.BatchNorm2d(CHANNELS),
    lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    lambda: nn.GroupNorm(2, CHANNELS),
]


class Block(nn.Module):
    """Convolution, normalisation and activation, and another of each, put together in one of several ways."""

    def __init__(self, draw):
        super().__init__()
        size = draw.choice([1, 3, 5])
        options = {"padding": size // 2, "groups": draw.choice([1, CHANNELS]), "bias": draw.random() < 0.5}
        self.first, self.norm = nn.Conv2d(CHANNELS, CHANNELS, size, **options), draw.choice(NORMALISATIONS)()
        self.second, self.other = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)
        self.act, self.joined = copy.deepcopy(draw.choice(ACTIVATIONS)), nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        self.way = draw.choice(
            [
                self.sum,
                self.residual,
                self.gated,
                self.pooled,
                self.shared,
                self.cat,
                self.twice,
                self.in_place,
                self.glu,
            ]
        ).__name__

    def forward(self, x):
        return getattr(self, self.way)(x, self.norm(self.first(x)))

    def sum(self, x, y):
        return self.act(y + x)

    def residual(self, x, y):
        y = self.other(self.second(self.act(y)))
        y += x
        return self.act(y)

    def gated(self, x, y):
        y = self.act(y)
        return y * torch.sigmoid(self.second(F.adaptive_avg_pool2d(y, 1))) + x

    def pooled(self, x, y):
        return F.max_pool2d(self.act(y), 3, 1, 1)

    def shared(self, x, y):
        z = y + x
        return self.second(self.act(z.clone())) + self.other(z)

    def glu(self, x, y):
        return self.second(F.silu(y) * self.other(x)) + x

    def cat(self, x, y):
        return self.joined(torch.cat([F.relu(y), F.relu(y + 1)], 1))

    def twice(self, x, y):
        return self.other(self.second(F.relu(y))) + self.second(F.relu(y))

    def in_place(self, x, y):
        return F.relu(y.add_(x), inplace=True)


def gradients(network, x, way):
    loss = (network(x).mean((2, 3)) * torch.linspace(-1, 1, len(x) * CHANNELS, dtype=x.dtype).view(len(x), -1)).sum()
    wanted = [x, *network.parameters()]
    if way == "differentiated again":
        (found,) = torch.autograd.grad(loss, x, create_graph=True)
        return [found, *torch.autograd.grad(found.square().sum(), x, materialize_grads=True)]
    if way == "of a part":
        return torch.autograd.grad(loss, wanted[1::3], allow_unused=True)
    first = torch.autograd.grad(loss, wanted, retain_graph=way == "twice", allow_unused=True)
    return [*first, *torch.autograd.grad(loss, wanted, allow_unused=True)] if way == "twice" else first


def drawn(draw, seed):
    """A stock network and one that keeps less."""
    torch.manual_seed(seed)
    stock = nn.Sequential(*[Block(draw) for _ in range(draw.randint(2, 5))]).double().train(draw.random() < 0.6)
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    names = lowrank.trailing_layers(stock, "all", kind="conv")
    return stock, lowrank.convert(copy.deepcopy(stock), names, lowrank.Vanilla(), recompute=draw.random() < 0.7)


@pytest.mark.parametrize("seed", range(40))
def test_gradients_are_stocks(seed):
    draw = random.Random(seed)
    stock, own = drawn(draw, seed)
    x = torch.randn(4, CHANNELS, 9, 9, dtype=torch.float64, requires_grad=True)
    way = draw.choice(["once", "twice", "differentiated again", "of a part"])
    try:
        wanted = gradients(stock, x, way)
    except RuntimeError as error:  # changed in place what its gradient is computed from
        if "inplace" not in str(error):
            raise
        return
    try:
        found = gradients(own, x, way)
    except lowrank.DoubleBackwardError:
        if way != "differentiated again":
            raise
        return
    torch.testing.assert_close(list(found), list(wanted), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(own.state_dict(), stock.state_dict(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(40, 60))
def test_compiled_passes_give_what_the_operators_give(seed):
    """In single precision, which they are for; a slope that rounding turns around would be far off."""
    draw = random.Random(seed)
    _, own = drawn(draw, seed)
    own, x = own.float(), torch.randn(4, CHANNELS, 9, 9)
    found = []
    for context in (nullcontext(), library.plain()):
        network, leaf = copy.deepcopy(own), x.clone().requires_grad_()
        with context:
            try:
                found.append(gradients(network, leaf, "twice"))
            except RuntimeError as error:
                if "inplace" not in str(error):
                    raise
                found.append(())
    largest = max((grad.abs().max().item() for grad in found[1] if grad is not None), default=0.0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * largest)

"""Small networks with weights to hold as factors, and how they are trained and compared."""

import torch
from references import random_tensor
from torch import nn

from lowrank import WASI, WSI

NAMES = ["0", "2"]
SHAPES = {"2-D": (20, 6), "3-D": (4, 5, 6), "4-D": (2, 3, 4, 6)}
FULL = 99  # a rank above every dimension
METHODS = [
    *(WASI(energy=1, ranks=FULL), WSI(energy=1)),
    *(WSI(energy=1, update="svd"), WASI(energy=1, ranks=FULL, update="svd")),
]


def network(inputs=6, hidden=9, seed=1):
    """Two linear layers, one with more outputs than inputs and one with fewer, and a classifier that stays stock."""
    torch.manual_seed(seed)
    layers = (nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 7, bias=False), nn.LayerNorm(7), nn.Linear(7, 3))
    return nn.Sequential(*layers).double()


def loss_of(model, x, target):
    y = model(x)
    return (y * target).mean() + y.square().mean()


def data(shape, step=0):
    return random_tensor(*shape, seed=10 + step), random_tensor(*shape[:-1], 3, seed=50 + step)


def train(model, optimizer, shape, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, *data(shape, step)).backward()
        optimizer.step()
    return model


def assert_same_weights(model, other, tolerance=1e-13):
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=tolerance)


def product(layer):
    """The weight that a layer's factors stand for, without a graph."""
    return layer.left.detach() @ layer.right.detach()

"""A network of all kinds of layers, stock and converted, to be run elsewhere than in plain eager training."""

import copy

import torch
import torch.nn.functional as F
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, GradientFilter, Vanilla

EVERY = [Vanilla(), SVD(0.5), HOSVD(0.5), ASI(2), GradientFilter(2)]
EXACT = [Vanilla(), SVD(1.0), HOSVD(1.0), ASI(99)]


class Net(nn.Module):
    """Modules and functions, a convolution that may be fused, and a transformer's head."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.last, self.layer_norm = nn.Conv2d(4, 4, 1), nn.LayerNorm(4)
        self.first, self.gelu, self.second = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = F.avg_pool2d(F.leaky_relu(self.last(x), 0.2), 2)
        x = self.layer_norm(x.flatten(2).mean(2))
        return self.second(self.gelu(self.first(x)))


CONVS = ["conv", "last"]


def pair(method, names=CONVS, dtype=torch.float64):
    torch.manual_seed(0)
    stock = frozen_statistics(with_statistics(Net())).to(dtype)
    return stock, lowrank.convert(copy.deepcopy(stock), names, method)


def images(size=2, seed=0, dtype=torch.float64):
    return random_tensor(size, 3, 8, 8, seed=seed, dtype=dtype)

"""Networks with blocks, and what their tests compare."""

from functools import partial

import torch
from networks import Bottleneck, Inverted, Own, frozen_statistics, with_statistics
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, Vanilla

FULL_RANK = [Vanilla(), SVD(1.0), HOSVD(1.0), ASI(999), ASI(999, algorithm="published")]
NETWORKS = {
    "own": Own,
    "inverted": partial(Inverted, 3, 8),
    "bottleneck": partial(Bottleneck, 3, 4, 6),
    "sequence": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "loop": lambda: Loop(),
    "smooth": lambda: nn.Sequential(*smooth(3, 4), *smooth(4, 5, nn.GELU()), nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3)),
}


def smooth(inputs, outputs, activation=None):
    """As in EfficientNet: an activation that is computed again from what is kept ahead of it."""
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), activation or nn.SiLU()


class Loop(nn.Module):
    """Code that reads its list of layers in a loop."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def network(name, **options):
    return frozen_statistics(with_statistics(NETWORKS[name](), **options)).double()


def results(model, x, seed=5):
    """Output and every gradient, the input's included, for a random upstream gradient."""
    model.zero_grad()
    leaf = x.clone().requires_grad_(True)
    torch.manual_seed(seed)
    y = model(leaf * 1)
    y.backward(random_tensor(*y.shape, seed=2))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": leaf.grad, **gradients}


def assert_equal(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def kept(model, x):
    return lowrank.saved_bytes(model, lambda m, b: (m(b) * torch.ones_like(m(b)[:1])).sum(), x)


def convolutions(model):
    return lowrank.trailing_layers(model, "all")

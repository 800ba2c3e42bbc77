"""Batches of zeros and of numbers that are not finite leave no mark on the steps behind them, wherever zeros lie."""

from contextlib import nullcontext

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, WASI
from lowrank.kernels import library

RANKS = (6, 3, 4, 4)


def batch(seed, ahead, shape=(12, 5, 16, 16)):
    """Images of low rank whose first channels, rows and columns are black, as borders are and units that are dead."""
    x = torch.zeros(shape)
    inner = [n - a for n, a in zip(shape[1:], ahead, strict=True)]
    numbers = random_tensor(shape[0], 2, 2, seed=seed).float() + 1
    rows, columns = (random_tensor(2, n, seed=n + 100 * at).float() for at, n in enumerate(inner[1:]))
    channels = random_tensor(inner[0], seed=7).float()
    x[:, ahead[0] :, ahead[1] :, ahead[2] :] = torch.einsum("bij,c,ih,jw->bchw", numbers, channels, rows, columns)
    return x


def error(stock, model, x):
    """Of the weight gradient, over its norm."""
    found = []
    for network in (stock, model):
        network.zero_grad()
        y = network(x)
        y.backward(random_tensor(*y.shape, seed=5).float())
        found.append(network[0].weight.grad.clone())
    return ((found[1] - found[0]).norm() / found[0].norm()).item()


@pytest.mark.parametrize("kernels", [True, False], ids=["compiled", "operators"])
@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("ahead", [(0, 0, 0), (0, 2, 4), (2, 5, 6)])
@pytest.mark.parametrize(
    "method",
    [
        ASI(RANKS),
        ASI(RANKS, algorithm="published"),
        ASI(RANKS, storage="int8"),
        ASI(RANKS, refresh=2),
        ASI(RANKS, refresh="energy"),
    ],
    ids=str,
)
def test_after_a_bad_batch_a_convolution_trains_as_before(method, ahead, bad, kernels):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(5, 7, 3, padding=1))
    model = lowrank.convert(nn.Sequential(nn.Conv2d(5, 7, 3, padding=1)), ["0"], method)
    model.load_state_dict(stock.state_dict())
    with nullcontext() if kernels else library.plain():
        before = [error(stock, model, batch(seed, ahead)) for seed in range(4)][-1]
        error(stock, model, torch.zeros(12, 5, 16, 16) if bad == 0 else batch(4, ahead) * bad)
        after = [error(stock, model, batch(seed, ahead)) for seed in range(5, 9)][-1]
    assert before < 0.02
    assert after < 0.02


@pytest.mark.parametrize("bad", [0.0, float("inf")])
def test_after_a_bad_batch_a_linear_layer_trains_as_before(bad):
    torch.manual_seed(0)
    stock, x = nn.Sequential(nn.Linear(20, 6)), torch.zeros(9, 20)
    x[:, 8:] = random_tensor(9, 1).float() * random_tensor(12, seed=1).float()
    for method in (ASI(3), WASI(3, energy=1.0)):
        model = lowrank.convert(nn.Sequential(nn.Linear(20, 6)), ["0"], method)
        model.load_state_dict(stock.state_dict())
        layer = model[0]
        layer(x).sum().backward()
        layer(x * bad if bad else torch.zeros(9, 20)).sum().backward()
        for _ in range(2):
            layer(x).sum().backward()
        bases = layer._lowrank.bases
        kept = x if bases[1] is None else x @ bases[1] @ bases[1].mT
        torch.testing.assert_close(kept, x, rtol=0, atol=1e-4)

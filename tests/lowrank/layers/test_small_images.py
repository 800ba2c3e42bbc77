"""Layers with more weights than outputs: equal to the stock network's, and no larger peak."""

import copy

import pytest
import torch
from networks import frozen_statistics, with_statistics
from references import DEVICE, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, Vanilla

METHODS = [Vanilla(), HOSVD(0.2), ASI((2, 2, 2, 2))]


def wide(channels, bias=False):
    """Two convolutions; for small images they have more weights than outputs."""
    layers = [nn.Conv2d(channels, channels, 3, padding=1, bias=bias), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(channels, channels, 3, 2, 1, bias=bias), nn.BatchNorm2d(channels, affine=not bias)]
    return frozen_statistics(with_statistics(nn.Sequential(*layers)))


def loss(model, x):
    return model(x).square().mean()


def results(model, x, upstream):
    model.zero_grad()
    leaf = x.clone().requires_grad_(True)
    y = model(leaf)
    y.backward(upstream)
    return [y.detach(), leaf.grad, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(2, 12, 3, 2), (3, 12, 9, 9)], ids=["more weights", "more outputs"])
def test_output_and_gradients_are_the_stock_networks(bias, size):
    model, x = wide(12, bias).double(), random_tensor(*size)
    with torch.no_grad():
        plain = model(x)
    upstream = random_tensor(*plain.shape, seed=1)
    expected = results(model, x, upstream)
    lowrank.convert(model, ["0", "3"], HOSVD(1.0))
    for found, reference in zip(results(model, x, upstream), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain, rtol=1e-10, atol=1e-10)


@pytest.mark.cpu_only("a GPU's QR and eigenvectors take work space of megabytes")
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("names", [["0", "3"], ["3"]], ids=["all", "last"])
def test_the_peak_is_no_larger_than_vanillas(method, names):
    model, x = wide(192), random_tensor(4, 192, 4, 4, dtype=torch.float32)
    lowrank.freeze_before(model, names)
    own = lowrank.convert(copy.deepcopy(model), names, method)
    vectors = model[0].weight.nbytes // 16  # one number per channel, and the gradient of the core's few channels
    for backward in (True, False):
        peak, stock = (lowrank.peak_bytes(network, loss, x, backward=backward) for network in (own, model))
        assert peak <= stock + vectors


def test_the_peak_behind_a_small_trained_start_is_no_larger_than_vanillas():
    """No gradient of a weight is there to hide a second copy of it, in the forward as in the backward pass."""
    model = nn.Sequential(nn.Conv2d(3, 192, 1), wide(192))
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    x, vectors = random_tensor(4, 3, 4, 4, dtype=torch.float32), 4 * 16 * 192
    own = lowrank.convert(copy.deepcopy(model), ["0"], Vanilla())
    peak, stock = (lowrank.peak_bytes(network, loss, x) for network in (own, model))
    assert peak <= stock + vectors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = wide(32), random_tensor(4, 32, 3, 3, dtype=torch.float32)
    gradients = []
    for network in (model, lowrank.convert(copy.deepcopy(model), ["0", "3"], ASI(999))):
        with torch.autocast(DEVICE, dtype):
            y = network(x)
        assert y.dtype == dtype
        y.float().square().mean().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
        with torch.no_grad(), torch.autocast(DEVICE, dtype):
            assert network(x).dtype == dtype
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99

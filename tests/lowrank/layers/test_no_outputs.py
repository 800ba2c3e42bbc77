"""Linear layers without inputs or outputs, as heads that were pruned away leave them: the weight has no numbers."""

import copy

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, WSI, FixedBases, Rounded, Vanilla

METHODS = [Vanilla(), SVD(0.8), HOSVD(0.8), ASI(2), ASI(2, storage="int8"), Rounded(), FixedBases(2)]
SIZES = pytest.mark.parametrize("size", [(4, 0), (0, 4), (0, 0)], ids=str)


class Sum(nn.Module):
    """A part that may have been pruned away, beside one that is there."""

    def __init__(self, width, rank):
        super().__init__()
        self.down, self.up, self.other = nn.Linear(width, rank), nn.Linear(rank, 3), nn.Linear(width, 3)

    def forward(self, x):
        return self.up(torch.relu(self.down(x))) + self.other(x)


def loss(model, x):
    return model(x).square().sum()


def network(size):
    torch.manual_seed(0)
    return Sum(*size).double()


@pytest.mark.slow
@SIZES
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.tag)
def test_outputs_and_gradients_are_stocks(method, compiled, size):
    torch._dynamo.reset()
    names = ["down", "up"]
    stock = network(size)
    model = lowrank.convert(copy.deepcopy(stock), names, method)
    found = []
    for net in (stock, model):
        x = random_tensor(5, size[0]).requires_grad_()
        forward = torch.compile(net, backend="eager") if compiled and net is model else net
        y = forward(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(parameter.grad for parameter in net.parameters())])
    torch.testing.assert_close(found[1], found[0])


@SIZES
def test_where_there_is_nothing_to_take_apart_it_is_said(size):
    x = random_tensor(5, size[0])
    with pytest.raises(lowrank.ConversionError, match="'down'"):
        lowrank.convert(network(size), ["down"], WSI(0.9))
    with pytest.raises(lowrank.ConversionError, match="'down'"):
        lowrank.truncate_weights(network(size), ["down"], loss, x, energy=0.9)
    with pytest.raises(lowrank.ConversionError, match="'down'"):
        lowrank.measure_perplexity(network(size), ["down"], loss, x)

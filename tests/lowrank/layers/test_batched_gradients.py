"""Several gradients in one backward pass (`is_grads_batched=True`, `torch.func.vmap`): those of one after the other."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layer_cases import EXACT
from networks import frozen_statistics, with_statistics
from references import TOLERANCE, random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank

FUNCTIONS = {
    "relu": F.relu,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gate": lambda x: F.silu(x) * x.sigmoid(),
    "softmax": lambda x: x.softmax(1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
}


class Behind(nn.Module):
    """A function behind a convolution and its norm, and a linear head."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.norm(self.conv(x))).mean((2, 3)))


def at_once(y, inputs, basis):
    return torch.autograd.grad(y, inputs, basis, is_grads_batched=True)


def by_vmap(y, inputs, basis):
    return torch.func.vmap(lambda row: torch.autograd.grad(y, inputs, row, retain_graph=True))(basis)


def by_vmap_of_vmap(y, inputs, basis):
    """Of images and outputs, the first of both the last dimension of its batch."""
    basis = basis.unflatten(0, y.shape).movedim(0, -1)
    found = torch.func.vmap(partial(by_vmap, y, inputs), in_dims=-1)(basis)
    return [one.flatten(0, 1) for one in found]


def assert_same_jacobian(stock, model, x, way=at_once):
    """Of every output with respect to the input and all parameters: at once of `model`, row by row of `stock`."""
    y = stock(x)
    inputs = [x, *stock.parameters()]
    rows = [torch.autograd.grad(one, inputs, retain_graph=True) for one in y.flatten()]
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    found = way(model(x), [x, *model.parameters()], basis)
    torch.testing.assert_close(list(found), expected, **TOLERANCE)


@pytest.mark.parametrize("checkpointed", [False, True])  # which gives what was saved once
@pytest.mark.parametrize("way", [at_once, by_vmap, by_vmap_of_vmap])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, way, checkpointed):
    torch.manual_seed(0)
    stock = frozen_statistics(with_statistics(Behind(FUNCTIONS[name]))).double()
    model = lowrank.convert(copy.deepcopy(stock), ["conv", "head"], lowrank.Vanilla())
    if checkpointed:
        model.forward = partial(checkpoint, model.forward, use_reentrant=False)
    assert_same_jacobian(stock, model, random_tensor(2, 4, 8, 7).requires_grad_(), way)


def test_rows_of_second_derivatives_by_vmap():
    torch.manual_seed(0)
    stock = frozen_statistics(with_statistics(Behind(F.gelu))).double()
    model = lowrank.convert(copy.deepcopy(stock), ["conv", "head"], lowrank.Vanilla())
    x, found = random_tensor(2, 4, 8, 7).requires_grad_(), []
    for network in (stock, model):
        (slopes,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        basis = random_tensor(3, *x.shape, seed=2)
        found.append(by_vmap(slopes, [x], basis)[0])
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


class InAnotherThread(torch.autograd.Function):
    """A model whose backward pass runs in a thread of its own, as that of a GPU does."""

    @staticmethod
    def forward(ctx, x, model):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = model(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        with ThreadPoolExecutor(1) as thread:
            return *thread.submit(torch.autograd.grad, ctx.y, ctx.x, grad).result(), None


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_in_a_thread_of_its_own(name):
    stock = frozen_statistics(with_statistics(Behind(FUNCTIONS[name]))).double()
    model = lowrank.convert(copy.deepcopy(stock), ["conv", "head"], lowrank.Vanilla())
    x = random_tensor(2, 4, 8, 7).requires_grad_()
    y, basis = stock(x), torch.eye(6, dtype=x.dtype).view(-1, 2, 3)
    expected = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in basis]
    (found,) = torch.autograd.grad(InAnotherThread.apply(x, model), x, basis, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(expected), **TOLERANCE)


@pytest.mark.parametrize("method", EXACT, ids=lambda method: f"{method.tag}-{getattr(method, 'algorithm', '')}")
def test_methods(method):
    torch.manual_seed(0)
    stock = frozen_statistics(with_statistics(Behind(F.relu6))).double()
    model = lowrank.convert(copy.deepcopy(stock), ["conv", "head"], method)
    assert_same_jacobian(stock, model, random_tensor(2, 4, 8, 7).requires_grad_())


def test_attention():
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = copy.deepcopy(stock)
    names = lowrank.trailing_layers(model, "all", kind="linear")
    assert_same_jacobian(
        stock, lowrank.convert(model, names, lowrank.Vanilla()), random_tensor(2, 3, 8).requires_grad_()
    )


def test_factored_weights():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2)).double()
    model = lowrank.convert(copy.deepcopy(stock), ["0"], lowrank.WSI(1.0))
    x = random_tensor(3, 4, 6)
    y, left = model(x), model[0].left
    expected = [torch.autograd.grad(one, left, retain_graph=True)[0] for one in y.flatten()]
    basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    (found,) = torch.autograd.grad(y, left, basis, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(expected), **TOLERANCE)

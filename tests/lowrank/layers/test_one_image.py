"""One image whose tokens are put in order for convolutions: PyTorch's batch normalisation takes a tensor with the
strides that it then has for a contiguous one, if the other of input and gradient is. The reference has every tensor
contiguous.
"""

import copy
from itertools import product

import pytest
import torch
from references import TOLERANCE, random_tensor
from torch import nn

import lowrank

PLACES = {2: (4, 6), 3: (2, 3, 4)}
CONVOLUTIONS, NORMS = {2: nn.Conv2d, 3: nn.Conv3d}, {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ORDERS = (
    ("norm", "conv", "norm1", "act", "conv1", "norm2"),
    ("norm", "act", "conv", "act", "conv1", "norm2"),
    ("conv", "norm1", "act", "conv1"),
    ("conv", "act", "conv1", "norm2", "act"),
)


class Tokens(nn.Module):
    """Linear layers around convolutions of one by one."""

    def __init__(self, dimensions, order):
        super().__init__()
        conv, norm = CONVOLUTIONS[dimensions], NORMS[dimensions]
        self.places, self.order, self.contiguous = PLACES[dimensions], order, False
        self.first, self.last = nn.Linear(4, 6), nn.Linear(4, 3)
        self.norm, self.conv, self.norm1 = norm(6), conv(6, 5, 1), norm(5)
        self.act, self.conv1, self.norm2 = nn.ReLU(), conv(5, 4, 1), norm(4)

    def forward(self, tokens):
        z = self._ordered(self.first(tokens).transpose(1, 2).unflatten(2, self.places))
        for name in self.order:
            z = self._ordered(getattr(self, name)(z))
        return self.last(z.flatten(2).transpose(1, 2))

    def _ordered(self, z):
        if not self.contiguous:
            return z
        return _InOrder.apply(z)


class _InOrder(torch.autograd.Function):
    """The same tensor and gradient, each in the order of its dimensions."""

    @staticmethod
    def forward(ctx, z):
        return z.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("method", [lowrank.Vanilla(), lowrank.ASI(ranks=99)], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_tokens_of_one_image_have_the_gradients_of_contiguous_ones(dimensions, order, method, fuse):
    for training, dtype in product((True, False), (torch.float64, torch.float32)):
        torch.manual_seed(0)
        plain = Tokens(dimensions, order).to(dtype)
        for module in plain.modules():
            if isinstance(module, tuple(NORMS.values())):
                module.train(training)
        own = copy.deepcopy(plain)
        plain.contiguous = True
        kinds = (nn.Linear, CONVOLUTIONS[dimensions])
        lowrank.convert(own, [n for n, m in own.named_modules() if isinstance(m, kinds)], method, fuse=fuse)
        x, grad = random_tensor(1, 24, 4, dtype=dtype), random_tensor(1, 24, 3, seed=1, dtype=dtype)

        def gradients(net, x=x, grad=grad):
            x = x.clone().requires_grad_()
            return torch.autograd.grad(net(x), [x, *net.parameters()], grad, allow_unused=True)

        tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(gradients(own), gradients(plain), **tolerance)


def _layouts(x):
    """The tensor in every order of its dimensions in memory, also with strides of no meaning where its size is 1."""
    for order in torch.cartesian_prod(*[torch.arange(x.ndim)] * x.ndim).tolist():
        if len(set(order)) == x.ndim:
            y = x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])
            yield y
            yield y.as_strided(y.shape, [5 + at if n == 1 else y.stride(at) for at, n in enumerate(y.shape)])


SHAPES = [(1, 3, 2, 4), (1, 3, 1, 4), (2, 1, 2, 4), (1, 3, 2, 1), (1, 3, 2, 2, 3), (2, 3, 1, 2, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_normalisation_has_the_same_gradients_in_every_order_in_memory(shape):
    x, grad = random_tensor(*shape), random_tensor(*shape, seed=1)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d)(3 if shape[1] == 3 else 1).to(x)
    own = lowrank.convert(nn.Sequential(copy.deepcopy(norm), nn.Linear(1, 1)), ["1"], lowrank.Vanilla())[0]
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(norm(leaf), [leaf, *norm.parameters()], grad)
    step = 1 if len(shape) == 4 else 17
    for place, order in product(list(_layouts(x))[::step], list(_layouts(grad))[::step]):
        leaf = place.detach().requires_grad_()
        found = torch.autograd.grad(own(leaf), [leaf, *own.parameters()], order)
        torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_batch_of_gradients_is_taken_one_by_one(dimensions, order, training):
    torch.manual_seed(0)
    own = Tokens(dimensions, order).double()
    for module in own.modules():
        if isinstance(module, tuple(NORMS.values())):
            module.train(training)
    lowrank.convert(own, ["first", "last", "conv", "conv1"], lowrank.Vanilla())
    x, grads, parameters = random_tensor(1, 24, 4), random_tensor(3, 1, 24, 3, seed=1), list(own.parameters())
    found = torch.autograd.grad(own(x), parameters, grads, is_grads_batched=True, allow_unused=True)
    for at, grad in enumerate(grads):
        wanted = torch.autograd.grad(own(x), parameters, grad, allow_unused=True)
        for batch, one in zip(found, wanted, strict=True):
            assert (batch is None) == (one is None)
            if one is not None:
                torch.testing.assert_close(batch[at], one, **TOLERANCE)

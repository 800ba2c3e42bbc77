"""Gradients that a method has of its own are used wherever the layer is, though it keeps the input as it is."""

import copy
from dataclasses import dataclass

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank import Vanilla


@dataclass(frozen=True)
class DoubledWeight(Vanilla):
    """Twice the weight gradient."""

    def weight_gradient(self, kept, grad, geometry, shape):
        return 2 * super().weight_gradient(kept, grad, geometry, shape)


@dataclass(frozen=True)
class DoubledBias(Vanilla):
    """Twice the weight gradient and the bias gradient, formed at once."""

    def weight_gradient(self, kept, grad, geometry, shape):
        return 2 * super().weight_gradient(kept, grad, geometry, shape)

    def gradients(self, kept, grad, geometry, shape):
        return self.weight_gradient(kept, grad, geometry, shape), 2 * geometry.bias_gradient(grad)


@dataclass(frozen=True)
class DoubledInput(Vanilla):
    """Twice the input gradient."""

    def input_gradient(self, grad, weight, geometry, shape):
        return 2 * super().input_gradient(grad, weight, geometry, shape)


@dataclass(frozen=True)
class DoubledKept(Vanilla):
    """Twice the input, of which the gradient follows."""

    def compress(self, x, geometry, state, name):
        return (2 * x,), ()


class OfDoubledWeight(DoubledWeight):
    """Inherits them."""


FACTORS = {  # of the gradients of weight, bias and input, by the stock layer's
    DoubledWeight: (2, 1, 1),
    DoubledBias: (2, 2, 1),
    DoubledInput: (1, 1, 2),
    DoubledKept: (2, 1, 1),
    OfDoubledWeight: (2, 1, 1),
}


class Block(nn.Module):
    """A layer whose input can be computed again."""

    def __init__(self, ahead, layer):
        super().__init__()
        self.ahead, self.gelu, self.layer = ahead, nn.GELU(), layer

    def forward(self, x):
        return self.layer(self.gelu(self.ahead(x)))


def _layer(kind):
    """A block, and an input of it."""
    if kind == "linear":
        return Block(nn.Linear(5, 40), nn.Linear(40, 3)).double(), random_tensor(4, 5)
    return Block(nn.Conv2d(5, 40, 1), nn.Conv2d(40, 3, 3)).double(), random_tensor(4, 5, 6, 6)


def _gradients(model, x):
    x = x.clone().requires_grad_()
    (model(x) * torch.linspace(-1, 1, 3, dtype=x.dtype).view(-1, *[1] * (x.ndim - 2))).sum().backward()
    return model.layer.weight.grad, model.layer.bias.grad, x.grad


def _converted(model, method, way):
    converted = copy.deepcopy(model)
    again = "again" in way
    if again:
        lowrank.convert(converted, ["ahead"], Vanilla())
    lowrank.convert(converted, ["layer"], method, recompute=again, smallest=1e9 if "smallest" in way else 0)
    if "compiled" in way:
        torch._dynamo.reset()
        converted.compile(backend="aot_eager")
    return converted


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("way", ["plain", "smallest", "compiled", "compiled smallest", "again"])
@pytest.mark.parametrize("method", FACTORS)
def test_gradients_of_ones_own_are_never_the_stock_layers(method, way, kind):
    model, x = _layer(kind)
    converted = _converted(model, method(), way)
    expected = [factor * grad for factor, grad in zip(FACTORS[method], _gradients(model, x), strict=True)]
    for own, right in zip(_gradients(converted, x), expected, strict=True):
        torch.testing.assert_close(own, right)


@pytest.mark.parametrize("method", FACTORS)
def test_of_such_a_method_is_not_said_that_it_keeps_the_input_alone(method):
    assert not method.keeps_input


def test_a_subclass_that_changes_none_of_it_keeps_the_input():
    @dataclass(frozen=True)
    class Named(Vanilla):
        @property
        def tag(self):
            return "named"

    kept = [method.keeps_input for method in (Vanilla, Named, lowrank.WSI, lowrank.ASI)]
    assert kept == [True, True, True, False]

"""Bits of activations in a compiled graph, against the stock modules."""

import copy
import math
from functools import partial

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank import Vanilla
from lowrank.exact.bits_in_graph import packed, unpacked

ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.25, inplace=True)),
    *(nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, inplace=True)),
    *(nn.LeakyReLU(0.0), nn.LeakyReLU(-0.5)),
]


class Around(nn.Module):
    """An activation, whose input may be read again after it, as it is then."""

    def __init__(self, activation):
        super().__init__()
        self.linear, self.activation = nn.Linear(1, 1), activation

    def forward(self, x):
        x = x * 2
        y = self.activation(x)
        return y * 3 + x if getattr(self.activation, "inplace", False) else y * 3


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (2, 3, 5, 7), (0, 4)])
def test_packed_and_back(shape):
    mask = torch.rand(shape) > 0.5
    bits = packed(mask)
    assert (bits.dtype, bits.shape) == (torch.uint8, (math.ceil(mask.numel() / 8),))
    assert torch.equal(unpacked(bits, mask.shape), mask)


class Several(nn.Module):
    """Some of these side by side, each with an input of its own, compiled at once."""

    def __init__(self, activations):
        super().__init__()
        self.each = nn.ModuleList(Around(copy.deepcopy(activation)) for activation in activations)

    def forward(self, inputs):
        return [one(x) for one, x in zip(self.each, inputs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "activations"),
    [(torch.float32, ACTIVATIONS), (torch.bfloat16, [nn.ReLU6(), nn.Hardsigmoid()])],
    ids=["float32", "bfloat16"],
)
def test_values_and_gradients_are_the_stock_modules_bit_for_bit(dtype, activations):
    """Of numbers at the limits, NaN and infinities as well, in either memory layout; compiled, as by NaN PyTorch's own
    operators differ from place to place in a tensor."""
    torch._dynamo.reset()
    stock = Several(activations)
    names = [f"each.{at}.linear" for at in range(len(activations))]
    model = lowrank.convert(copy.deepcopy(stock), names, Vanilla(), smallest=0)
    compiled = partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    fast, stock = compiled(model), compiled(stock)
    numbers = random_tensor(2, 3, 5, 7).to(dtype)
    special = [0.0, -0.0, 3.0, -3.0, 1.5, -1.5, 0.125, -0.25, math.nan, math.inf, -math.inf]
    numbers.view(-1)[: len(special)] = torch.tensor(special, dtype=dtype)
    for x in (numbers.contiguous(memory_format=torch.channels_last), numbers[0, 0, :3], numbers[:0]):
        found = []
        for forward in (fast, stock):
            given = [x.clone().requires_grad_() for _ in activations]
            outputs = forward(given)
            weights = random_tensor(*x.shape).to(dtype)
            sum((y * weights).sum() for y in outputs).backward()
            found.append([(y.detach(), one.grad) for y, one in zip(outputs, given, strict=True)])
        for activation, own, right in zip(activations, *found, strict=True):
            torch.testing.assert_close(own, right, rtol=0, atol=0, equal_nan=True, msg=str(activation))


@pytest.mark.slow
@pytest.mark.parametrize("activation", [ACTIVATIONS[at] for at in (1, 3, 4, 6, 8)], ids=str)
def test_what_is_kept_is_a_bit_for_each_number(activation):
    torch._dynamo.reset()
    x = random_tensor(64, 64, dtype=torch.float32).requires_grad_()
    loss = lambda model, x: model(x * 2).sum()  # noqa: E731
    body = lowrank.convert(Around(copy.deepcopy(activation)), ["linear"], Vanilla(), smallest=0).activation
    fast = torch.compile(body, backend="aot_eager_decomp_partition", fullgraph=True)
    assert lowrank.saved_bytes(fast, loss, x) == x.numel() // 8


@pytest.mark.slow
def test_where_no_gradient_passes_and_where_small_ones_stay_whole_the_module_is_the_stock_one():
    torch._dynamo.reset()
    model = lowrank.convert(Around(nn.ReLU6()), ["linear"], Vanilla())  # with the rule of `smallest`
    for x in (random_tensor(3, 4), random_tensor(3, 4).requires_grad_()):
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))

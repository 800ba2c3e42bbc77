"""Normalisation, sum and limits that are computed again in one pass, in sums of every kind, against the stock model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank

MASK = torch.arange(2 * 6 * 8 * 8).remainder(3).view(2, 6, 8, 8)


def in_place(y, other):
    y += other
    return y


SUMS = {
    "of the same kind": lambda y, other: y + other,
    "in place": in_place,
    "with half the precision": lambda y, other: y + other.bfloat16(),
    "with half the precision, in place": lambda y, other: in_place(y, other.bfloat16()),
    "with twice the precision, in place": lambda y, other: in_place(y, other.double()),
    "with twice the precision, in place, of what is read": lambda y, other: (
        torch.sigmoid(y) + F.gelu(in_place(y, other.double()))
    ),
    "with whole numbers": lambda y, other: y + MASK.to(torch.uint8),
    "with whole numbers, in place": lambda y, other: in_place(y, MASK.to(torch.int8)),
    "with one number a channel": lambda y, other: y + other.mean((2, 3), keepdim=True),
    "with one sample": lambda y, other: other[:1] + y,
    "with a multiple": lambda y, other: torch.add(y, other, alpha=2),
    "with a multiple, in place": lambda y, other: y.add_(other, alpha=-2),
    "with itself": lambda y, other: y + y,
    "with itself, in place": lambda y, other: in_place(y, y),
    "laid out otherwise": lambda y, other: y + other.to(memory_format=torch.channels_last),
}


class Residual(nn.Module):
    def __init__(self, combine):
        super().__init__()
        self.combine, self.named = combine, F.relu  # as far as can be seen, any output may reach it
        self.first, self.norm, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.second(F.relu(self.combine(self.norm(self.first(x)), self.other(x))))


@pytest.mark.parametrize("combine", SUMS)
def test_gradients_are_stocks(combine):
    torch.manual_seed(0)
    stock = Residual(SUMS[combine])
    own = lowrank.convert(copy.deepcopy(stock), ["first", "second", "other"], lowrank.Vanilla())
    x, grad = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
    found = []
    for model in (own, stock):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        found.append([y, *torch.autograd.grad(y, [leaf, *model.parameters()], grad, allow_unused=True)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

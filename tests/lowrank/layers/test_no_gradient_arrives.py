"""Where no gradient arrives at a converted part, as from a function that gives None, none is given: not zeros."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank


class GivesNone(torch.autograd.Function):
    """Reads its input, and has no gradient for it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(6, 12)

    def forward(self, x):
        y = self.norm(x.permute(0, 2, 3, 1))
        return F.silu(self.gate(y)) * self.up(y)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.projected = nn.LayerNorm(6), nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = self.projected(self.norm(x.flatten(2).transpose(1, 2))).chunk(3, -1)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def behind_convolution(*modules):
    return lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), *copy.deepcopy(modules))


PARTS = {
    "convolution": behind_convolution(),
    "frozen statistics": behind_convolution(nn.BatchNorm2d(6).eval(), nn.ReLU()),
    "batch statistics": behind_convolution(nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 6, 1)),
    "activations": behind_convolution(nn.ReLU(), nn.Conv2d(6, 6, 1), nn.SiLU(), nn.Conv2d(6, 6, 1), nn.LeakyReLU()),
    "dropout": behind_convolution(nn.Dropout(0.5)),
    "pooling": behind_convolution(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)),
    "group normalisation": behind_convolution(nn.GroupNorm(2, 6), nn.GELU(), nn.Conv2d(6, 6, 1)),
    "gate": Gate,
    "attention": Attention,
}
METHODS = [lowrank.Vanilla(), lowrank.ASI(ranks=[2, 2, 2, 2]), lowrank.HOSVD(energy=0.9)]


def found(model, x):
    """Gradients of the input and the parameters of a loss that follows from the model's output, and not by autograd."""
    x = x.clone().requires_grad_()
    leaf = torch.ones((), requires_grad=True)
    (GivesNone.apply(model(x)).sum() * leaf).backward()
    assert leaf.grad is not None
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("part", PARTS)
def test_no_gradient_is_given(part):
    torch.manual_seed(0)
    stock, x = PARTS[part](), torch.randn(3, 6, 9, 9)
    kind = "linear" if part in ("gate", "attention") else "conv"
    own = copy.deepcopy(stock)
    lowrank.convert(own, lowrank.trailing_layers(own, "all", kind=kind), lowrank.Vanilla())
    assert found(stock, x) == [None] * (1 + len(list(stock.parameters())))
    assert found(own, x) == found(stock, x)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_whatever_a_layer_keeps(method):
    model = PARTS["activations"]()
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), method, everywhere=True)
    assert not any(grad is not None for grad in found(model, torch.randn(3, 6, 9, 9)))


def test_factored_weights_do_not_decay():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    lowrank.convert(model, ["0", "2"], lowrank.WSI(energy=0.9))
    assert not any(grad is not None for grad in found(model, torch.randn(4, 8)))


def test_what_a_checkpoint_does_not_use_does_not_decay():
    """A reentrant checkpoint gives None for an argument that its output does not follow from."""
    torch.manual_seed(0)
    stock = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    own = lowrank.convert(copy.deepcopy(stock), ["0", "1"], lowrank.Vanilla())
    x, weights = torch.randn(2, 3, 5, 5), []
    for one, two in (stock, own):
        optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1, weight_decay=0.5)
        checkpoint(lambda unused, used: used.square(), one(x), two(x), use_reentrant=True).sum().backward()
        optimizer.step()
        weights.append([one.weight.detach(), two.weight.detach()])
    torch.testing.assert_close(weights[1], weights[0])

"""Modules that are left whole call their operators directly, and nobody can tell but by the time."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from references import DEVICE, random_tensor
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank

CASES = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 7, 6)),
    "convolution, reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 7, 6)),
    "linear": (lambda: nn.Linear(6, 3), (2, 4, 6)),
    "normalisation": (lambda: nn.BatchNorm2d(4).eval(), (2, 4, 3, 3)),
    "normalisation by the batch": (lambda: nn.BatchNorm2d(4, momentum=None), (2, 4, 3, 3)),
    "normalisation without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(), (2, 4, 3, 3)),
    "normalisation without scale": (lambda: nn.BatchNorm2d(4, affine=False).eval(), (2, 4, 3, 3)),
    "relu": (nn.ReLU, (2, 4, 3, 3)),
    "relu in place": (lambda: nn.ReLU(inplace=True), (2, 4, 3, 3)),
    "relu6": (nn.ReLU6, (2, 4, 3, 3)),
    "relu6 in place": (lambda: nn.ReLU6(inplace=True), (2, 4, 3, 3)),
    "hardtanh in place": (lambda: nn.Hardtanh(-0.3, 0.4, inplace=True), (2, 4, 3, 3)),
}


def both(case):
    """A stock module and the same converted, behind a layer whose output may be changed in place, and an input."""
    make, shape = CASES[case]
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(4, 4, 1), make()) if len(shape) == 4 else nn.Sequential(nn.Linear(6, 6), make())
    own = copy.deepcopy(stock)
    lowrank.convert(
        own, ["0"] if not hasattr(stock[1], "in_channels") else ["0", "1"], lowrank.Vanilla(), smallest=math.inf
    )
    return stock.train(stock[1].training), own, random_tensor(*shape).float()


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return [y.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function, [a for a in args if not isinstance(a, torch.Tensor)]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("autocast", [False, True])
def test_same_values_and_same_operators(case, autocast):
    if case == "convolution, reflected" and DEVICE == "cuda":
        pytest.skip("a GPU adds up what was reflected in no fixed order")
    stock, own, x = both(case)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            assert all(torch.equal(*pair) for pair in zip(step(own, x), step(stock, x), strict=True))
    seen = []
    for model in (stock, own):
        with Operators() as operators:
            model(x)
        seen.append(operators.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("case", CASES)
def test_a_mode_sees_the_functions_that_the_stock_module_calls(case):
    stock, own, x = both(case)
    step(own, x), step(own, x)
    seen, public = [], [*vars(F).values(), torch.conv2d]
    for model in (stock[1], own[1]):
        y = stock[0](x).detach()
        with Functions() as functions:
            model(y)
        seen.append([f for f in functions.seen if f in public])
    assert seen[0] == seen[1]


def test_pruned_and_given_parameters_are_used():
    stock, own, x = both("convolution")
    step(own, x), step(own, x)
    given = {name: 2 * value for name, value in stock.named_parameters()}
    assert torch.equal(functional_call(own, given, (x,)), functional_call(stock, given, (x,)))
    for model in (stock, own):
        prune.l1_unstructured(model[1], "bias", amount=3)
        prune.l1_unstructured(model[1], "weight", amount=0.5)
    assert all(torch.equal(*pair) for pair in zip(step(own, x), step(stock, x), strict=True))


def test_what_the_stock_module_refuses_is_refused():
    _, own, x = both("normalisation")
    step(own, x)
    with pytest.raises(ValueError, match="expected 4D input"):
        own[1](x[0])
    _, own, x = both("hardtanh in place")
    own[1].min_val = 1.0
    with pytest.raises(ValueError, match="min_val"):
        own[1](x)

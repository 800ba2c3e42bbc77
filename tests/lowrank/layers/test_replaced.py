"""While somebody's function stands in the place of PyTorch's own, a converted layer is the stock one, and says so."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, WASI, WSI, Vanilla
from lowrank.layers import replaced

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (4, 3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (4, 3, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (4, 3, 6, 6)),
    "linear": (lambda: nn.Linear(3, 4), (4, 5, 3)),
}


def results(model, x):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(random_tensor(*y.shape, seed=1))
    return [y.detach(), leaf.grad, *(one.grad for one in model.parameters())]


@pytest.mark.parametrize("smallest", [0, 2**30], ids=["kept less", "settled as stock"])
@pytest.mark.parametrize("method", [ASI(2), Vanilla()], ids=lambda method: method.tag)
@pytest.mark.parametrize("name", LAYERS)
def test_a_converted_layer_is_the_stock_one_while_its_function_is_replaced(name, method, smallest, monkeypatch):
    make, shape = LAYERS[name]
    stock, own, x = nn.Sequential(make().double()), getattr(F, name), random_tensor(*shape)
    model = lowrank.convert(copy.deepcopy(stock), ["0"], method, smallest=smallest)
    before = results(model, x)
    monkeypatch.setattr(replaced, "_told", set())
    with monkeypatch.context() as patch:
        patch.setattr(F, name, lambda x, weight, *further: own(x, 2 * weight, *further))
        with warnings.catch_warnings(record=True, action="always") as told:
            found = results(model, x)
            results(model, x)
        said = [f"layer '0': torch.nn.functional.{name} is test_replaced."]
        assert [str(one.message)[: len(said[0])] for one in told] == (said if not model[0]._lowrank.settled else [])
        for one, expected in zip(found, results(stock, x), strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=0)
        assert model[0]._lowrank.kept_bytes == x.nbytes
    model = lowrank.convert(copy.deepcopy(stock), ["0"], method, smallest=smallest)
    for one, expected in zip(results(model, x), before, strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("method", [WSI(energy=1.0), WASI(energy=1.0, ranks=[2, 2, 2])], ids=lambda method: method.tag)
def test_so_is_a_linear_layer_whose_weight_is_two_factors(method, monkeypatch):
    stock, own, x = nn.Sequential(nn.Linear(3, 4)).double(), F.linear, random_tensor(4, 5, 3)
    model = lowrank.convert(copy.deepcopy(stock), ["0"], method)
    before = results(model, x)[:2]
    with monkeypatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setattr(F, "linear", lambda x, weight, *further: own(x, 2 * weight, *further))
        y, grad, *_ = results(model, x)
        for one, expected in zip((y, grad), results(stock, x), strict=False):
            torch.testing.assert_close(one, expected)
        left, right = model[0].left, model[0].right
        torch.testing.assert_close(left.grad, stock[0].weight.grad @ right.T)
        torch.testing.assert_close(right.grad, left.T @ stock[0].weight.grad)
        with torch.no_grad():
            torch.testing.assert_close(model(x), stock(x))
    for one, expected in zip(results(model, x), before, strict=False):
        torch.testing.assert_close(one, expected)


@pytest.mark.slow
def test_so_it_is_under_a_compiler(monkeypatch):
    torch.manual_seed(0)
    stock, own, x = nn.Sequential(nn.Conv2d(3, 4, 3)), F.conv2d, random_tensor(4, 3, 6, 6, dtype=torch.float32)
    model = lowrank.convert(copy.deepcopy(stock), ["0"], ASI(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    less = results(compiled, x)
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", lambda x, weight, *further: own(x, 2 * weight, *further))
        for one, expected in zip(results(compiled, x), results(stock, x), strict=True):
            torch.testing.assert_close(one, expected)
    expected = results(lowrank.convert(copy.deepcopy(stock), ["0"], ASI(2)), x)
    for one, other in zip(less, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["relu", "batch_norm"])
def test_what_is_left_as_it_is_calls_what_stands_there(name, monkeypatch):
    """The operators that are called with less Python ahead of them, see `direct`."""
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    model, x = lowrank.convert(copy.deepcopy(stock), ["0"], Vanilla(), smallest=2**30), random_tensor(2, 3, 6, 6)
    own = getattr(F, name)
    for _ in range(3):
        results(model, x)
    with monkeypatch.context() as patch, warnings.catch_warnings(action="error"):
        patch.setattr(F, name, lambda *given, **named: 2 * own(*given, **named))
        for one, expected in zip(results(model, x), results(stock, x), strict=True):
            torch.testing.assert_close(one, expected)

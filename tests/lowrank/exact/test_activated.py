"""Convolution, normalisation and activation as one operator: where it is used, that it is equal, what is refused."""

import copy
import math

import pytest
import torch
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import ConversionError, Vanilla
from lowrank.exact import onednn as activated

CURVES = {"relu": nn.ReLU(), "relu6": nn.ReLU6(inplace=True), "hardtanh": nn.Hardtanh(-0.3, 0.7)}
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build has no oneDNN")


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    def __init__(self):
        super().__init__()
        self.counts = {}

    @property
    def fused(self):
        return self.counts.get("_convolution_pointwise", 0)


def network(activation, **options):
    layers = [nn.Conv2d(3, 6, 3, **options), nn.BatchNorm2d(6), copy.deepcopy(activation), nn.Conv2d(6, 4, 1)]
    return frozen_statistics(with_statistics(nn.Sequential(*layers)))


def frozen_ahead(model):
    """The network with its last layer converted and all ahead of it frozen."""
    lowrank.freeze_before(model, ["3"])
    return lowrank.convert(model, ["3"], Vanilla())


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": (1, 2)}, {"groups": 3, "dilation": 2, "bias": False}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_frozen_run_is_one_operator_and_equal(curve, options, layout):
    stock = network(CURVES[curve], **options)
    x = random_tensor(2, 3, 9, 8, dtype=torch.float32).contiguous(memory_format=layout)
    model = frozen_ahead(copy.deepcopy(stock))
    for _ in range(2):
        with Calls() as calls:
            y = model(x)
        assert calls.fused == 1
        assert not {"relu", "relu_", "hardtanh", "hardtanh_", "clamp"} & set(calls.counts)
        torch.testing.assert_close(y, stock(x), rtol=1e-5, atol=1e-5)
    gradient = random_tensor(*y.shape, seed=1, dtype=torch.float32)
    y.backward(gradient)
    stock(x).backward(gradient)
    torch.testing.assert_close(model[3].weight.grad, stock[3].weight.grad, rtol=1e-4, atol=1e-5)


def test_it_is_left_alone_where_a_gradient_is_needed_or_no_operator_fits():
    x = random_tensor(2, 3, 9, 8, dtype=torch.float32)
    stock = network(CURVES["relu"])
    trained = lowrank.convert(copy.deepcopy(stock), ["0"], Vanilla())
    other_padding = frozen_ahead(network(CURVES["relu"], padding=1, padding_mode="reflect"))
    double = frozen_ahead(copy.deepcopy(stock).double())
    with Calls() as calls:
        trained(x).sum().backward()
        other_padding(x)
        double(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            frozen_ahead(copy.deepcopy(stock))(x)
    assert not calls.fused
    torch.testing.assert_close(double(x.double()), stock.double()(x.double()))


class Residual(nn.Module):
    """One activation module that is called twice; the second time it reads a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.other_norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        y = self.relu(self.norm(self.first(x)))
        y = self.other_norm(self.second(y))
        return self.head(self.relu(y + x))


def test_an_activation_that_also_reads_something_else_still_activates_that():
    stock = frozen_statistics(with_statistics(Residual()))
    model = copy.deepcopy(stock)
    lowrank.freeze_before(model, ["head"])
    lowrank.convert(model, ["head"], Vanilla())
    x = random_tensor(2, 3, 6, 6, dtype=torch.float32)
    with Calls() as calls:
        y = model(x)
    assert calls.fused == 1
    torch.testing.assert_close(y, stock(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=1e-5, atol=1e-5)


def test_an_activation_with_a_hook_sees_its_own_input():
    stock, seen = network(CURVES["relu"]), []
    stock[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].min().item()))
    frozen_ahead(stock)(random_tensor(2, 3, 9, 8, dtype=torch.float32))
    assert min(seen) < 0


def test_an_activation_that_was_replaced_is_noticed():
    model, x = frozen_ahead(network(CURVES["relu"])), random_tensor(2, 3, 9, 8, dtype=torch.float32)
    model(x)
    model[2] = nn.Identity()
    model(x)
    with pytest.raises(ConversionError, match=r"'0'.*activation behind it was not called"):
        model(x)
    lowrank.revert(model)
    assert model(x).shape == (2, 4, 7, 6)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["input", "weight"])
def test_values_that_are_not_finite_come_through_as_in_the_stock_model(curve, value, place):
    stock, x = network(CURVES[curve]), random_tensor(2, 3, 9, 8, dtype=torch.float32)
    with torch.no_grad():
        (x if place == "input" else stock[0].weight)[1, 0, 2, 2] = value
    torch.testing.assert_close(frozen_ahead(stock)(x), stock(x), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("change", "looks"), [(lambda y: y, 1), (lambda y: y.mul_(2), 2)], ids=["as it is", "changed"])
def test_a_bounded_output_is_looked_at_only_if_it_was_changed(monkeypatch, change, looks):
    layers = [nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU6()]
    stock = frozen_statistics(with_statistics(nn.Sequential(*layers, *copy.deepcopy(layers), nn.Conv2d(3, 2, 1))))
    model, seen = copy.deepcopy(stock), []
    lowrank.freeze_before(model, ["6"])
    lowrank.convert(model, ["6"], Vanilla())
    model[2].register_forward_hook(lambda module, args, output: change(output))
    stock[2].register_forward_hook(lambda module, args, output: change(output))
    finite = activated._finite
    monkeypatch.setattr(activated, "_finite", lambda *tensors: seen.append(tensors[-1] is not None) or finite(*tensors))
    x = random_tensor(2, 3, 9, 8, dtype=torch.float32)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)
    assert sum(seen) == looks

"""Taken back, a model is what it was: classes, attributes, outputs, whatever was converted in what order."""

import copy

import pytest
import torch
from block_cases import NETWORKS, convolutions, network, results
from conversion_cases import snapshot
from references import TwoConvolutions, labelled_batch, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, GradientFilter, Vanilla


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_very_same_network(name, fuse):
    model, x = network(name), random_tensor(2, 3, 13, 12)
    before, expected = snapshot(model), results(model, x)
    lowrank.convert(model, convolutions(model), ASI(3), fuse=fuse)
    results(model, x)
    model.zero_grad()
    assert lowrank.revert(model) is model
    assert snapshot(model) == before
    found = results(model, x)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_attention_is_closed_again():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = [(id(module), type(module)) for module in model.modules()]
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    lowrank.convert(model, ["linear1"], Vanilla())
    lowrank.revert(model)
    assert [(id(module), type(module)) for module in model.modules()] == before
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names
    assert not any("lowrank" in key for module in model.modules() for key in vars(module))


class Nested(nn.Module):
    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.conv, self.norm = inner, nn.Conv2d(width, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return nn.functional.relu(self.norm(self.conv(self.inner(x))))


@pytest.mark.parametrize("order", [("inner", "whole"), ("whole", "inner"), ("whole", "whole"), ("inner", "inner")])
def test_a_part_and_the_whole_in_any_order(order):
    model = Nested(Nested(nn.Identity(), 3), 4).eval()
    before, x = snapshot(model), random_tensor(2, 3, 6, 5, dtype=torch.float32)
    expected = model(x)
    for place in order:
        lowrank.convert(model if place == "whole" else model.inner, ["conv"], Vanilla())
        torch.testing.assert_close(model(x), expected)
    lowrank.revert(model)
    assert snapshot(model) == before


def test_of_a_part_leaves_the_rest_converted():
    model = lowrank.convert(Nested(Nested(nn.Identity(), 3), 4).eval(), ["conv", "inner.conv"], HOSVD(1.0))
    stock, x = copy.deepcopy(model), random_tensor(2, 3, 6, 5, dtype=torch.float32)
    lowrank.revert(stock)
    lowrank.revert(model.inner)
    assert [type(module) for module in model.inner.modules()] == [type(module) for module in stock.inner.modules()]
    assert list(lowrank.converted_layers(model)) == [model.conv]
    torch.testing.assert_close(model(x), stock(x))


def test_twice_and_of_a_model_that_was_never_converted():
    model = TwoConvolutions()
    before = snapshot(model)
    lowrank.revert(model)
    assert snapshot(model) == before
    lowrank.convert(model, ["first"], GradientFilter(2))
    lowrank.revert(lowrank.revert(model))
    assert snapshot(model) == before


def test_between_forward_and_backward_the_gradients_are_still_those_of_the_forward_pass():
    stock = TwoConvolutions().double()
    model, (x, _) = copy.deepcopy(stock), labelled_batch(dtype=torch.float64)
    stock(x).square().sum().backward()
    y = lowrank.convert(model, ["first", "second"], HOSVD(1.0))(x)
    lowrank.revert(model)
    y.square().sum().backward()
    for found, expected in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_a_layer_parametrized_after_the_conversion_keeps_its_parametrization():
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    model, x = lowrank.convert(copy.deepcopy(stock), ["0"], Vanilla()), random_tensor(2, 3, 6, 5)
    for network_ in (stock, model):
        nn.utils.parametrizations.weight_norm(network_[0])
    torch.testing.assert_close(model(x), stock(x))
    lowrank.revert(model)
    torch.testing.assert_close(model(x), stock(x))


def test_settings_changed_meanwhile_are_kept():
    model = lowrank.convert(TwoConvolutions(), ["first", "head"], ASI(2))
    model.first.stride, model.head.note = (2, 2), "mine"
    model.head.bias = None
    lowrank.revert(model)
    assert model.first.stride == (2, 2)
    assert model.head.note == "mine"
    assert model.head.bias is None

"""Layers whose weight was parametrised ahead of the conversion: it is computed, and hands its gradient on."""

import copy

import pytest
import torch
from references import TOLERANCE, random_tensor
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lowrank
from lowrank import ASI, Vanilla

NAMES = ["0", "3", "6"]


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 5)).double()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[3])
    parametrizations.orthogonal(model[6])
    model[1].running_var.uniform_(0.5, 2)
    return model


def steps(model, x):
    """Two steps of gradient descent: outputs, gradients, and what is held behind them."""
    found = []
    for _ in range(2):
        y = model(x)
        y.backward(random_tensor(*y.shape, seed=1))
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((y.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}))
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.01)
                p.grad = None
    return found


@pytest.mark.parametrize("method", [Vanilla(), ASI(999)], ids=["vanilla", "full ranks"])
@pytest.mark.parametrize("training", [True, False])
def test_two_steps_are_stocks(training, method):
    stock = network().train(training)
    model = lowrank.convert(copy.deepcopy(stock), NAMES, method)
    x = random_tensor(2, 3, 6, 6)
    torch.testing.assert_close(steps(model, x), steps(stock, x), **TOLERANCE)


def test_a_conversion_computes_no_weight_and_changes_no_state():
    class Refusing(nn.Module):
        def forward(self, weight):
            assert not armed
            return 2 * weight

    armed = False
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 4))
    for at in (0, 3):
        parametrize.register_parametrization(model[at], "weight", Refusing())
    armed = True
    assert lowrank.trailing_layers(model, "all") == ["0"]
    assert lowrank.check(model, ["0", "3"], Vanilla()) == []
    lowrank.convert(model, ["0"], ASI(2))
    lowrank.revert(model)


def test_the_state_dict_is_stock_and_revert_and_deepcopy_give_the_layer_back():
    stock = network()
    model = copy.deepcopy(stock)
    kinds = [type(layer) for layer in model]
    lowrank.convert(model, NAMES, ASI(2))
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict())
    x, twin = random_tensor(2, 3, 6, 6), copy.deepcopy(model)
    lowrank.revert(model)
    assert [type(layer) for layer in model] == kinds
    for one in (model, twin, lowrank.revert(twin)):
        torch.testing.assert_close(one.eval()(x), copy.deepcopy(stock).eval()(x))


def test_a_parametrisation_is_taken_off_a_converted_layer():
    model = lowrank.convert(network().eval(), NAMES, ASI(2))
    x = random_tensor(2, 3, 6, 6)
    wanted = model(x)
    for name in ("0", "3", "6"):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    torch.testing.assert_close(model(x), wanted)
    assert model[0]._lowrank.kept_bytes < x.nbytes
    lowrank.revert(model)
    assert [type(model[at]) for at in (0, 3, 6)] == [nn.Conv2d, nn.Conv2d, nn.Linear]


def test_a_frozen_one_keeps_nothing():
    model = network().requires_grad_(False).eval()
    model[6].requires_grad_(True)
    lowrank.convert(model, ["6"], Vanilla())
    kept = lowrank.saved_bytes(model, lambda m, x: m(x).sum(), random_tensor(2, 3, 6, 6))
    stock = lowrank.saved_bytes(lowrank.revert(model), lambda m, x: m(x).sum(), random_tensor(2, 3, 6, 6))
    assert 2 * 64 * 8 <= kept <= stock

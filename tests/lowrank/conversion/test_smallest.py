"""Small inputs are kept as they are where `smallest` says so: the stock layer, to the last bit."""

import copy
import math
import pickle

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, WASI, WSI, SettingError, Vanilla

RANKS = (2, 3, 2, 2)
PRICES = (0, 1, 8, 64, 512, 4096, math.inf)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True)]
    layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.Hardswish(), nn.Dropout(0.2), nn.Conv2d(16, 4, 3)]
    model = nn.Sequential(*layers).train()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.5, 2)
            layer.eval()
    return model


def loss(model, x):
    return model(x).square().sum()


def step(model, x):
    torch.manual_seed(1)
    value = loss(model, x)
    model.zero_grad()
    value.backward()
    return [value.detach(), *(parameter.grad for parameter in model.parameters())]


def converted(method, **options):
    model = network()
    return lowrank.convert(model, lowrank.trailing_layers(model, "all"), method, **options)


@pytest.mark.parametrize("method", [Vanilla(), ASI(RANKS)], ids=str)
def test_where_nothing_is_worth_it_the_step_is_stock_s(method):
    x = random_tensor(2, 3, 12, 10).float()
    stock, own = network(), converted(method, smallest=math.inf)
    for _ in range(3):  # from the second on, it is known ahead
        assert all(torch.equal(*pair) for pair in zip(step(own, x), step(stock, x), strict=True))
    assert lowrank.saved_bytes(own, loss, x) == lowrank.saved_bytes(stock, loss, x)


def test_factored_weights_then_get_the_gradients_of_the_exact_input():
    x, found = random_tensor(4, 5, 6).float(), []
    for method, options in ((WSI(0.9), {}), (WASI(2, energy=0.9), {"smallest": math.inf})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        found.append(step(lowrank.convert(model, ["0", "2"], method, **options), x))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("method", [Vanilla(), ASI(RANKS)], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 24, 20), (8, 3, 48, 48)], ids=str)
def test_a_higher_price_keeps_more_and_never_more_than_stock(method, shape):
    """But where something is computed again, which an input that is kept whole may serve."""
    x, options = random_tensor(*shape).float(), {"recompute": False}
    kept = [lowrank.saved_bytes(converted(method, smallest=price, **options), loss, x) for price in PRICES]
    assert kept == sorted(kept)
    assert kept[0] == lowrank.saved_bytes(converted(method, **options), loss, x), "without a price all is kept less"
    assert kept[0] < kept[-1] <= lowrank.saved_bytes(network(), loss, x)


def test_each_batch_is_judged_by_its_own_size():
    """A small one leaves the bases of the large ones as they are."""
    own, names = converted(ASI(RANKS), smallest=64), ["3"]
    small, large = random_tensor(1, 3, 8, 8).float(), random_tensor(16, 3, 64, 64).float()
    assert lowrank.account(own, names, small).whole == ("3",)
    assert lowrank.account(own, names, large).whole == ()
    step(own, large)
    before = copy.deepcopy(lowrank.training_state(own))
    found, exact = step(own, small), step(network(), small)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lowrank.training_state(own), before, rtol=0, atol=0)


def test_a_layer_that_is_known_to_stay_stock_s_is_judged_anew_once_it_is_another():
    own, x = converted(ASI(RANKS), smallest=math.inf), random_tensor(2, 3, 12, 10).float()
    step(own, x)
    assert (own[3]._lowrank.kept_bytes, own[3]._lowrank.whole) == (2 * 8 * 12 * 10 * 4, True)
    wide = own.double()
    step(wide, x.double())
    assert own[3]._lowrank.kept_bytes == 2 * 8 * 12 * 10 * 8
    step(own.float(), random_tensor(1, 3, 12, 10).float())
    assert own[3]._lowrank.kept_bytes == 8 * 12 * 10 * 4
    own[3].weight.requires_grad_(False)
    assert lowrank.account(own, ["3"], x).total.activation_bytes == 0
    lowrank.convert(own, ["0"], ASI(RANKS))
    stock = network()
    stock[3].weight.requires_grad_(False)
    assert lowrank.saved_bytes(own, loss, x) < lowrank.saved_bytes(stock, loss, x) / 2, "without a price it keeps less"


def test_account_and_explanation_say_so():
    x, names = random_tensor(2, 3, 12, 10).float(), ["0", "3", "7"]
    stock = lowrank.account(network(), names, x)
    plain, own = converted(ASI(RANKS)), converted(ASI(RANKS), smallest=math.inf)
    found, less = lowrank.account(own, names, x), lowrank.account(plain, names, x)
    assert found.whole == ("0", "3", "7")
    assert less.whole == ()
    assert found.total == stock.total
    assert less.total.activation_bytes < stock.total.activation_bytes
    reasons = {row.module: row.reason for row in lowrank.explain(own, loss, x)}
    assert all("smallest of convert" in reasons[name] for name in ("0", "1"))
    assert not any("smallest of convert" in row.reason for row in lowrank.explain(plain, loss, x))


def test_methods_whose_bytes_the_shape_does_not_say_stay():
    x = random_tensor(2, 3, 12, 10).float()
    assert lowrank.account(converted(HOSVD(0.8), smallest=math.inf), ["3"], x).whole == ()


def test_a_price_that_is_none_changes_nothing():
    model = network()
    with pytest.raises(SettingError, match="from 0"):
        lowrank.convert(model, ["0"], Vanilla(), smallest=-1)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.slow
def test_what_a_layer_remembers_does_not_grow_with_every_size():
    layer = lowrank.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), ["0"], ASI(2), smallest=2**18)
    sizes = []
    for side in range(3, 303):
        layer(torch.rand(1, 3, 3, side)).sum().backward()
        sizes.append(len(pickle.dumps(layer)))
    assert sizes[-1] == sizes[-20], "a copy of the layer holds what it remembers"

"""What is ahead of everything that is trained: the stock network's values, and nothing is kept."""

import copy
import math

import pytest
import torch
from networks import frozen_statistics, with_statistics
from references import DEVICE, random_tensor
from torch import nn

import lowrank
from lowrank import Vanilla
from lowrank.layers import activated

CURVES = {"relu": nn.ReLU(), "relu6": nn.ReLU6(inplace=True), "hardtanh": nn.Hardtanh(-0.3, 0.7)}


def network(activation, **options):
    layers = [nn.Conv2d(3, 6, 3, **options), nn.BatchNorm2d(6), copy.deepcopy(activation), nn.Conv2d(6, 4, 1)]
    return frozen_statistics(with_statistics(nn.Sequential(*layers)))


def frozen_ahead(stock, last="3"):
    """The network with its last layer converted and all ahead of it frozen."""
    model = copy.deepcopy(stock)
    lowrank.freeze_before(model, [last])
    return lowrank.convert(model, [last], Vanilla())


def images(dtype=torch.float32):
    return random_tensor(2, 3, 9, 8, dtype=dtype)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": (1, 2)},
        {"groups": 3, "dilation": 2, "bias": False},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same"},
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(curve, options, layout):
    stock = network(CURVES[curve], **options)
    x, model = images().contiguous(memory_format=layout), frozen_ahead(stock)
    for _ in range(2):
        y = model(x)
        torch.testing.assert_close(y, stock(x), rtol=1e-5, atol=1e-5)
        assert y.stride() == stock(x).stride()
    gradient = random_tensor(*y.shape, seed=1, dtype=torch.float32)
    y.backward(gradient)
    stock(x).backward(gradient)
    torch.testing.assert_close(model[3].weight.grad, stock[3].weight.grad, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for layer in model[:3] for p in layer.parameters())


def test_nothing_is_kept_but_the_trained_layers_input():
    model, x = frozen_ahead(network(CURVES["relu"])), images()
    assert lowrank.saved_bytes(model, lambda m, b: m(b).sum(), x) == 4 * 2 * 6 * 7 * 6


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


def test_an_activation_that_is_called_twice():
    stock = frozen_statistics(with_statistics(Residual()))
    model, x = frozen_ahead(stock, "head"), images()
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_see_what_they_see_in_the_stock_network(place):
    stock, seen = network(CURVES["relu"]), []
    model = frozen_ahead(stock)
    for network_ in (stock, model):
        network_[place].register_forward_hook(lambda _, args, y: seen.append((args[0].clone(), y.clone())))
        network_(images())
    # In place, the activation's input is its output.
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_part_that_is_replaced_later(place, grad):
    stock = network(CURVES["relu6"])
    model, x = frozen_ahead(stock), images()
    model(x)
    for network_ in (stock, model):
        torch.manual_seed(1)
        network_[place] = [nn.Conv2d(3, 6, 3), nn.Identity(), nn.Hardswish()][place]
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["input", "weight"])
def test_values_that_are_not_finite_come_through(curve, value, place):
    stock, x = network(CURVES[curve]), images()
    with torch.no_grad():
        (x if place == "input" else stock[0].weight)[1, 0, 2, 2] = value
    model = frozen_ahead(stock)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    stock = network(CURVES["relu"])
    model, x = frozen_ahead(stock), images()
    with torch.autocast(DEVICE, dtype):
        found, expected = model(x), stock(x)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_an_unfrozen_layer_trains_again():
    stock = network(CURVES["relu"]).double()
    model, x = frozen_ahead(stock), images(torch.float64)
    model(x)
    model.requires_grad_(True)
    for network_ in (stock, model):
        y = network_(x)
        y.backward(random_tensor(*y.shape, seed=1))
    for (_, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.fixture(autouse=True, params=["by size", "always"])
def least(request, monkeypatch):
    """Small images take the path of large ones as well."""
    if request.param == "always":
        monkeypatch.setattr(activated, "LEAST", 1)


def operators(run):
    """The convolution operators that a run calls, by name."""
    with torch.profiler.profile() as profile:
        run()
    names = (
        "mkldnn::_convolution_pointwise",
        "aten::convolution",
        "aten::clamp_min_",
        "aten::hardtanh_",
        "aten::relu_",
    )
    return [event.name for event in profile.events() if event.name in names]


@pytest.mark.cpu_only("an operator of oneDNN")
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.Identity()])
@pytest.mark.parametrize("curve", ["relu6", "hardtanh"])
def test_convolution_normalisation_and_activation_are_one_operator(norm, curve, least):
    stock = nn.Sequential(nn.Conv2d(3, 6, 3), copy.deepcopy(norm), copy.deepcopy(CURVES[curve]), nn.Conv2d(6, 4, 1))
    stock = frozen_statistics(with_statistics(stock))
    model, x = frozen_ahead(stock), images()
    one = ["mkldnn::_convolution_pointwise", "aten::convolution"]
    assert (operators(lambda: model(x)) == one) == (activated.LEAST == 1)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)


class Between(nn.Module):
    """Something happens between normalisation and activation."""

    def __init__(self, what, inplace):
        super().__init__()
        self.conv, self.norm, self.what = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), what
        self.relu, self.head = nn.ReLU6(inplace), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = x.clone()
        y = self.norm(self.conv(x))
        z = self.what(self, x, y)
        return self.head(self.relu(y)) + z


def _nan(tensor):
    tensor[0, 0, 0, 0] = math.nan
    return tensor.sum()


BETWEEN = {
    "the image changes": lambda m, x, y: x.mul_(2).sum(),
    "the image becomes NaN": lambda m, x, y: _nan(x) * 0,
    "the output changes": lambda m, x, y: y.add_(1).sum(),
    "the output is read": lambda m, x, y: y.mean(),
    "a view of it is read later": lambda m, x, y: y[:, :1] * 1,
    "the normalisation changes": lambda m, x, y: m.norm.weight.data.mul_(2).sum() * 0,
    "its statistics change": lambda m, x, y: m.norm.running_mean.add_(1).sum() * 0,
    "the activation runs twice": lambda m, x, y: m.relu(m.relu(y)).sum(),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("what", BETWEEN)
def test_what_happens_between_normalisation_and_activation(what, inplace):
    stock = frozen_statistics(with_statistics(Between(BETWEEN[what], inplace)))
    model = frozen_ahead(stock, "head")
    found, expected = model(images()), stock(images())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_an_activated_output_that_becomes_nan_is_not_taken_for_bounded():
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Identity()]
    stock = frozen_statistics(with_statistics(nn.Sequential(*layers, *copy.deepcopy(layers[:3]), nn.Conv2d(6, 2, 1))))
    stock[4] = nn.Conv2d(6, 6, 3)
    stock[3].register_forward_hook(lambda _, args, y: (y[0, 0].fill_(math.nan), None)[1])
    model = frozen_ahead(stock, "7")
    expected = stock(images())
    assert expected[0].isnan().any()
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("trained", ["0", "1", "3"])
def test_an_input_of_inference_mode_passes_where_it_does_in_the_stock_network(trained):
    """Such as features that were computed once; a trained layer cannot keep it, in PyTorch either."""
    stock = network(nn.ReLU())
    lowrank.freeze_before(stock, [trained])
    own = lowrank.convert(copy.deepcopy(stock), ["0", "3"], Vanilla())
    with torch.inference_mode():
        x = images()
    grad, found = random_tensor(2, 4, 7, 6, dtype=torch.float32), []
    for model in (stock, own):
        if trained == "0":
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                model(x)
            continue
        model(x).backward(grad)
        found.append([parameter.grad for parameter in model.parameters()])
    if found:
        torch.testing.assert_close(found[1], found[0])

"""Convolutions of few products, computed again from their input with the normalisation and activation behind them."""

import copy

import pytest
import torch
from derived_cases import Sine
from references import TOLERANCE, random_tensor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import ASI, Vanilla

IMAGE = 2 * 3 * 8 * 8 * 8  # bytes, in double precision


def block(inside, outside, activation, **options):
    return [nn.Conv2d(inside, outside, **options), nn.BatchNorm2d(outside), activation]


class Inverted(nn.Module):
    """An inverted residual, as mobile networks have it."""

    def __init__(self, activation=nn.SiLU):
        super().__init__()
        depthwise = {"kernel_size": 3, "padding": 1, "groups": 24}
        self.body = nn.Sequential(
            *block(4, 24, activation(inplace=True), kernel_size=1),
            *block(24, 24, activation(inplace=True), **depthwise),
            *block(24, 4, nn.Identity(), kernel_size=1),
        )

    def forward(self, x):
        y = self.body(x)
        y += x
        return y


def network(activation=nn.SiLU, wide=False):
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3, padding=1)
    last = nn.Conv2d(4, 40, 9, padding=4) if wide else nn.Conv2d(4, 8, 1)  # 324 products per number
    model = nn.Sequential(
        first, Inverted(activation), Inverted(activation), last, nn.SiLU(), nn.Conv2d(last.out_channels, 2, 1)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.uniform_(-0.3, 0.3)
    return model.double().eval()


def converted(stock, method=None, **options):
    model = copy.deepcopy(stock)
    return lowrank.convert(model, lowrank.trailing_layers(model, "all"), method or Vanilla(), **options)


def steps(model, x):
    found = []
    for _ in range(2):
        model.zero_grad()
        y = model(x)
        y.backward(random_tensor(*y.shape, seed=1))
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=1e-3)
    return found


def kept(model):
    return lowrank.saved_bytes(model, lambda model, x: model(x).sum(), random_tensor(2, 3, 8, 8))


class Convolutions(TorchDispatchMode):
    """Counts forward passes of convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name == "baddbmm" or (name == "convolution" and not args[6])  # of 1 x 1; not transposed
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [Vanilla(), ASI(999)], ids=["vanilla", "full ranks"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU6, nn.Hardswish])
def test_two_steps_are_stocks(activation, training, method):
    stock, x = network(activation).train(training), random_tensor(2, 3, 8, 8)
    torch.testing.assert_close(steps(converted(stock, method), x), steps(stock, x), **TOLERANCE)


def test_the_image_is_all_that_is_kept():
    assert kept(converted(network())) == IMAGE
    # The layer behind each activation computes its output again, so that it needs no bits.
    assert kept(converted(network(nn.ReLU6))) == IMAGE
    assert kept(converted(network(), recompute=False)) > 20 * IMAGE


def test_one_of_many_products_is_not_run_again():
    model = converted(network(wide=True))
    y = model(random_tensor(2, 3, 8, 8)).sum()
    with Convolutions() as again:
        y.backward()
    assert again.count == 7  # of 9: all but the wide one, and the last, whose output nobody needs
    assert kept(model) == IMAGE + 2 * 40 * 8 * 8 * 8


def test_what_was_changed_in_place_is_not_computed_from():
    def output(model):
        y = model[1](model[0](x))
        with torch.no_grad():
            x.mul_(2)
        return y.sum()

    for model in (network(), converted(network())):
        x = random_tensor(2, 3, 8, 8)
        with pytest.raises(RuntimeError, match=r"in place|inplace"):
            output(model).backward()


def test_a_stem_that_is_computed_again_takes_two_tensors_of_its_size():
    """The gradient of its output with and without the bits; of what is computed again for the layer behind, one."""
    stem = block(3, 16, nn.ReLU(inplace=True), kernel_size=3, padding=1)
    stock = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *block(16, 4, nn.ReLU(), kernel_size=1)).double().eval()
    x = random_tensor(8, 3, 96, 96)

    def peak(model):
        return lowrank.peak_bytes(model, lambda model, x: model(x).sum(), x)

    model = converted(stock)
    torch.testing.assert_close(steps(model, x), steps(stock, x), **TOLERANCE)
    size = 8 * 16 * 96 * 96 * 8
    assert peak(model) < 2.6 * size < peak(stock)


def test_where_the_way_from_afar_is_too_long_it_begins_anew_at_the_layers_input():
    """Two convolutions of 100 and of 200 products: what the second gives follows from its own input alone."""
    torch.manual_seed(0)
    wide = block(100, 200, nn.ReLU(), kernel_size=1)
    stock = nn.Sequential(nn.Conv2d(3, 100, 1), Sine(), *wide, *block(200, 800, nn.SiLU(), kernel_size=1))
    stock = nn.Sequential(*stock, nn.Conv2d(800, 2, 1)).double().eval()
    model, x = converted(stock), random_tensor(2, 3, 8, 8)
    torch.testing.assert_close(steps(model, x), steps(stock, x), **TOLERANCE)
    number = IMAGE // 3
    assert kept(converted(stock)) <= (3 + 2 * 100 + 200 + 3) * number, "of 800 channels nothing is kept"


def test_a_way_that_would_end_behind_a_widening_layer_begins_anew_ahead_of_it():
    """The widening one is within what a way may take, from afar, and the depthwise one behind it would not be."""
    torch.manual_seed(0)
    narrow = block(120, 128, nn.ReLU(), kernel_size=1)
    wide = block(128, 512, nn.SiLU(), kernel_size=1)
    depthwise = block(512, 512, nn.SiLU(), kernel_size=3, padding=1, groups=512)
    stock = nn.Sequential(nn.Conv2d(3, 120, 1), Sine(), *narrow, *wide, *depthwise, nn.Conv2d(512, 2, 1))
    stock, x = stock.double().eval(), random_tensor(2, 3, 8, 8)
    torch.testing.assert_close(steps(converted(stock), x), steps(stock, x), **TOLERANCE)
    number = IMAGE // 3
    assert kept(converted(stock)) <= (3 + 2 * 120 + 128 + 3) * number, "of 512 channels nothing is kept"

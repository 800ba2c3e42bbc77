"""Bits of an activation beside its output, which the layer behind keeps in full: kept only until that is known."""

import copy

import pytest
import torch
from leaks import no_tensor_left
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, Vanilla
from lowrank.meters.memory import held_bytes

ACTIVATIONS = [nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.2)]


def model_of(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), activation, nn.Linear(40, 3)).double().requires_grad_(True)


def inputs():
    return random_tensor(16, 6).requires_grad_()


def loss(model, x):
    return model(x).sum()


def results(model, x):
    model.zero_grad()
    y = model(x)
    y.backward(random_tensor(*y.shape, seed=1), retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    y.backward(random_tensor(*y.shape, seed=1))
    return [y.detach(), *first, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("method", [Vanilla(), ASI(2), ASI(999)], ids=["vanilla", "compressed", "full ranks"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_are_stock_and_no_more_is_kept(activation, method):
    stock = model_of(activation)
    model = lowrank.convert(copy.deepcopy(stock), ["2"], method)
    exact = copy.deepcopy(stock)[:2] if method == ASI(2) else None
    found, wanted = results(model, inputs()), results(stock, inputs())
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if exact is None or place not in (3, 7):  # the weight whose input is compressed
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    if getattr(activation, "negative_slope", 1) > 0:
        kept, before = (lowrank.saved_bytes(network, loss, inputs()) for network in (model, stock))
        assert kept <= before
        held_bytes(model, loss, inputs())  # makes the tables that are kept for the whole process
        assert held_bytes(model, loss, inputs()) <= held_bytes(stock, loss, inputs()) + 16 * 40 // 8 * (
            method == ASI(2)
        )


LIMITED = [nn.Hardtanh(-0.5, 0.7), nn.Hardtanh(0.0, 0.1), nn.Hardtanh(-1.0, 1.0), nn.Hardtanh(-1e4, 0.3), nn.ReLU6()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", LIMITED, ids=str)
def test_limits_that_a_dtype_rounds(activation, dtype):
    """What is cut lies at the rounded limit, which may be within the one that PyTorch compares with."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(16, 64), activation, nn.Linear(64, 8)).to(dtype)
    model = lowrank.convert(copy.deepcopy(stock), ["0", "2"], Vanilla())
    x = random_tensor(32, 16).to(dtype)
    for network in (stock, model):
        network(x).float().square().sum().backward()
    assert stock[0].weight.grad.any()
    for one, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("activation", LIMITED, ids=str)
def test_limits_that_autocast_rounds(activation):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 16, 3), activation, nn.Conv2d(16, 8, 3))
    model = lowrank.convert(copy.deepcopy(stock), ["0", "2"], Vanilla())
    x = random_tensor(4, 3, 12, 12).float()
    for network in (stock, model):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        y.float().square().sum().backward()
    for one, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-2 * other.grad.abs().max().item())


def test_an_output_that_is_changed_behind_a_layer_that_keeps_it_is_named_where_it_is_needed():
    """PyTorch's own activation keeps its input, so that nothing is wrong there."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.aside, self.last = nn.Linear(6, 40), nn.Linear(40, 3), nn.Linear(40, 5)

        def forward(self, x):
            y = nn.functional.relu6(self.first(x))
            self.aside(y)  # is given no gradient
            y.mul_(x[:, :1])
            return self.last(y)

    model = lowrank.convert(Network().double(), ["first", "aside", "last"], lowrank.SVD(1.0))
    with pytest.raises(lowrank.ChangedError, match=r"^an activation: its output.*change a copy of it$"):
        model(inputs()).sum().backward()


READERS = {
    "normalisation": lambda y: torch.nn.functional.layer_norm(y, (40,)),
    "product": lambda y: y * y,
    "gate": lambda y: y * torch.sigmoid(y),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_other_functions_that_keep_the_output_serve_as_well(reader):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 40), nn.Linear(40, 3)

        def forward(self, x):
            return self.last(reader(torch.relu(self.first(x))))

    torch.manual_seed(0)
    stock = Reading().double()
    model = lowrank.convert(copy.deepcopy(stock), ["first", "last"], Vanilla())
    for one, other in zip(results(model, inputs()), results(stock, inputs()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    kept, before = (lowrank.saved_bytes(network, loss, inputs()) for network in (model, stock))
    assert kept <= before


def test_a_graph_that_was_freed_says_so_as_stock_does():
    model = lowrank.convert(model_of(nn.ReLU()), ["2"], Vanilla())
    y = model(inputs()).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_a_checkpoint(reentrant):
    stock = model_of(nn.ReLU())
    model = lowrank.convert(copy.deepcopy(stock), ["0", "2"], Vanilla())
    found = [
        torch.autograd.grad(checkpoint(network, inputs(), use_reentrant=reentrant).square().sum(), network[0].weight)[0]
        if not reentrant
        else _by_backward(network)
        for network in (model, stock)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def _by_backward(network):
    network.zero_grad()
    checkpoint(network, inputs(), use_reentrant=True).square().sum().backward()
    return network[0].weight.grad


def test_an_output_that_was_changed_behind_the_layer_that_keeps_it_is_an_error_as_in_stock():
    for convert in (False, True):
        model = model_of(nn.ReLU())
        model = lowrank.convert(model, ["2"], Vanilla()) if convert else model
        hidden = model[1](model[0](inputs()))
        y = model[2](hidden)
        with torch.no_grad():
            hidden.mul_(2)
        with pytest.raises(RuntimeError, match=r"inplace operation|in place"):
            y.sum().backward()


class Recomputed(nn.Module):
    """An activation between convolutions of few products: the one behind it computes its input again."""

    def __init__(self, activation, twice=False):
        super().__init__()
        self.first, self.norm, self.activation = nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), activation
        self.last, self.other = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 3, 1) if twice else None

    def forward(self, x):
        y = self.activation(self.norm(self.first(x)))
        return self.last(y) if self.other is None else self.last(y).sum(1, keepdim=True) + self.other(y)


def recomputed(activation, twice=False):
    torch.manual_seed(0)
    stock = Recomputed(activation, twice).double().eval()
    return stock, lowrank.convert(copy.deepcopy(stock), lowrank.trailing_layers(stock, "all"), Vanilla())


def images():
    return random_tensor(2, 4, 8, 9).requires_grad_()


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_output_that_is_computed_again_needs_no_bits(activation, twice):
    stock, model = recomputed(activation, twice)
    for one, other in zip(results(model, images()), results(stock, images()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    image = images().nbytes
    bits = 2 * 16 * 8 * 9 // 8 if getattr(activation, "negative_slope", 1) < 0 else 0
    assert lowrank.saved_bytes(model, loss, images()) == image + bits


@pytest.mark.parametrize("wanted", ["input", "first", "last", "all"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_whoever_asks_first_for_whatever_part(activation, wanted):
    """The activation's node may run without the one behind it having computed anything, or twice."""
    for again in (False, True):
        found = []
        for network in recomputed(activation):
            x = images()
            parts = {"input": [x], "first": [network.first.weight], "last": [network.last.weight]}
            parts["all"] = [x, *network.parameters()]
            y = network(x).square().sum()
            if again:
                torch.autograd.grad(y, parts["all"], retain_graph=True)
                torch.autograd.grad(y, [x], retain_graph=True)
            found.append(torch.autograd.grad(y, parts[wanted]))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1)], ids=str)
def test_values_that_are_not_finite_pass_as_in_stock(activation):
    found = []
    for network in recomputed(activation):
        x = random_tensor(2, 4, 8, 9)
        x[0, 0, 0, 0], x[1, 1, 2, 2], x[0, 2, 3, 3] = float("nan"), float("inf"), -float("inf")
        x.requires_grad_()
        network(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in network.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_second_derivatives_of_what_is_computed_again():
    found = []
    for network in recomputed(nn.ReLU6()):
        x = images()
        (first,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_gradients_in_a_batch_of_what_is_computed_again():
    found = []
    for network in recomputed(nn.ReLU6()):
        x = images()
        y = network(x)
        grads = random_tensor(3, *y.shape, seed=2)
        found.append(torch.autograd.grad(y, [x, network.first.weight], grads, is_grads_batched=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_nothing_leaks():
    model = lowrank.convert(model_of(nn.ReLU()), ["0", "2"], Vanilla())
    loss(model, inputs()).backward()
    with no_tensor_left():
        for _ in range(3):
            loss(model, inputs()).backward()

"""Second derivatives by the places that tensors have in the graph: hooks, `retain_grad` and gradients with respect to
what lies within a network count as they do in stock's, though that is computed again."""

import copy
import gc
import weakref

import pytest
import torch
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, Vanilla
from lowrank.exact.edges import edge_of, placed


class Gated(nn.Module):
    """A gate of two linear layers, and attention that is written out."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.act, self.scores, self.last = nn.SiLU(), nn.Softmax(-1), nn.Linear(6, 6)

    def forward(self, x):
        x = self.norm(x)
        y = self.act(self.first(x)) * self.second(x)
        return self.last(self.scores(y @ x.mT) @ y)


NETWORKS = {
    "normalisation ahead of a curve": [nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)],
    "merged": [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 6)],
    "curves by their output": [nn.LayerNorm(6), nn.Sigmoid(), nn.Tanh(), nn.Softmax(1), nn.Conv2d(4, 4, 1)],
    "bits": [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU6(), nn.AvgPool2d(2), nn.Mish()],
    "gate": [Gated(), nn.Hardswish(), nn.Linear(6, 6), nn.Softplus()],
}


def networks(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    stock = frozen_statistics(with_statistics(nn.Sequential(*copy.deepcopy(NETWORKS[name])))).to(dtype)
    model = copy.deepcopy(stock)
    kinds = (nn.Conv2d, nn.Linear)
    names = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
    return stock, lowrank.convert(model, names, Vanilla(), **options)


def outputs(network, x, take):
    """What a network gives; `take` is told of every output within it."""
    hooks = []
    for module in network.modules():
        if not list(module.children()):
            hooks.append(module.register_forward_hook(lambda module, given, y: take(y)))
    y = network(x)
    for hook in hooks:
        hook.remove()
    return y


def second(network, way):
    dtype = next(network.parameters()).dtype
    x, within = random_tensor(2, 4, 6, 6, dtype=dtype).requires_grad_(), []

    def take(y):
        within.append(y)
        if way == "hooks":
            y.register_hook(lambda grad: grad * 1.5)
        if way == "retained":
            y.retain_grad()

    loss = outputs(network, x, take).square().sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    loss = loss + slope.square().sum()
    if way == "with respect to":
        return dict(enumerate(torch.autograd.grad(loss, within[:-1])))
    loss.backward()
    found = {"x": x.grad, **{name: parameter.grad for name, parameter in network.named_parameters()}}
    return found | ({at: y.grad for at, y in enumerate(within)} if way == "retained" else {})


@pytest.mark.parametrize("options", [{}, {"recompute": False}], ids=["again", "no layer again"])
@pytest.mark.parametrize("way", ["hooks", "retained", "with respect to"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_lies_within_a_network_has_stocks_second_derivatives(name, way, options):
    stock, model = (second(network, way) for network in networks(name, **options))
    torch.testing.assert_close(model, stock)


@pytest.mark.parametrize("way", ["hooks", "retained", "with respect to"])
def test_a_gate_that_is_one_compiled_pass(way):
    stock, model = (second(network, way) for network in networks("gate", torch.float32))
    for name, expected in stock.items():
        error = torch.linalg.vector_norm(model[name] - expected)
        assert error < 1e-3 * torch.linalg.vector_norm(expected)


def test_a_hook_on_the_input_of_a_curve_is_called_once_for_each_gradient():
    calls = []
    for network in networks("normalisation ahead of a curve"):
        x, seen = random_tensor(2, 4, 6, 6).requires_grad_(), []
        z = x * 2
        z.register_hook(seen.append)
        (slope,) = torch.autograd.grad(network[2](z).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        calls.append(seen)
    torch.testing.assert_close(calls[1], calls[0])


def test_a_hook_on_what_nobody_refers_to_any_more():
    found = []
    for network in networks("merged"):
        x = random_tensor(2, 4, 6, 6).requires_grad_()
        y = outputs(network, x, lambda y: y.register_hook(lambda grad: grad * 1.5) and None)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        del y
        slope.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])


def test_a_third_derivative():
    found = []
    for network in networks("normalisation ahead of a curve"):
        x = random_tensor(2, 4, 6, 6).requires_grad_()
        y = network(x).square().sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y, x, create_graph=True)
            y = y.square().sum()
        found.append(y.detach())
    torch.testing.assert_close(found[1], found[0])


def test_a_place_in_the_graph_holds_no_numbers():
    x = random_tensor(3, 4).requires_grad_()
    z = x * 2
    edge, watched = edge_of(z), weakref.ref(z)
    assert edge.shape == z.shape
    assert edge.untyped_storage().nbytes() == z.itemsize
    value = z.detach().clone()
    del z
    gc.collect()
    assert watched() is None
    (placed(edge, value) * value).sum().backward()
    torch.testing.assert_close(x.grad, 2 * value)


def test_what_needs_no_gradient_has_no_place_in_the_graph():
    value = random_tensor(3)
    assert edge_of(value) is None
    assert not placed(None, value).requires_grad


def test_low_rank_layers_have_second_derivatives_of_their_own_gradients():
    """The slope's own derivative goes through each layer as the loss does; the gradient of the input stays exact."""
    found, conv = [], nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 2, 1)).double()
    for method in (Vanilla(), ASI(2)):
        model = lowrank.convert(copy.deepcopy(conv), ["0", "3"], method)
        x = random_tensor(5, 4, 7, 6).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])

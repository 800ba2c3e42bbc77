"""Gradients that are differentiated again: right, or refused by name, and never silently missing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lowrank
from lowrank import ASI, HOSVD, SVD, DoubleBackwardError, GradientFilter, Vanilla
from lowrank.exact import activations, pooling

EXACT = [Vanilla(), SVD(1.0), HOSVD(1.0), ASI(99)]
X = (3, 4, 6, 5)

FUNCTIONS = {
    "relu": activations.relu,
    "relu in place": lambda x: activations.relu(x * 1, inplace=True),
    "relu6": lambda x: activations.relu6(4 * x),
    "hardtanh": lambda x: activations.hardtanh(x, -0.5, 0.7),
    "hardsigmoid": activations.hardsigmoid,
    "leaky_relu": lambda x: activations.leaky_relu(x, 0.2),
    "avg_pool2d": lambda x: pooling.avg_pool2d(x, 2, 1, 1),
    "adaptive_avg_pool2d": lambda x: pooling.adaptive_avg_pool2d(x, (2, 3)),
    "max_pool2d": lambda x: pooling.max_pool2d(x, 3, 2, 1),
}


SMALL = (2, 2, 5, 4)  # every element's own derivatives are compared


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_and_pooling(name):
    x = random_tensor(*SMALL).requires_grad_()
    assert torch.autograd.gradcheck(FUNCTIONS[name], x)
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], x)


@pytest.mark.slow
def test_dropout():
    x = random_tensor(*SMALL).requires_grad_()

    def seeded(x):
        torch.manual_seed(0)
        return activations.dropout(x, 0.4)

    assert torch.autograd.gradgradcheck(seeded, x)


NAMES = ["conv", "last", "head"]


class Critic(nn.Module):
    """A convolution with its norm, an activation, pooling, a convolution by itself, a linear head."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.last, self.head = nn.Conv2d(6, 5, 2, bias=False), nn.Linear(5, 1)

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.conv(x)), 0.2)
        return self.head(F.hardtanh(self.last(x)).mean((2, 3)))


def pair(method, freeze=()):
    torch.manual_seed(0)
    stock = frozen_statistics(with_statistics(Critic())).double()
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(freeze)) if freeze else True)
    return stock, lowrank.convert(copy.deepcopy(stock), NAMES, method)


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.tag)
def test_the_gradient_of_a_slope_is_right_for_every_parameter(method):
    """As in WGAN-GP and R1: the penalty is of the gradient with respect to the input alone."""
    gradients = []
    for critic in pair(method):
        x = random_tensor(*X).requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().sum()
        penalty.backward()
        gradients.append({"x": x.grad, **{name: p.grad for name, p in critic.named_parameters()}})
    stock, found = gradients
    for name, expected in stock.items():
        if expected is None or not expected.any():
            assert found[name] is None or not found[name].any()
        else:
            torch.testing.assert_close(found[name], expected, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.tag)
def test_a_penalty_beside_the_loss(method):
    """Both in one step; the loss goes through weight gradients, which are not differentiated again."""
    gradients = []
    for critic in pair(method):
        x = random_tensor(*X).requires_grad_()
        y = critic(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (y.square().sum() + slope.square().sum()).backward()
        gradients.append({name: p.grad for name, p in critic.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.tag)
def test_energies_and_forces(method):
    """A force is the gradient of an energy, and has a target of its own; two steps, the second after the first."""
    gradients = []
    for critic in pair(method):
        optimizer = torch.optim.SGD(critic.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            x = random_tensor(*X).requires_grad_()
            (force,) = torch.autograd.grad(critic(x).tanh().sum(), x, create_graph=True)
            (force - random_tensor(*X, seed=1)).square().mean().backward()
            optimizer.step()
        gradients.append({name: p.detach().clone() for name, p in critic.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("method", [*EXACT, HOSVD(0.5), ASI(2)], ids=lambda method: method.tag)
@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "last.weight", "head.weight"])
def test_a_weight_gradient_that_is_differentiated_is_refused_by_the_layers_name(name, method):
    """As in meta-learning, and in penalties on gradients of weights."""
    _, critic = pair(method)
    x = random_tensor(*X).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).square().sum(), critic.get_parameter(name), create_graph=True)
    with pytest.raises(DoubleBackwardError, match="create_graph=True") as error:
        gradient.square().sum().backward()
    layer = {"norm": "conv"}.get(name.partition(".")[0], name.partition(".")[0])
    assert f"layer {layer!r}" in str(error.value)


def test_the_first_derivative_with_a_graph_is_the_one_without():
    stock, critic = pair(HOSVD(0.5))
    x = random_tensor(*X)
    parameters = list(critic.parameters())
    plain = torch.autograd.grad(critic(x).square().sum(), parameters)
    graphed = torch.autograd.grad(critic(x).square().sum(), parameters, create_graph=True)
    torch.testing.assert_close(graphed, plain)
    exact = torch.autograd.grad(stock(x).square().sum(), list(stock.parameters()))
    assert not torch.allclose(plain[0], exact[0]), "truncated"


@pytest.mark.parametrize("frozen", [("conv",), ("conv", "norm"), ("last", "head"), ("conv", "norm", "last", "head")])
def test_frozen_layers_are_differentiated_again(frozen):
    gradients = []
    for critic in pair(HOSVD(1.0), frozen):
        x = random_tensor(*X).requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).tanh().sum(), x, create_graph=True)
        slope.square().sum().backward()
        gradients.append({"x": x.grad, **{name: p.grad for name, p in critic.named_parameters()}})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        if expected is None or not expected.any():
            assert gradients[1][name] is None or not gradients[1][name].any()
        else:
            torch.testing.assert_close(gradients[1][name], expected)


def test_the_input_gradient_of_the_gradient_filter_is_refused_or_its_own():
    """It is no derivative of the output, so there is no stock one to compare with: what counts is that it is linear in
    the gradient and in the weight."""
    model = lowrank.convert(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1).double()), ["0"], GradientFilter(2))
    x = random_tensor(*X).requires_grad_()
    grad = random_tensor(3, 6, 6, 5).requires_grad_()
    (slope,) = torch.autograd.grad(model(x), x, grad, create_graph=True)
    upstream = random_tensor(*X, seed=2)
    by_grad, by_weight = torch.autograd.grad(slope, [grad, model[0].weight], upstream)
    inner = (slope * upstream).sum()
    torch.testing.assert_close((by_grad * grad).sum(), inner)
    torch.testing.assert_close((by_weight * model[0].weight).sum(), inner)


SMOOTH = {
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "functional gelu": F.gelu,
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: F.softmax(x, -1),
    "a power": lambda x: x**3,
    "a gate": lambda x: F.silu(x[..., :4]) * x[..., 4:],
}


@pytest.mark.parametrize("last", ["the activation", "a layer"])
@pytest.mark.parametrize("name", SMOOTH)
def test_recomputed_activations_are_differentiated_again(name, last):
    """Also where the gradient that reaches them is a constant, behind which there is no graph."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.LazyLinear(1)
            self.act = copy.deepcopy(SMOOTH[name])

        def forward(self, x):
            y = self.act(self.up(self.norm(x)))
            return self.down(y) if last == "a layer" else y

    torch.manual_seed(0)
    stock, x = Block(), random_tensor(3, 5, 4)
    stock(x.float())
    stock.double()
    model = lowrank.convert(copy.deepcopy(stock), ["up", *(["down"] if last == "a layer" else [])], Vanilla())
    assert_right_or_refused(stock, model, x, refused=False)


def test_a_gamma_gradient_of_a_constant_gradient_is_not_missing_a_term():
    _, critic = pair(HOSVD(1.0))
    y = critic.norm(critic.conv(random_tensor(*X).requires_grad_()))
    (gradient,) = torch.autograd.grad(y.sum(), critic.norm.weight, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="'conv'"):
        gradient.sum().backward()


def test_recomputed_attention_is_differentiated_again():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            h = self.norm(x)
            return self.attention(h, h, h, need_weights=False)[0]

    torch.manual_seed(0)
    stock = Block().double()
    model = copy.deepcopy(stock)
    lowrank.open_attention(model)
    lowrank.convert(model, ["attention.out_proj"], Vanilla())
    with sdpa_kernel(SDPBackend.MATH):  # the fast ones of PyTorch have no second derivative
        assert_right_or_refused(stock, model, random_tensor(3, 5, 4), refused=False)


class SharedKeys(nn.Module):
    """Keys are values as well."""

    def __init__(self):
        super().__init__()
        self.norm, self.query, self.keys, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        q, k = self.query(y), self.keys(y)
        return 1.0 * self.out(self.attend(y, q, k))


DEPENDENT = {
    "keys are values": lambda self, y, q, k: (q @ k.transpose(-1, -2)).softmax(-1) @ k,
    "keys are queries and values": lambda self, y, q, k: (k @ k.transpose(-1, -2)).softmax(-1) @ k,
    "of the input itself": lambda self, y, q, k: (y @ y.transpose(-1, -2)).softmax(-1) @ y,
    "values are ahead of the keys": lambda self, y, q, k: F.scaled_dot_product_attention(q, k, y),
    "one tensor in three places": lambda self, y, q, k: F.scaled_dot_product_attention(k, k, k),
    "a sum of products": lambda self, y, q, k: torch.einsum("bti,bsi,bsj->btj", y, y, y),
    "batches": lambda self, y, q, k: torch.bmm(torch.bmm(q, k.transpose(-1, -2)), k),
    "a scaled sum": lambda self, y, q, k: torch.addcmul(y, q, y),
    "a scaled sum of one": lambda self, y, q, k: torch.addcmul(y, y, y, value=0.5),
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("attend", DEPENDENT)
def test_arguments_that_are_computed_from_each_other(attend, twice):
    """The gradient itself, with the graph that it is asked for with, and its own."""
    torch.manual_seed(0)
    stock = type("Shared", (SharedKeys,), {"attend": DEPENDENT[attend]})().double()
    model = lowrank.convert(copy.deepcopy(stock), ["query", "keys", "out"], Vanilla())
    found = []
    for network in (stock, model):
        x = random_tensor(2, 5, 8).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
            if twice:
                slope.square().sum().backward()
        found.append([slope.detach(), x.grad, *[p.grad for p in network.parameters()]])
    torch.testing.assert_close(found[1], found[0])


def assert_right_or_refused(stock, model, x, refused=True):
    gradients = []
    for network in (stock, model):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(network(leaf).sum(), leaf, create_graph=True)
        try:
            slope.square().sum().backward()
        except DoubleBackwardError:
            if network is stock or not refused:
                raise
            return
        gradients.append([leaf.grad, *(p.grad for p in network.parameters() if p.grad is not None)])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_layers_that_compute_as_the_stock_one_are_differentiated_again_after_a_refusal():
    """An error in one backward pass leaves nothing behind."""
    stock, critic = pair(HOSVD(1.0))
    x = random_tensor(*X)
    (gradient,) = torch.autograd.grad(critic(x).square().sum(), critic.conv.weight, create_graph=True)
    with pytest.raises(DoubleBackwardError):
        gradient.sum().backward()
    for network in (stock, critic):
        network.zero_grad()
        network(x).square().sum().backward()
    torch.testing.assert_close(critic.conv.weight.grad, stock.conv.weight.grad)

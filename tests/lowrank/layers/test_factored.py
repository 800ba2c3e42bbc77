"""Layers that hold their weight as factors: conversion, what other code reads, and that nothing dense is made."""

import copy

import pytest
import torch
import torch.nn.functional as F
from factored_cases import FULL, METHODS, NAMES, SHAPES, data, loss_of, network, product
from references import LargeTensors, low_rank_tensor, random_tensor
from torch import nn

import lowrank
from lowrank import WASI, WSI, ConversionError, NonFiniteError, SettingError, Vanilla
from lowrank.layers.factored import FactoredLinear


@pytest.mark.parametrize("shape", [(6,), *SHAPES.values()], ids=str)
@pytest.mark.parametrize("method", [WASI(energy=0.8, ranks=FULL), WSI(energy=0.8)], ids=lambda method: method.tag)
def test_factors_have_autograds_gradients(method, shape):
    model = lowrank.convert(network(), NAMES, method)
    x, target = random_tensor(*shape, seed=3).requires_grad_(), random_tensor(*shape[:-1], 3, seed=4)
    plain = copy.deepcopy(model)
    for name in NAMES:
        layer = plain[int(name)]
        layer.forward = lambda x, layer=layer: F.linear(x, layer.left @ layer.right, layer.bias)
    results = []
    for one in (model, plain):
        loss = loss_of(one, x, target)
        wanted = dict(one.named_parameters()) | {"x": x}
        results.append(dict(zip(wanted, torch.autograd.grad(loss, [*wanted.values()]), strict=True)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


def test_the_parameters_are_two_factors_in_the_place_of_the_weight():
    layer = nn.Linear(6, 9)
    lowrank.convert(nn.Sequential(layer), ["0"], WSI(energy=0.5))
    assert isinstance(layer, FactoredLinear)
    assert [name for name, _ in layer.named_parameters()] == ["left", "right", "bias"]
    assert layer.left.shape == (9, layer.rank)
    assert layer.right.shape == (layer.rank, 6)
    torch.testing.assert_close(layer.left.mT @ layer.left, torch.eye(layer.rank), rtol=0, atol=1e-6)


def test_other_code_reads_a_weight_and_its_gradient_reaches_the_factors():
    model = lowrank.convert(network(), NAMES, WSI(energy=0.8))
    layer, x = model[0], random_tensor(4, 6)
    torch.testing.assert_close(layer.weight.detach(), product(layer), rtol=0, atol=0)
    grad = random_tensor(4, 9, seed=1)
    found = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), [layer.left, layer.right], grad)
    expected = torch.autograd.grad(layer(x), [layer.left, layer.right], grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_the_weight_cannot_be_set():
    layer = lowrank.convert(network(), NAMES, WSI(energy=0.8))[0]
    for value in (torch.zeros(9, 6).double(), nn.Parameter(torch.zeros(9, 6).double())):
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = value
    assert list(layer._parameters) == ["left", "right", "bias"]


def test_a_converted_layer_changes_its_method():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    before = product(model[0])
    lowrank.convert(model, ["0"], WSI(energy=1))
    torch.testing.assert_close(product(model[0]), before, rtol=0, atol=1e-13)
    lowrank.convert(model, ["0"], Vanilla())
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=1e-13)
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_frozen_weight_stays_frozen_and_keeps_nothing(fuse):
    model = network()
    model[0].requires_grad_(False)
    lowrank.convert(model, NAMES, WASI(energy=0.8, ranks=[2, 2, 2]), fuse=fuse)
    assert not model[0].left.requires_grad
    x, target = data((4, 5, 6))
    x.requires_grad_(True)
    loss_of(model, x, target).backward()
    assert model[0]._lowrank.kept_bytes == 0
    assert model[0].left.grad is None
    assert x.grad is not None
    assert lowrank.account(model, ["0"], x)["0"].activation_bytes == 0
    assert not lowrank.revert(model)[0].weight.requires_grad


def test_what_cannot_be_held_as_factors_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    for names, reason in ((["0"], "convolutions"), (["1"], "used by another module")):
        with pytest.raises(ConversionError, match=reason):
            lowrank.convert(model, names, WASI(energy=0.9, ranks=2))
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Linear, nn.Linear]
    with pytest.raises(ConversionError, match="no ranks yet"):
        lowrank.convert(network(), ["0"], WASI(energy=0.9))
    with pytest.raises(ConversionError, match="meta device"):
        lowrank.convert(network().to("meta"), ["0"], WSI(energy=0.9))
    for wrong in ({"energy": 0}, {"energy": 1.5}, {"update": "qr"}):
        for method in (WSI, WASI):
            with pytest.raises(SettingError):
                method(**wrong)


@pytest.mark.parametrize("energy", [0.8, 1.0])
def test_a_weight_that_is_not_finite_is_named_and_the_model_left_as_it_was(energy):
    model = network()
    model[2].weight.data[0, 0] = float("nan")
    parameters = [*model.parameters()]
    with pytest.raises((ConversionError, NonFiniteError), match=r"'2'.*the weight has NaN"):
        lowrank.convert(model, NAMES, WASI(energy=energy, ranks=4))
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def wide_model():
    """Linear layers whose weight, 60 x 70, is larger than all activations, and of which few directions matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(70), nn.Linear(70, 60), nn.Tanh(), nn.Linear(60, 70))
    for layer in (model[1], model[3]):
        layer.weight.data = low_rank_tensor(*layer.weight.shape, decay=0.6).float()
    return model


@pytest.mark.parametrize("method", [WASI(energy=0.5, ranks=[2, 3, 3]), WSI(energy=0.5)], ids=lambda method: method.tag)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}], ids=str)
def test_no_tensor_of_the_weights_size_exists_after_conversion(method, options):
    model = lowrank.convert(wide_model(), ["1", "3"], method)
    optimizer = lowrank.SGD(model.parameters(), 0.01, **options)
    held = [*model.parameters(), *model.buffers()]

    def keep(tensor):
        held.append(tensor)
        return tensor

    with LargeTensors(60 * 70) as large:
        for step in range(3):
            optimizer.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(random_tensor(2, 5, 70, seed=step, dtype=torch.float32)).square().mean()
            loss.backward()
            held += [p.grad for p in model.parameters()]
            optimizer.step()
            held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        model.eval()(random_tensor(2, 5, 70, dtype=torch.float32))
    assert large.found == []
    assert len(held) > 40
    assert max(tensor.untyped_storage().nbytes() for tensor in held) < 60 * 70 * 4


def test_the_watch_for_large_tensors_sees_one():
    model = lowrank.convert(wide_model(), ["1", "3"], WSI(energy=0.5))
    with LargeTensors(60 * 70) as large:
        assert model[1].weight.shape == (60, 70)
    assert large.found


def test_weights_are_accounted_for_before_and_after():
    model, x = network().float(), torch.randn(4, 5, 6)
    before = lowrank.account(model, NAMES, x)
    assert before.total.weight_bytes == (6 * 9 + 9 * 7) * 4
    lowrank.convert(model, NAMES, WASI(energy=0.5, ranks=[2, 3, 4]))
    after, layer = lowrank.account(model, NAMES, x), model[0]
    rank = layer.rank
    assert after["0"].weight_bytes == rank * (6 + 9) * 4
    assert after["0"].activation_bytes == (2 * 3 * 4 + 4 * 2 + 5 * 3 + 6 * 4) * 4
    # The formulas of the paper (A7.3), written out; without the input's gradient, as in every column of this suite.
    iteration = [n * r * (2 * m - 1) + m * r * (2 * n - 1) + 2 * max(n, r) * min(n, r) ** 2
                 for n, m, r in ((4, 30, 2), (5, 24, 3), (6, 20, 4), (9, 6, rank))]  # fmt: skip
    forward = 20 * rank * (2 * 6 - 1) + 20 * 9 * (2 * rank - 1)
    gradient = 20 * 9 * 2 + 2 * 3 * 4 * 5 + 2 * 4 * 6 * 5 + 6 * 9 * 5 * 2
    assert after["0"].flops_paper == sum(iteration) + forward + gradient
    lowrank.convert(lowrank.revert(model), NAMES, WSI(energy=0.999999))
    exact = lowrank.account(model, NAMES, x)["0"]
    assert layer.rank == rank
    assert exact.activation_bytes == 4 * 5 * 6 * 4
    assert exact.flops_paper == iteration[-1] + forward + 9 * 6 * (2 * 20 - 1)
    # Two passes through the factors, the input's gradient left out, and the update.
    update = (11 * 9 + 9 * 6) * rank**2 + 19 * rank**3
    assert exact.flops == 2 * 20 * rank * (6 + 9) + 2 * 20 * rank * (2 * 6 + 2 * 9) + update


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.tag)
def test_code_that_changes_an_output_in_place_trains_as_ever(method):
    model = lowrank.convert(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), ["0", "2"], method)
    stock = lowrank.revert(copy.deepcopy(model))
    x = torch.randn(2, 5, 6)
    results = []
    for one in (model, stock):
        y = one(x)
        y += 1
        y.square().sum().backward()
        results.append(one[0].bias.grad)
    torch.testing.assert_close(*results)


class FunctionBlock(nn.Module):
    """A block of a transformer that calls its activation as a function, as many models' code does."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 48), nn.Linear(48, 12)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("method", [WSI(energy=1), WASI(ranks=[2, 2, 2], energy=1)], ids=lambda method: method.tag)
def test_functions_behind_factors_keep_no_more_than_behind_exact_layers(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), FunctionBlock(), FunctionBlock())
    x, names = torch.randn(4, 40, 12), [f"{block}.{name}" for block in (1, 2) for name in ("up", "down")]
    loss = lambda model, x: model(x).square().sum()  # noqa: E731
    exact = lowrank.saved_bytes(lowrank.convert(copy.deepcopy(model), names, lowrank.Vanilla()), loss, x)
    kept = lowrank.saved_bytes(lowrank.convert(copy.deepcopy(model), names, method), loss, x)
    wide = 4 * 40 * 48 * x.element_size()  # the input of one activation
    assert lowrank.saved_bytes(model, loss, x) > exact + 2 * wide
    assert kept < exact + wide // 2

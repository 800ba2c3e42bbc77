"""Layers that hold their weight as factors: conversion, state, revert, and that nothing dense exists."""

import copy
import io
import pickle

import pytest
import torch
from factored_cases import FULL, METHODS, NAMES, assert_same_weights, data, loss_of, network, train
from references import low_rank_tensor, random_tensor
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import WASI, WSI, ConversionError, SettingError, Vanilla
from lowrank.layers.factored import FactoredLinear
from lowrank.layers.factored_weight import FACTORED


def test_revert_gives_the_dense_layers():
    model = lowrank.convert(network(), NAMES, METHODS[0])
    x, _ = data((4, 5, 6))
    expected = model(x)
    assert lowrank.revert(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]
    assert list(model.state_dict()) == list(network().state_dict())
    torch.testing.assert_close(model(x), expected)
    assert_same_weights(model, network(), 1e-12)
    assert model[0].weight.requires_grad


def test_a_converted_layer_changes_its_method():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    before = model[0].factored.factors().dense()
    lowrank.convert(model, ["0"], Vanilla())
    torch.testing.assert_close(model[0].weight.detach(), before)
    lowrank.convert(model, ["0"], WSI(energy=1))
    torch.testing.assert_close(model[0].factored.factors().dense(), before)


def test_a_frozen_weight_stays_frozen_and_keeps_nothing():
    model = network()
    model[0].requires_grad_(False)
    lowrank.convert(model, NAMES, WASI(energy=0.8, ranks=[2, 2, 2]))
    assert not model[0].lowrank_left.requires_grad
    x, target = data((4, 5, 6))
    x.requires_grad_(True)
    loss_of(model, x, target).backward()
    assert model[0].kept_bytes == 0
    assert not model[0].factored.gradient
    assert x.grad is not None


@pytest.mark.parametrize("method", [WASI(energy=0.7, ranks=[2, 3, 4]), WSI(energy=0.7)])
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_it_had_not_been(method):
    def start():
        model = lowrank.convert(network(), NAMES, method)
        return model, lowrank.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)

    model, optimizer = start()
    train(model, optimizer, (4, 5, 6), 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, (4, 5, 6), 3, start=3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_optimizer = start()
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    train(other, other_optimizer, (4, 5, 6), 3, start=3)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_factors_of_another_rank_and_dense_weights_are_loaded():
    small = lowrank.convert(network(seed=2), NAMES, WASI(energy=0.3, ranks=FULL))
    model = lowrank.convert(network(), NAMES, WASI(energy=0.9, ranks=FULL))
    parameters = [*model.parameters()]
    model.load_state_dict(small.state_dict())
    assert_same_weights(model, small, 0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    stock = network(seed=3)
    model.load_state_dict(stock.state_dict())
    expected = lowrank.convert(network(seed=3), NAMES, WASI(energy=0.9, ranks=FULL))
    assert_same_weights(model, expected, 1e-12)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 2)


def test_a_state_dict_of_another_size_is_refused():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.9, ranks=FULL))
    other = lowrank.convert(network(inputs=5), NAMES, WASI(energy=0.9, ranks=FULL))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_on_their_own(duplicate):
    model = lowrank.convert(network(), NAMES, METHODS[0])
    twin, untouched = duplicate(model), copy.deepcopy(model)
    train(twin, lowrank.SGD(twin.parameters(), 0.05), (4, 5, 6), 3)
    assert_same_weights(model, untouched, 0)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 3)
    assert_same_weights(model, twin, 1e-12)


def test_what_cannot_be_held_as_factors_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    for names, reason in ((["0"], "convolutions"), (["1"], "used by another module")):
        with pytest.raises(ConversionError, match=reason):
            lowrank.convert(model, names, WASI(energy=0.9, ranks=2))
    assert type(model[1]) is nn.Linear
    with pytest.raises(ConversionError, match="no ranks yet"):
        lowrank.convert(network(), ["0"], WASI(energy=0.9))
    for wrong in ({"energy": 0}, {"energy": 1.5}, {"update": "qr"}):
        for method in (WSI, WASI):
            with pytest.raises(SettingError):
                method(**wrong)


# Memory.


class LargeTensors(TorchDispatchMode):
    """Notes the shape of every tensor of at least a size that any operator returns."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in _pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.numel:
                self.found.append((func, tuple(leaf.shape)))
        return result


@pytest.mark.parametrize("method", [WASI(energy=0.5, ranks=[3, 3, 3]), WSI(energy=0.5)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}], ids=str)
def test_no_tensor_of_the_weights_size_exists_after_conversion(method, options):
    outputs, inputs = 60, 70
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, inputs))
    for layer in (model[1], model[3]):
        layer.weight.data = low_rank_tensor(*layer.weight.shape, decay=0.6).float()
    lowrank.convert(model, ["1", "3"], method)
    dense = outputs * inputs
    optimizer = lowrank.SGD(model.parameters(), 0.01, **options)
    held = [*model.parameters(), *model.buffers()]

    def keep(tensor):
        held.append(tensor)
        return tensor

    with LargeTensors(dense) as large:
        for step in range(3):
            optimizer.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(random_tensor(2, 5, inputs, seed=step, dtype=torch.float32)).square().mean()
            loss.backward()
            held += [p.grad for p in model.parameters()]
            held += [part for layer in (model[1], model[3]) for term in layer.factored.gradient for part in term]
            optimizer.step()
            held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        model.eval()(random_tensor(2, 5, inputs, dtype=torch.float32))
    assert large.found == []
    assert len(held) > 50
    assert max(tensor.untyped_storage().nbytes() for tensor in held) < dense * 4


def test_the_dense_weight_is_freed():
    layer = nn.Linear(6, 9)
    model = nn.Sequential(layer)
    lowrank.convert(model, ["0"], WSI(energy=0.5))
    assert isinstance(layer, FactoredLinear)
    assert not hasattr(layer, "weight")
    assert [name for name, _ in layer.named_parameters()] == ["lowrank_left", "lowrank_right", "bias"]
    assert layer.lowrank_left in FACTORED


def test_weights_are_accounted_for_before_and_after():
    model, x = network().float(), torch.randn(4, 5, 6)
    before = lowrank.account(model, NAMES, x)
    assert before.total.weight_bytes == (6 * 9 + 9 * 7) * 4
    method = WASI(energy=0.5, ranks=[2, 3, 4])
    lowrank.convert(model, NAMES, method)
    after, layer = lowrank.account(model, NAMES, x), model[0]
    rank = layer.factored.rank
    assert after["0"].weight_bytes == rank * (6 + 9) * 4
    assert after["0"].activation_bytes == (2 * 3 * 4 + 4 * 2 + 5 * 3 + 6 * 4) * 4
    # The formulas of the paper (A7.3), written out; without the input's gradient, as in every column of this suite.
    iteration = [n * r * (2 * m - 1) + m * r * (2 * n - 1) + 2 * max(n, r) * min(n, r) ** 2
                 for n, m, r in ((4, 30, 2), (5, 24, 3), (6, 20, 4), (9, 6, rank))]  # fmt: skip
    forward = 20 * rank * (2 * 6 - 1) + 20 * 9 * (2 * rank - 1)
    gradient = 20 * 9 * 2 + 2 * 3 * 4 * 5 + 2 * 4 * 6 * 5 + 6 * 9 * 5 * 2
    assert after["0"].flops_paper == sum(iteration) + forward + gradient
    assert after["0"].flops > 0
    lowrank.convert(lowrank.revert(model), NAMES, WSI(energy=0.999999))
    exact = lowrank.account(model, NAMES, x)["0"]
    assert layer.factored.rank == rank
    assert exact.activation_bytes == 4 * 5 * 6 * 4
    assert exact.flops_paper == iteration[-1] + forward + 9 * 6 * (2 * 20 - 1)

"""Memory of weights, gradients and optimizer: by hand, and against an emulation with dense weights that is run."""

import pytest
import torch
from factored_cases import NAMES, SHAPES, data, loss_of, network, train

import lowrank
from lowrank import WASI, WSI
from lowrank.tensors.factors import factorise

DENSE = 8 * (9 * 6 + 7 * 9)


def measured(model, **options):
    optimizer = lowrank.SGD(model.parameters(), 0.05, **options)
    train(model, optimizer, SHAPES["3-D"], 1)
    return lowrank.weight_memory(model, NAMES, lambda m, b: loss_of(m, *b), data(SHAPES["3-D"], 1), optimizer)


@pytest.mark.parametrize(("options", "states"), [({}, 0), ({"momentum": 0.9}, 1)])
def test_dense_weights_take_their_size_once_for_each(options, states):
    found = measured(network(), **options)
    assert (found.weight, found.gradient, found.optimizer, found.emulated) == (DENSE, DENSE, states * DENSE, 0)
    assert found.total == (2 + states) * DENSE


def emulation(energy, **options):
    """Bytes of a step with dense weights and the factors derived from them, as the public code keeps them."""
    model, total = network(), 0
    optimizer = torch.optim.SGD(model.parameters(), 0.05, **options)
    train(model, optimizer, SHAPES["3-D"], 1)
    for name in NAMES:
        weight = model.get_submodule(name).weight
        factors = factorise(network().get_submodule(name).weight.detach(), energy)
        loss_of(model, *data(SHAPES["3-D"], 1)).backward()
        states = [state for state in optimizer.state[weight].values() if isinstance(state, torch.Tensor)]
        total += sum(tensor.nbytes for tensor in (weight, weight.grad, *factors, *states))
    return total


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
@pytest.mark.parametrize("method", [WASI(energy=0.5, ranks=[2, 3, 2]), WSI(energy=0.5)], ids=lambda m: m.tag)
def test_factors_take_less_than_an_emulation_of_them(method, options):
    model = lowrank.convert(network(), NAMES, method)
    layers = [model.get_submodule(name) for name in NAMES]
    factors = sum(8 * layer.rank * (layer.out_features + layer.in_features) for layer in layers)
    found = measured(model, **options)
    assert found.weight == factors
    assert found.gradient == factors
    assert found.optimizer == (factors if options else 0)
    assert found.emulated == emulation(0.5, **options)


def test_measuring_changes_nothing():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.5, ranks=[2, 3, 2]))
    optimizer = lowrank.SGD(model.parameters(), 0.05, momentum=0.9)
    train(model, optimizer, SHAPES["3-D"], 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    lowrank.weight_memory(model, NAMES, lambda m, b: loss_of(m, *b), data(SHAPES["3-D"], 1), optimizer)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))

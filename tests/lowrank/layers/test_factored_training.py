"""Training with weights held as factors: against dense training, and against a dense emulation."""

import pytest
import torch
import torch.nn.functional as F
from factored_cases import FULL, METHODS, NAMES, SHAPES, assert_same_weights, data, loss_of, network, state_of, train
from references import projected, subspace_step
from torch import nn

import lowrank
from lowrank import ASI, WASI, WSI
from lowrank.tensors.factors import joined

SETTINGS = [
    {},
    {"weight_decay": 0.05},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.02},
    {"maximize": True},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.tag)
def test_at_energy_1_twenty_steps_equal_dense_training(method, options):
    stock, model = network(), lowrank.convert(network(), NAMES, method)
    rate = 0.001 if "maximize" in options else 0.05  # this loss has no maximum
    train(stock, torch.optim.SGD(stock.parameters(), rate, **options), SHAPES["3-D"], 20)
    train(model, lowrank.SGD(model.parameters(), rate, **options), SHAPES["3-D"], 20)
    assert_same_weights(model, stock)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.tag)
def test_inputs_of_every_number_of_modes(method, shape):
    stock, model = network(), lowrank.convert(network(), NAMES, method)
    train(stock, torch.optim.SGD(stock.parameters(), 0.05), shape, 20)
    train(model, lowrank.SGD(model.parameters(), 0.05), shape, 20)
    assert_same_weights(model, stock)


def emulated(shape, ranks, energy, steps, lr, decay):
    """WASI with dense weights, written from the definitions: the activation projected, the weight W = L R - lr dW."""
    model, bases = network(), {name: {} for name in NAMES}
    layers = {name: model.get_submodule(name) for name in NAMES}
    left = {}
    for name, layer in layers.items():
        u, s, _ = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        left[name] = u[:, : int((share < energy).sum()) + 1]
        layer.weight.data = left[name] @ left[name].mT @ layer.weight.data
    inputs = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, x, y, name=name: inputs.update({name: (x[0].detach(), y)}))
    for step in range(steps):
        model.zero_grad()
        loss = loss_of(model, *data(shape, step))
        outputs = [inputs[name][1] for name in NAMES]
        grads = torch.autograd.grad(loss, outputs, retain_graph=True)
        loss.backward()
        with torch.no_grad():
            for name, grad in zip(NAMES, grads, strict=True):
                layer, x = layers[name], inputs[name][0]
                wanted = {mode: rank for mode, rank in enumerate(ranks) if rank < x.shape[mode]}
                fresh = ASI(list(ranks))
                starts = {m: bases[name].get(m, fresh._start(x, m, r, None, name)) for m, r in wanted.items()}
                bases[name] = subspace_step(x, starts, True)
                kept = projected(x, bases[name])
                layer.weight.grad = grad.flatten(0, -2).mT @ kept.flatten(0, -2)
            for p in model.parameters():
                p -= lr * (p.grad + decay * p)
            for name, layer in layers.items():
                weight = layer.weight
                left[name] = torch.linalg.qr(weight @ (weight.mT @ left[name]))[0]
                weight.copy_(left[name] @ (left[name].mT @ weight))
    return model


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("shape", "ranks"), [((4, 5, 6), (3, 4, 5)), ((2, 3, 4, 6), (2, 2, 3, 4)), ((20, 6), (9, 4))])
def test_wasi_is_the_dense_emulation_of_the_papers_algorithm(shape, ranks, decay):
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=list(ranks)))
    train(model, lowrank.SGD(model.parameters(), 0.05, weight_decay=decay), shape, 8)
    expected = emulated(shape, ranks, 0.8, 8, 0.05, decay)
    torch.testing.assert_close(state_of(model), expected.state_dict(), rtol=1e-8, atol=1e-9)


def test_wsi_at_low_energy_is_exact_although_it_holds_a_projected_gradient():
    expected = emulated((4, 5, 6), (FULL,) * 3, 0.3, 8, 0.05, 0.0)
    model = lowrank.convert(network(), NAMES, WSI(energy=0.3))
    assert all(3 * model.get_submodule(name).factored.rank < 20 for name in NAMES)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 8)
    torch.testing.assert_close(state_of(model), expected.state_dict(), rtol=1e-8, atol=1e-9)


def test_the_svd_update_takes_the_nearest_weight_at_every_step():
    model = lowrank.convert(network(), NAMES, WSI(energy=0.7, update="svd"))
    layer = model[2]
    optimizer = lowrank.SGD(model.parameters(), 0.05)
    x, target = data((4, 5, 6))
    before, rank = layer.factored.factors().dense(), layer.factored.rank
    loss_of(model, x, target).backward()
    gradient = joined(layer.factored.gradient).dense()
    optimizer.step()
    u, s, v = torch.linalg.svd(before - 0.05 * gradient, full_matrices=False)
    torch.testing.assert_close(layer.factored.factors().dense(), u[:, :rank] * s[:rank] @ v[:rank])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_factors_have_autograds_gradients(shape):
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    x, target = data(shape)
    x.requires_grad_(True)
    loss_of(model, x, target).backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters()} | {"x": x.grad.clone()}

    class Plain(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.lowrank_left, self.lowrank_right, self.bias = layer.lowrank_left, layer.lowrank_right, layer.bias

        def forward(self, x):
            return F.linear(x, self.lowrank_left @ self.lowrank_right, self.bias)

    for name in NAMES:
        model[int(name)] = Plain(model[int(name)])
    model.zero_grad()
    x.grad = None
    loss_of(model, x, target).backward()
    expected = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)

"""Training below full rank: against iterations with the full gradient, written densely from the definitions."""

import numpy as np
import pytest
import torch
from factored_cases import FULL, NAMES, data, loss_of, network, product, train
from references import projected, random_tensor, subspace_step
from torch import nn

import lowrank
from lowrank import ASI, WASI, WSI


def low_rank_layer(outputs, inputs, rank):
    """A converted layer whose weight is of this rank, and a target that the weight is drawn to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False)).double()
    weight = random_tensor(outputs, rank, seed=1) @ random_tensor(rank, inputs, seed=2) / rank
    model[0].weight.data = weight
    lowrank.convert(model, ["0"], WSI(energy=1))
    assert model[0].rank == rank
    return model, random_tensor(outputs, inputs, seed=3)


def steps_with_the_full_gradient(weight, target, rank, rate, count):
    """The sketch: one subspace iteration a step on W - rate (W - target), in numpy."""
    left = np.linalg.svd(weight)[0][:, :rank]
    for _ in range(count):
        moved = weight - rate * (weight - target)
        left = np.linalg.qr(moved @ (moved.T @ left))[0]
        weight = left @ (left.T @ moved)
    return weight


@pytest.mark.parametrize("sizes", [(20, 30, 8), (40, 30, 8), (30, 30, 12)], ids=str)
def test_the_distance_to_the_full_gradients_iteration_falls_by_four_when_the_rate_is_halved(sizes):
    apart = []
    for rate in (0.01, 0.005):
        model, target = low_rank_layer(*sizes)
        start, identity = product(model[0]).numpy(force=True), torch.eye(sizes[1], dtype=torch.float64)
        optimizer = lowrank.SGD(model.parameters(), rate)
        for _ in range(20):
            optimizer.zero_grad()
            (0.5 * (model(identity) - target.mT).square().sum()).backward()  # dW = W - target
            optimizer.step()
        expected = steps_with_the_full_gradient(start, target.numpy(force=True), sizes[2], rate, 20)
        apart.append(np.linalg.norm(product(model[0]).numpy(force=True) - expected))
    assert apart[1] > 1e-6
    assert 3 < apart[0] / apart[1] < 5


def emulated(shape, ranks, energy, steps, lr, decay):
    """WASI with dense weights, from the definitions: the activation projected, and of the gradient what L and R see."""
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
                dense = grad.flatten(0, -2).mT @ projected(x, bases[name]).flatten(0, -2)
                columns = left[name] @ left[name].mT
                rows = torch.linalg.pinv(layer.weight) @ layer.weight
                layer.weight.grad = columns @ dense + dense @ rows - columns @ dense @ rows
            for p in model.parameters():
                p -= lr * (p.grad + decay * p)
            for name, layer in layers.items():
                weight = layer.weight
                left[name] = torch.linalg.qr(weight @ (weight.mT @ left[name]))[0]
                weight.copy_(left[name] @ (left[name].mT @ weight))
    return model


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("shape", "ranks"), [((4, 5, 6), (3, 2, 3)), ((2, 3, 4, 6), (2, 2, 2, 4)), ((20, 6), (3, 3))])
def test_wasi_is_the_dense_emulation_of_the_papers_algorithm(shape, ranks, decay):
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=list(ranks)))
    train(model, lowrank.SGD(model.parameters(), 0.05, weight_decay=decay), shape, 8)
    expected = emulated(shape, ranks, 0.8, 8, 0.05, decay)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-8, atol=1e-9)


def test_wsi_at_low_energy_is_the_emulation_with_exact_inputs():
    expected = emulated((4, 5, 6), (FULL,) * 3, 0.3, 8, 0.05, 0.0)
    model = lowrank.convert(network(), NAMES, WSI(energy=0.3))
    assert all(model.get_submodule(name).rank < 4 for name in NAMES)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 8)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-8, atol=1e-9)


def test_the_svd_update_takes_the_nearest_weight_at_every_step():
    model, _ = low_rank_layer(20, 30, 8)
    lowrank.convert(model, ["0"], WSI(energy=1, update="svd"))
    layer, x = model[0], random_tensor(40, 30, seed=4)
    before, grad = product(layer), random_tensor(40, 20, seed=5)
    model(x).backward(grad)
    dense = grad.mT @ x
    u, _, v = torch.linalg.svd(before, full_matrices=False)
    columns, rows = u[:, :8] @ u[:, :8].mT, v[:8].mT @ v[:8]
    lowrank.SGD(model.parameters(), 0.01).step()
    u, s, v = torch.linalg.svd(before - 0.01 * (columns @ dense + dense @ rows - columns @ dense @ rows))
    torch.testing.assert_close(product(layer), u[:, :8] * s[:8] @ v[:8], rtol=0, atol=1e-12)


def test_momentum_is_that_of_the_dense_weight_cut_to_its_rank():
    model, _ = low_rank_layer(20, 30, 8)
    layer, optimizer, momentum = model[0], lowrank.SGD(model.parameters(), 0.01, momentum=0.9), None
    for step in range(3):
        optimizer.zero_grad()
        model(random_tensor(40, 30, seed=step)).backward(random_tensor(40, 20, seed=10 + step))
        weight, left, right = product(layer), layer.left.detach().clone(), layer.right.detach().clone()
        d_left, d_right = layer.left.grad, layer.right.grad
        gradient = left @ d_right + (d_left - left @ (left.mT @ d_left)) @ torch.linalg.inv(right @ right.mT) @ right
        moved = gradient if momentum is None else 0.9 * momentum + gradient
        u, s, v = torch.linalg.svd(moved, full_matrices=False)
        momentum = u[:, :8] * s[:8] @ v[:8]
        dense = weight - 0.01 * moved
        basis = torch.linalg.qr(dense @ (dense.mT @ left))[0]
        optimizer.step()
        torch.testing.assert_close(product(layer), basis @ (basis.mT @ dense), rtol=0, atol=1e-11)

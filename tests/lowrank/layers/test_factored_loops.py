"""What training loops do around a step of a weight that is held as factors."""

import copy

import pytest
import torch
from factored_cases import FULL, METHODS, NAMES, assert_same_weights, data, loss_of, network, product, train
from references import DEVICE, random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import WASI, WSI

LOW = [WASI(energy=0.8, ranks=[2, 2, 3]), WSI(energy=0.8)]


def pair_of_models(method):
    model = lowrank.convert(network(), NAMES, method)
    return model, copy.deepcopy(model)


def test_gradients_of_several_backward_passes_add_up_as_those_of_dense_weights():
    stock, model = network(), lowrank.convert(network(), NAMES, METHODS[0])
    optimizers = torch.optim.SGD(stock.parameters(), 0.05), lowrank.SGD(model.parameters(), 0.05)
    for step in range(4):
        for one, optimizer in zip((stock, model), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for part in range(3):
                loss_of(one, *data((4, 5, 6), 3 * step + part)).backward()
            optimizer.step()
    assert_same_weights(model, stock)


def test_two_backward_passes_of_half_a_batch_are_one_of_the_whole():
    model, twin = pair_of_models(WSI(energy=0.5))
    x, target = data((4, 5, 6))
    loss_of(model, x, target).backward()
    for half in (slice(0, 2), slice(2, 4)):
        (0.5 * loss_of(twin, x[half], target[half])).backward()
    for one in (model, twin):
        lowrank.SGD(one.parameters(), 0.05).step()
    assert_same_weights(model, twin)


def test_clipping_by_norm_scales_the_step():
    model, twin = pair_of_models(LOW[0])
    for one in (model, twin):
        loss_of(one, *data((4, 5, 6))).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
    assert norm > 1e-2
    lowrank.SGD(model.parameters(), 0.05).step()
    lowrank.SGD(twin.parameters(), 0.05 * 1e-3 / (norm + 1e-6)).step()
    assert_same_weights(model, twin)


@pytest.mark.parametrize("change", [lambda p: torch.nn.utils.clip_grad_value_(p, 2e-3), lambda p: add_noise(p)])
def test_what_is_done_to_single_entries_of_the_gradients_reaches_the_weight(change):
    model = lowrank.convert(network(), NAMES, LOW[1])
    layer = model[0]
    loss_of(model, *data((4, 5, 6))).backward()
    before, weight, left = layer.left.grad.clone(), product(layer), layer.left.detach().clone()
    change(list(model.parameters()))
    d_left, d_right, right = layer.left.grad.clone(), layer.right.grad.clone(), layer.right.detach().clone()
    assert not torch.equal(before, d_left)
    across = d_left - left @ (left.mT @ d_left)
    dense = weight - 0.05 * (left @ d_right + across @ torch.linalg.inv(right @ right.mT) @ right)
    basis = torch.linalg.qr(dense @ (dense.mT @ left))[0]
    lowrank.SGD(model.parameters(), 0.05).step()
    torch.testing.assert_close(product(layer), basis @ (basis.mT @ dense), rtol=0, atol=1e-12)


def add_noise(parameters):
    for index, parameter in enumerate(parameters):
        parameter.grad += 1e-3 * random_tensor(*parameter.shape, seed=index)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", LOW, ids=lambda method: method.tag)
def test_a_gradient_scaler_changes_nothing(method, fused):
    model, twin = pair_of_models(method)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    optimizer = lowrank.SGD(model.parameters(), 0.05, fused=fused)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, *data((4, 5, 6), step))).backward()
        scaler.step(optimizer)
        scaler.update()
    train(twin, lowrank.SGD(twin.parameters(), 0.05), (4, 5, 6), 3)
    assert_same_weights(model, twin)


def test_a_scaler_leaves_a_step_out_whose_gradients_are_infinite():
    model, twin = pair_of_models(LOW[0])
    scaler, optimizer = torch.amp.GradScaler(DEVICE, init_scale=1024.0), lowrank.SGD(model.parameters(), 0.05)
    scaler.scale(loss_of(model, *data((4, 5, 6)))).backward()
    model[0].right.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    assert_same_weights(model, twin, 0)


def test_gradients_that_were_dropped_do_not_come_back():
    model, twin = pair_of_models(METHODS[0])
    for one in (model, twin):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        if one is model:
            loss_of(one, *data((4, 5, 6), 7)).backward()
            one.zero_grad()
            optimizer.step()
        loss_of(one, *data((4, 5, 6))).backward()
        optimizer.step()
    assert_same_weights(model, twin, 0)


@pytest.mark.parametrize("method", [METHODS[1], LOW[1]], ids=lambda method: method.tag)
def test_a_backward_pass_to_something_else_ahead_of_the_step_changes_nothing(method):
    model, twin = pair_of_models(method)
    for one in (model, twin):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        loss_of(one, *data((4, 5, 6))).backward()
        if one is model:
            x = data((4, 5, 6), 3)[0].requires_grad_()
            torch.autograd.grad(one(x).abs().sum(), x)
            torch.autograd.grad(one(x).abs().sum(), [one[0].left, one[0].right])
        optimizer.step()
    assert_same_weights(model, twin, 0)


class Twice(nn.Module):
    """One layer that is called twice in a forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_that_is_called_twice_gets_both_gradients():
    stock, model = Twice().double(), lowrank.convert(Twice().double(), ["layer"], WSI(energy=1))
    for one, kind in ((stock, torch.optim.SGD), (model, lowrank.SGD)):
        optimizer = kind(one.parameters(), 0.05, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            one(random_tensor(4, 6, seed=step)).backward(random_tensor(4, 6, seed=10 + step))
            optimizer.step()
    assert_same_weights(model, stock)


@pytest.mark.parametrize("method", LOW, ids=lambda method: method.tag)
def test_another_optimizer_trains_the_factors_as_any_parameters(method):
    model = lowrank.convert(network(), NAMES, method)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 0.01), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, *data((4, 5, 6)))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < min(losses[0] - 0.05, *losses[:10])


def test_steps_of_sgd_after_another_optimizers_are_those_of_the_dense_weight():
    stock, model = network(), lowrank.convert(network(), NAMES, WSI(energy=1))
    train(model, torch.optim.AdamW(model.parameters(), 0.01), (4, 5, 6), 5)
    left = model[0].left.detach()
    assert float((left.mT @ left - torch.eye(left.shape[1]).double()).abs().max()) > 1e-3
    stock.load_state_dict(model.state_dict())
    train(stock, torch.optim.SGD(stock.parameters(), 0.05), (4, 5, 6), 10)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 10)
    assert_same_weights(model, stock)


def test_checkpointed_forward_and_a_smaller_last_batch():
    model, twin = pair_of_models(WASI(energy=0.8, ranks=[3, 2, 3], warm_start=False))
    for one, call in ((model, lambda m, x: m(x)), (twin, lambda m, x: checkpoint(m, x, use_reentrant=False))):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        for size in (4, 2):
            optimizer.zero_grad()
            call(one, random_tensor(size, 5, 6)).square().mean().backward()
            optimizer.step()
    assert_same_weights(model, twin)


def test_autocast_and_single_precision():
    model = lowrank.convert(network().float(), NAMES, WASI(energy=0.9, ranks=[3, 2, 3]))
    optimizer = lowrank.SGD(model.parameters(), 0.01, momentum=0.9)
    losses = []
    x, target = (tensor.float() for tensor in data((4, 5, 6)))
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(model, x, target)
            assert model[0].weight.dtype == torch.float32
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model[0].left.dtype == torch.float32


def test_a_model_in_half_precision_trains():
    model = lowrank.convert(network().bfloat16(), NAMES, WASI(energy=0.9, ranks=[3, 2, 3]))
    optimizer, losses = lowrank.SGD(model.parameters(), 0.05, momentum=0.5), []
    x, target = (tensor.bfloat16() for tensor in data((4, 5, 6)))
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model[0].left.dtype == torch.bfloat16


def test_measuring_between_backward_and_step_changes_nothing():
    model, twin = pair_of_models(METHODS[0])
    for one in (model, twin):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        loss_of(one, *data((4, 5, 6))).backward()
        if one is model:
            lowrank.peak_bytes(one, lambda m, b: loss_of(m, *b), data((4, 5, 6), 3))
            lowrank.measure_perplexity(one, NAMES, lambda m, b: loss_of(m, *b), data((4, 5, 6), 3))
        optimizer.step()
    assert_same_weights(model, twin, 0)


@pytest.mark.parametrize("method", [WASI(energy=0.8, ranks=[2, 2, 3]), WASI(energy=1, ranks=FULL)], ids=lambda m: m.tag)
def test_evaluation_uses_the_trained_weight(method):
    model = lowrank.convert(network(), NAMES, method)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 2)
    stock = network()
    stock.load_state_dict(model.state_dict())
    x, _ = data((4, 5, 6), 9)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), stock.eval()(x), rtol=0, atol=1e-12)

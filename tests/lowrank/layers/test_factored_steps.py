"""Steps of `lowrank.SGD` at energy 1: those of `torch.optim.SGD` on the dense weights."""

import pytest
import torch
from factored_cases import FULL, METHODS, NAMES, SHAPES, assert_same_weights, data, loss_of, network, train
from references import random_tensor
from torch import nn

import lowrank
from lowrank import WASI, WSI

SETTINGS = [
    {},
    {"weight_decay": 0.05},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.02},
    {"maximize": True, "weight_decay": 0.05},
    {"maximize": True, "momentum": 0.9},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("sizes", [(9, 6), (6, 9), (7, 7)], ids=["O > I", "O < I", "O = I"])
def test_twenty_steps_of_one_layer_are_dense_ones(sizes, options):
    outputs, inputs = sizes
    results = []
    for convert, kind in ((False, torch.optim.SGD), (True, lowrank.SGD)):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(inputs, outputs)).double()
        if convert:
            lowrank.convert(layer, ["0"], WSI(energy=1))
        optimizer = kind(layer.parameters(), 0.05, **options)
        for step in range(20):
            optimizer.zero_grad()
            layer(random_tensor(4, inputs, seed=step)).backward(random_tensor(4, outputs, seed=100 + step))
            optimizer.step()
        results.append(layer)
    # Rounding that twenty steps carry on: 1e-13 on most processors, three times that on some.
    assert_same_weights(*results, 1e-12 * float(results[0][0].weight.detach().abs().max()))


@pytest.mark.parametrize("options", SETTINGS[:5], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.tag)
def test_twenty_steps_of_a_model_are_dense_training(method, options):
    stock, model = network(), lowrank.convert(network(), NAMES, method)
    train(stock, torch.optim.SGD(stock.parameters(), 0.05, **options), SHAPES["3-D"], 20)
    train(model, lowrank.SGD(model.parameters(), 0.05, **options), SHAPES["3-D"], 20)
    assert_same_weights(model, stock)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.tag)
def test_inputs_of_every_number_of_modes(method, shape):
    stock, model = network(), lowrank.convert(network(), NAMES, method)
    train(stock, torch.optim.SGD(stock.parameters(), 0.05), shape, 20)
    train(model, lowrank.SGD(model.parameters(), 0.05), shape, 20)
    assert_same_weights(model, stock)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_a_weight_that_gets_no_gradient_stays(options):
    model = lowrank.convert(network(), NAMES, WSI(energy=0.8))
    optimizer = lowrank.SGD(model.parameters(), 0.05, weight_decay=0.1, **options)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("missing", ["left", "right"])
def test_one_missing_gradient_counts_as_zero(missing):
    model, twin = (lowrank.convert(network(), NAMES, WSI(energy=0.8)) for _ in range(2))
    for one in (model, twin):
        loss_of(one, *data(SHAPES["3-D"])).backward()
    getattr(model[0], missing).grad = None
    getattr(twin[0], missing).grad.zero_()
    for one in (model, twin):
        lowrank.SGD(one.parameters(), 0.05).step()
    assert_same_weights(model, twin, 0)


def test_a_closure_a_schedule_and_parameter_groups():
    stock, model = network(), lowrank.convert(network(), NAMES, METHODS[0])
    for one, kind in ((stock, torch.optim.SGD), (model, lowrank.SGD)):
        groups = [{"params": one[0].parameters(), "lr": 0.1}, {"params": [*one[2:].parameters()]}]
        optimizer = kind(groups, torch.tensor(0.02))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(5):

            def closure(one=one, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(one, *data((4, 5, 6), step))
                loss.backward()
                return loss

            assert optimizer.step(closure) is not None
            schedule.step()
    assert_same_weights(model, stock)


def test_step_hooks_run_once():
    model = lowrank.convert(network(), NAMES, WSI(energy=0.8))
    torch.optim.SGD(network().parameters(), 0.1)  # from then on torch's own step calls hooks too
    calls, optimizer = [], lowrank.SGD(model.parameters(), 0.05)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, SHAPES["3-D"], 1)
    assert calls == ["before", "after"]


@pytest.mark.parametrize("factor", ["left", "right"])
def test_half_of_a_weight_is_refused(factor):
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    optimizer = lowrank.SGD([getattr(model[0], factor), model[0].bias], 0.05)
    loss_of(model, *data(SHAPES["3-D"])).backward()
    before = model[0].bias.clone()
    with pytest.raises(lowrank.SettingError, match=r"layer '0'.*one of the factors"):
        optimizer.step()
    assert torch.equal(model[0].bias, before)


@pytest.mark.parametrize("fit", [{"_is_flat_param": True}, {"device_mesh": None}], ids=str)
def test_parts_of_parameters_are_refused_ahead_of_any_step(fit):
    model = lowrank.convert(network(), NAMES, WSI(energy=0.8))
    optimizer = lowrank.SGD(model.parameters(), 0.05)
    loss_of(model, *data(SHAPES["3-D"])).backward()
    before = model[0].bias.clone()
    model[4].weight.__dict__.update(fit)
    with pytest.raises(lowrank.LowRankError, match="AdamW"):
        optimizer.step()
    assert torch.equal(model[0].bias, before)


def test_a_gradient_that_is_not_finite_is_an_error_of_this_package_where_it_cannot_be_a_step():
    model = lowrank.convert(network(), NAMES, WSI(energy=0.8))
    optimizer = lowrank.SGD(model.parameters(), 0.05, momentum=0.9)
    loss_of(model, *data(SHAPES["3-D"])).backward()
    model[0].left.grad[0, 0] = float("nan")
    with pytest.raises(lowrank.NonFiniteError, match="layer '0'"):
        optimizer.step()


@pytest.mark.parametrize("update", ["subspace", "svd"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_the_mean_of_factors_is_that_of_the_weight(update, options):
    """As whoever averages parameters over steps takes it: factors move no more than their weight does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    lowrank.convert(model, ["0", "2"], WSI(energy=0.8, update=update))
    optimizer = lowrank.SGD(model.parameters(), lr=0.02, **options)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    weights = []
    for step in range(40):
        optimizer.zero_grad()
        labels = torch.arange(32) % 5
        nn.functional.cross_entropy(model(random_tensor(32, 12, seed=step) + labels[:, None]), labels).backward()
        optimizer.step()
        averaged.update_parameters(model)
        weights.append([model[at].weight.detach() for at in (0, 2)])
    for at, own in zip((0, 2), zip(*weights, strict=True), strict=True):
        mean, last = torch.stack(own).mean(0), own[-1]
        error = torch.linalg.vector_norm(averaged.module[at].weight - mean)
        assert error < 0.02 * torch.linalg.vector_norm(mean)
        assert error < 0.2 * torch.linalg.vector_norm(last - mean), "which is less than what the weight moved"

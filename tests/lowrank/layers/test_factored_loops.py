"""What training loops do around a step of a weight that is held as factors."""

import copy

import pytest
import torch
from factored_cases import FULL, METHODS, NAMES, assert_same_weights, data, loss_of, network, train
from references import random_tensor
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import WASI, WSI, LowRankError, SettingError


def test_gradients_of_several_backward_passes_add_up():
    stock, model = network(), lowrank.convert(network(), NAMES, METHODS[0])
    optimizers = torch.optim.SGD(stock.parameters(), 0.05), lowrank.SGD(model.parameters(), 0.05)
    for step in range(4):
        for one, optimizer in zip((stock, model), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for part in range(3):
                loss_of(one, *data((4, 5, 6), 3 * step + part)).backward()
            optimizer.step()
    assert_same_weights(model, stock)


def test_wsi_refuses_to_add_up_what_it_does_not_hold():
    model = lowrank.convert(network(), NAMES, WSI(energy=0.3))
    loss_of(model, *data((4, 5, 6))).backward()
    with pytest.raises(LowRankError, match="several backward passes"):
        loss_of(model, *data((4, 5, 6), 1)).backward()


def test_a_common_factor_on_the_gradients_reaches_the_weight():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    twin = copy.deepcopy(model)
    optimizer, other = lowrank.SGD(model.parameters(), 0.05), lowrank.SGD(twin.parameters(), 0.05)
    x, target = data((4, 5, 6))
    (8 * loss_of(model, x, target)).backward()
    for parameter in model.parameters():
        parameter.grad.div_(8)
    loss_of(twin, x, target).backward()
    optimizer.step(), other.step()
    assert_same_weights(model, twin, 1e-12)
    x, target = data((4, 5, 6), 1)
    for one in (model, twin):
        one.zero_grad()
        loss_of(one, x, target).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    lowrank.SGD(twin.parameters(), 0.05 * 1e-3 / (float(norm) + 1e-6)).step()
    assert_same_weights(model, twin, 1e-12)


def test_gradients_that_were_dropped_do_not_come_back():
    model = lowrank.convert(network(), NAMES, METHODS[0])
    twin = copy.deepcopy(model)
    for one in (model, twin):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        if one is model:
            loss_of(one, *data((4, 5, 6), 7)).backward()
            one.zero_grad()
            optimizer.step()
        loss_of(one, *data((4, 5, 6))).backward()
        optimizer.step()
    assert_same_weights(model, twin, 0)


def test_another_optimizer_is_noticed():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    train(model, torch.optim.Adam(model.parameters(), 0.05), (4, 5, 6), 1)
    with pytest.raises(LowRankError, match=r"layer '0'.*lowrank\.SGD"):
        loss_of(model, *data((4, 5, 6))).backward()


def test_half_of_a_weight_is_refused():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    optimizer = lowrank.SGD([model[0].lowrank_left], 0.05)
    with pytest.raises(SettingError, match="both factors"):
        optimizer.step()


def test_a_closure_a_schedule_and_parameter_groups():
    stock, model = network(), lowrank.convert(network(), NAMES, METHODS[0])
    for one, kind in ((stock, torch.optim.SGD), (model, lowrank.SGD)):
        groups = [{"params": one[0].parameters(), "lr": 0.1}, {"params": [*one[2:].parameters()]}]
        optimizer = kind(groups, 0.02)
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


def test_checkpointed_forward_and_a_smaller_last_batch():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=[3, 4, 5], warm_start=False))
    twin = copy.deepcopy(model)
    for one, call in ((model, lambda m, x: m(x)), (twin, lambda m, x: checkpoint(m, x, use_reentrant=False))):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        for size in (4, 2):
            optimizer.zero_grad()
            call(one, random_tensor(size, 5, 6)).square().mean().backward()
            optimizer.step()
    assert_same_weights(model, twin, 1e-12)


def test_autocast_and_single_precision():
    model = lowrank.convert(network().float(), NAMES, WASI(energy=0.9, ranks=[3, 4, 5]))
    optimizer = lowrank.SGD(model.parameters(), 0.01, momentum=0.9)
    losses = []
    x, target = (tensor.float() for tensor in data((4, 5, 6)))
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model[0].lowrank_left.dtype == torch.float32


def test_measuring_between_backward_and_step_changes_nothing():
    model = lowrank.convert(network(), NAMES, METHODS[0])
    twin = copy.deepcopy(model)
    for one in (model, twin):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        loss_of(one, *data((4, 5, 6))).backward()
        if one is model:
            lowrank.peak_bytes(one, lambda m, b: loss_of(m, *b), data((4, 5, 6), 3))
            lowrank.measure_perplexity(one, NAMES, lambda m, b: loss_of(m, *b), data((4, 5, 6), 3))
        optimizer.step()
    assert_same_weights(model, twin, 0)

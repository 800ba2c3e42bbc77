"""What a lazy output is computed from is changed ahead of that: it is what it was at the call, or an error."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from lazy_cases import SHAPE, pair
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ChangedError, Vanilla

FROZEN = ("0.weight", "0.bias")  # for whose gradients PyTorch keeps the input


def outcome(model, x, change):
    """Output and gradients of the norm, or the error; `change(model, x)` is between the two layers."""
    y = model[0](x)
    with torch.no_grad():
        change(model, x)
    try:
        z = model[1](y)
        z.backward(random_tensor(*z.shape, seed=1))
    except RuntimeError as error:
        return error
    return z.detach(), model[1].weight.grad, model[1].bias.grad


SEEN = {
    "+=": lambda x: x.__iadd__(1),
    "mul_": lambda x: x.mul_(2),
    "an entry": lambda x: x.__setitem__((0, 1), 2.0),
    "relu_": torch.relu_,
    "F.relu, in place by position": lambda x: F.relu(x, True),
    "F.relu, in place by name": lambda x: F.relu(x, inplace=True),
    "F.dropout": lambda x: F.dropout(x, 0.5, True, True),
    "a stock module": nn.ReLU(inplace=True),
    "out of another operation": lambda x: torch.mul(torch.ones_like(x), 2, out=x),
    "many at once": lambda x: torch._foreach_add_([x], 1),
    "copy_": lambda x: x.copy_(torch.zeros_like(x)),
    "init": nn.init.ones_,
    "clamp_": lambda x: torch.clamp_(x, 0, 1),
    "other data": lambda x: setattr(x, "data", 2 * x.data),
    "swapped": lambda x: x.transpose_(2, 3),
    "resized": lambda x: x.resize_(*SHAPE[:3], 2),
    "scatter_": lambda x: x.scatter_(0, torch.zeros(1, 1, 1, 1, dtype=torch.long), 3.0),
}


@pytest.mark.parametrize("change", SEEN)
def test_a_change_in_place_is_seen_and_the_output_is_that_of_before(change):
    stock, model = pair(freeze=FROZEN)
    expected, found = (outcome(net, random_tensor(*SHAPE), lambda _, x: SEEN[change](x)) for net in (stock, model))
    torch.testing.assert_close(found, expected)


HIDDEN = {
    "through a view": lambda x: x.view(-1).mul_(2),
    "through a part": lambda x: x[:, 0].mul_(2),
    "through the detached": lambda x: x.detach().mul_(2),
    "through the data": lambda x: x.data.mul_(2),
    "through numpy": lambda x: x.numpy().__imul__(2) if x.device.type == "cpu" else None,
    "through a view of the data": lambda x: x.data[:, 1:].zero_(),
    "other memory": lambda x: x.set_(torch.zeros_like(x)),
}


@pytest.mark.parametrize("change", HIDDEN)
def test_a_change_that_is_not_seen_in_time_is_an_error_at_most(change):
    """Never another output than the stock one."""
    stock, model = pair(freeze=FROZEN)
    expected, found = (outcome(net, random_tensor(*SHAPE), lambda _, x: HIDDEN[change](x)) for net in (stock, model))
    if isinstance(found, Exception):
        assert isinstance(found, ChangedError)
        assert "layer '0'" in str(found)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_parameter_changed_between_the_two_is_an_error_at_most(name, frozen):
    stock, model = pair(freeze=FROZEN if frozen else ())
    change = lambda net, _: net.get_parameter(name).mul_(2)  # noqa: E731
    expected, found = (outcome(net, random_tensor(*SHAPE), change) for net in (stock, model))
    if isinstance(found, Exception):
        assert isinstance(found, ChangedError)
        assert "layer '0'" in str(found)
    else:
        torch.testing.assert_close(found, expected)


def test_a_parameter_replaced_between_the_two_plays_no_part():
    stock, model = pair()

    def replace(net, _):
        net[0].weight = nn.Parameter(torch.zeros_like(net[0].weight))

    expected, found = (outcome(net, random_tensor(*SHAPE), replace) for net in (stock, model))
    torch.testing.assert_close(found, expected)


def test_an_input_that_is_changed_after_the_norm():
    """Nothing reads it any more."""
    outputs = []
    for net in pair(freeze=FROZEN):
        x = random_tensor(*SHAPE)
        z = net[1](net[0](x))
        z.backward(random_tensor(*z.shape, seed=1))
        x.zero_()
        outputs.append([z, net[1].weight.grad])
    torch.testing.assert_close(outputs[1], outputs[0])


def test_the_input_is_an_ordinary_tensor_before_and_after():
    _, model = pair(freeze=FROZEN)
    x = random_tensor(*SHAPE)
    y = model[0](x)
    assert isinstance(x, torch.Tensor)
    for use in (pickle.dumps, copy.deepcopy, lambda x: x + 1, lambda x: x.numpy(force=True), repr):
        use(x)
    twin = copy.deepcopy(x)
    assert type(twin) is torch.Tensor
    torch.testing.assert_close(twin, random_tensor(*SHAPE))
    del y
    assert type(x) is torch.Tensor
    assert not vars(x)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("freeze", [FROZEN, ()])
def test_the_input_has_its_own_class_again_when_the_output_is_gone(freeze, whole):
    _, model = pair(freeze=freeze)
    x = random_tensor(*SHAPE)
    y = model(x) if whole else model[0](x)
    del y
    assert type(x) is torch.Tensor
    assert not vars(x)


@pytest.mark.parametrize("read", [True, False])
def test_nothing_is_held_longer_than_the_output(read):
    _, model = pair(freeze=FROZEN)
    gc.disable()
    try:
        x = random_tensor(*SHAPE) * 1
        reference = weakref.ref(x)
        y = model[0](x)
        if read:
            y.sum().item()
        del x
        assert (reference() is None) == read
        del y
        assert reference() is None
    finally:
        gc.enable()


def test_an_input_is_held_until_its_last_output_is_read():
    _, model = pair(freeze=FROZEN)
    x = random_tensor(*SHAPE)
    first, second = model[0](x), model[0](x)
    assert type(x) is not torch.Tensor
    first.sum().item()
    assert type(x) is not torch.Tensor
    second.sum().item()
    assert type(x) is torch.Tensor
    assert not vars(x)


def test_several_outputs_wait_for_one_input():
    stock, model = pair(freeze=FROZEN)
    outputs = []
    for net in (stock, model):
        x = random_tensor(*SHAPE)
        first, second = net[0](x), net[0](x)
        del first
        third = net[0](x)
        x.mul_(3)
        outputs.append([net[1](second), third + 0, net[1](net[0](x))])
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_chain_of_changes_and_calls():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                y = conv(x)
                x += 1
                x = norm(y) + x
                x.relu_()
            return x

    stock = Residual().double().eval().requires_grad_(False)
    model, x = lowrank.convert(copy.deepcopy(stock), ["convs.0"], Vanilla()), random_tensor(2, 3, 5, 4)
    torch.testing.assert_close(model(x.clone()), stock(x.clone()))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("trained", [False, True])
def test_threads_that_share_an_input(trained):
    stock, model = pair(freeze=() if trained else FROZEN)
    x, problems = random_tensor(*SHAPE), []
    parameters = [[p for p in net.parameters() if p.requires_grad] for net in (stock, model)]

    def gradients(net, own):
        y = net(x)
        return [y.detach(), *(torch.autograd.grad(y.square().sum(), own) if own else ())]

    expected = gradients(stock, parameters[0])

    def work():
        try:
            for _ in range(50):
                torch.testing.assert_close(gradients(model, parameters[1]), expected)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert type(x) is torch.Tensor

"""Modules of the lean classes are the stock modules, but for what they keep."""

import copy
import pickle
import threading

import pytest
import torch
from function_cases import compare, kept
from references import random_tensor
from torch import nn

import lowrank
from lowrank import Vanilla
from lowrank.layers.lean import LEAN_MODULES, RECOMPUTED
from lowrank.layers.swap import become

STOCK_MODULES = [
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 2.0),
    nn.Hardsigmoid(),
    nn.LeakyReLU(0.2),
    nn.Dropout(0.4),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(2, count_include_pad=False),
    nn.AdaptiveAvgPool2d((2, 3)),
]


@pytest.mark.parametrize("module", STOCK_MODULES, ids=lambda module: type(module).__name__)
def test_a_module_with_the_lean_class_is_the_same_module(module):
    own = copy.deepcopy(module)
    become(own, LEAN_MODULES[type(module)])
    for copied in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        compare(module, copied, 3 * random_tensor(2, 3, 9, 8))
        x = 3 * random_tensor(2, 3, 9, 8)
        assert torch.equal(copied.eval()(x.clone()), copy.deepcopy(module).eval()(x.clone()))
        copied.train()


def test_every_lean_module_is_tried_here():
    assert {type(module) for module in STOCK_MODULES} == set(LEAN_MODULES) - {nn.Embedding, *RECOMPUTED}


@pytest.mark.parametrize("module", STOCK_MODULES, ids=lambda module: type(module).__name__)
def test_settings_are_those_of_the_moment(module):
    """A user sets them on built modules: slopes, probabilities, sizes, and whether to work in place."""
    changes = {"inplace": False, "negative_slope": 0.3, "p": 0.7, "kernel_size": 2, "output_size": 1, "max_val": 1.0}
    own = copy.deepcopy(module)
    become(own, LEAN_MODULES[type(module)])
    for network in (module_ := copy.deepcopy(module), own):
        for name, value in changes.items():
            if hasattr(network, name):
                setattr(network, name, value)
    compare(module_, own, 3 * random_tensor(2, 3, 9, 8))


@pytest.mark.parametrize("module", STOCK_MODULES, ids=lambda module: type(module).__name__)
def test_an_input_without_a_batch(module):
    own = copy.deepcopy(module)
    become(own, LEAN_MODULES[type(module)])
    compare(module, own, random_tensor(3, 9, 8))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_part_of_a_tensor_is_activated_in_place(inplace):
    """The rest of the tensor has its own gradient."""

    def split(activation):
        def run(x):
            y = x * 2
            activation(y[:, :2])
            return y if inplace else y + activation(y[:, :2]).mean()

        return run

    stock = nn.ReLU(inplace=inplace)
    own = copy.deepcopy(stock)
    become(own, LEAN_MODULES[nn.ReLU])
    compare(split(stock), split(own), random_tensor(2, 3, 4, 5))


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("module", STOCK_MODULES, ids=lambda module: type(module).__name__)
def test_threads_that_share_an_input(module):
    own, x, problems = copy.deepcopy(module).eval(), 3 * random_tensor(2, 3, 9, 8), []
    if getattr(own, "inplace", False):
        own.inplace = False
    expected = copy.deepcopy(own)(x)
    become(own, LEAN_MODULES[type(module)])
    x.requires_grad_()

    def work():
        try:
            for _ in range(100):
                torch.testing.assert_close(own(x).detach(), expected)
                own(x).sum().backward()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert type(x) is torch.Tensor


def test_a_module_that_keeps_the_rest_of_the_model_lean():
    """Bits and places in a converted model of modules, in bytes by hand."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(0.5))
    lowrank.convert(model, ["0"], Vanilla())
    x = random_tensor(2, 3, 8, 8, dtype=torch.float32)
    elements = 2 * 4 * 8 * 8
    assert (
        kept(lambda v: model(v), x)
        == x.nbytes + model[0].weight.nbytes + elements // 8 + elements // 4 + elements // 16 // 8
    )


@pytest.mark.parametrize("training", [False, True])
def test_an_input_of_other_dimensions_is_refused_as_ever(training):
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train(training)
    own = lowrank.convert(copy.deepcopy(stock), ["0"], lowrank.Vanilla())
    for given in (torch.randn(3, 5, 5), torch.randn(3, 5, 5, requires_grad=True)):
        for model in (stock, own):
            with pytest.raises(ValueError, match="expected 4D input"):
                model(given)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}])
def test_running_statistics_are_those_of_the_stock_module(options):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    stock[3].track_running_stats = False
    own = lowrank.convert(copy.deepcopy(stock), ["0", "2"], lowrank.Vanilla())
    for seed in range(3):
        x = random_tensor(2, 3, 5, 5, seed=seed, dtype=torch.float32)
        torch.testing.assert_close(own(x), stock(x))
    torch.testing.assert_close(own.state_dict(), stock.state_dict(), rtol=0, atol=0)

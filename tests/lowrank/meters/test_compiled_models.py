"""What hooks measure, in models that are compiled, as a whole or in parts, and whose graphs are there already."""

import copy

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, Vanilla
from lowrank.meters.memory import held_bytes

pytestmark = pytest.mark.slow
OPTIONS = {"backend": "eager", "fullgraph": True}


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 4, 1), Part()

    def forward(self, x):
        return self.part(self.stem(x))


NAMES = ["stem", "part.first", "part.last"]
MEASURES = {
    "account": lambda model, x: vars(lowrank.account(model, NAMES, x)),
    "perplexity": lambda model, x: lowrank.measure_perplexity(model, NAMES[:2], loss, x, (0.5,)).layers,
    "derived": lambda model, x: lowrank.measure_perplexity(model, NAMES[:2], loss, x, (0.5,), derive=True).layers,
    "truncation": lambda model, x: lowrank.truncate_weights(model, NAMES[2:], loss, x, energy=0.5),
    "held": lambda model, x: held_bytes(model, loss, x),
    "peak": lambda model, x: lowrank.peak_bytes(model, loss, x),
}


def loss(model, x):
    return model(x).square().mean()


def _own_call(module):
    module.compile(**OPTIONS)


def _forward(module):
    module.forward = torch.compile(module.forward, **OPTIONS)


@pytest.mark.parametrize("stepped", [False, True], ids=["no step", "a step"])
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("way", [_own_call, _forward])
@pytest.mark.parametrize("within", ["", "part"], ids=["whole", "part"])
def test_what_is_compiled_is_measured_by_its_code(within, way, name, stepped):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock, x = Model(), random_tensor(4, 3, 6, 6, dtype=torch.float32)
    model = copy.deepcopy(stock)
    way(model.get_submodule(within))
    if stepped:
        loss(model, x).backward()
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    wanted, found = MEASURES[name](stock, x), MEASURES[name](model, x)
    assert repr(found) == repr(wanted)
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("method", [ASI(2), Vanilla()], ids=repr)
def test_a_converted_part_is_accounted_for_as_without_a_compiler(method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock, x = Model(), random_tensor(4, 3, 6, 6, dtype=torch.float32)
    model = copy.deepcopy(stock)
    model.part.compile(**OPTIONS)
    for each in (stock, model):
        lowrank.convert(each, NAMES, method)
        loss(each, x).backward()
    assert repr(vars(lowrank.account(model, NAMES, x))) == repr(vars(lowrank.account(stock, NAMES, x)))

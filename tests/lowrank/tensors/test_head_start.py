"""Steps of a compression that an activation makes ahead: training is the same to the last bit, right guess or wrong."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from references import random_tensor
from torch import nn

import lowrank
from lowrank import kernels
from lowrank.tensors import head_start

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
RANKS = [4, 6, 4, 4]
SHAPE = (8, 12, 60, 56)  # of what the layers are given: large enough to be iterated on a part


def block(*between, inplace=True):
    return nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12).eval(), nn.ReLU6(inplace), *between


class Branches(nn.Module):
    """Two layers, and every second pass the other one is ahead."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(*block()) for _ in range(3))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        order = (0, 1, 2) if self.passes % 2 else (0, 2, 1)
        for at in order:
            x = self.parts[at](x)
        return x


class Twice(nn.Module):
    """An activation of the same size, whose output no layer is given, between another one and its layer."""

    def __init__(self):
        super().__init__()
        self.ahead, self.behind = nn.Sequential(*block()), nn.Sequential(*block())

    def forward(self, x):
        y = self.ahead(x)
        other = F.relu(y * 0.5, inplace=True)
        return self.behind(y) + other.mean()


class Changed(nn.Module):
    """What the activation gave is changed ahead of the layer."""

    def __init__(self):
        super().__init__()
        self.ahead, self.behind = nn.Sequential(*block()), nn.Sequential(*block())

    def forward(self, x):
        y = self.ahead(x)
        y.detach().mul_(0.5)
        return self.behind(y)


NETWORKS = {
    "in a row": lambda: nn.Sequential(*block(), *block(), *block()),
    "not in place": lambda: nn.Sequential(*block(inplace=False), *block(inplace=False)),
    "dropout between": lambda: nn.Sequential(*block(nn.Dropout(0.3)), *block()),
    "branches": Branches,
    "twice": Twice,
    "changed": Changed,
}
MADE = {"in a row": 2, "not in place": 0, "changed": 0}  # steps that are made ahead in the sixth pass
METHODS = {
    "float32": lowrank.ASI(RANKS),
    "int8": lowrank.ASI(RANKS, storage="int8"),
    "published": lowrank.ASI(RANKS, algorithm="published"),
    "refreshed": lowrank.ASI(RANKS, refresh=2),
    "cold": lowrank.ASI(RANKS, warm_start=False),
}


@pytest.fixture(autouse=True)
def few_numbers_are_many(monkeypatch):
    monkeypatch.setattr(head_start, "_LEAST", 2**18)


def converted(network, method):
    torch.manual_seed(0)
    model = NETWORKS[network]()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return lowrank.convert(model, names, METHODS[method])


def train(model, passes, first=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(first, first + passes):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(random_tensor(*SHAPE, seed=seed).float()).square().mean().backward()
        optimizer.step()


def outcome(model):
    return {**model.state_dict(), **lowrank.training_state(model)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def counted(monkeypatch):
    made, own = [], head_start.clamp_and_begin
    monkeypatch.setattr(head_start, "clamp_and_begin", lambda *given: made.append(own(*given)) or made[-1])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_the_same(network, method, monkeypatch):
    model, plain = converted(network, method), converted(network, method)
    made = counted(monkeypatch)
    train(model, 5)
    del made[:]
    train(model, 1, first=5)
    if method in ("float32", "int8"):
        assert len(made) == MADE.get(network, len(made))
    else:
        assert not made
    assert None not in made
    monkeypatch.setattr(head_start, "_LEAST", 2**60)
    train(plain, 6)
    assert same(outcome(model), outcome(plain))


def test_a_resumed_run_is_the_unbroken_one():
    """Its first step has nobody to guess by."""
    unbroken, broken = converted("in a row", "float32"), converted("in a row", "float32")
    train(unbroken, 6)
    train(broken, 3)
    resumed = converted("in a row", "float32")
    resumed.load_state_dict(broken.state_dict())
    lowrank.load_training_state(resumed, lowrank.training_state(broken))
    train(resumed, 3, first=3)
    assert same(outcome(unbroken), outcome(resumed))


@pytest.mark.slow
def test_models_in_turn_and_copies_do_not_mislead_each_other(monkeypatch):
    model, alone = converted("in a row", "float32"), converted("in a row", "float32")
    train(alone, 6)
    other = converted("in a row", "int8")
    for at in range(3):
        train(model, 1, first=at)
        train(other, 1, first=at)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for at in range(3, 6):
        train(model, 1, first=at)
        train(other, 1, first=at)
    assert same(outcome(model), outcome(alone))


@pytest.mark.parametrize("network", ["dropout between", "twice", "changed"])
def test_after_some_wrong_guesses_there_is_no_other(network, monkeypatch):
    made = counted(monkeypatch)
    train(converted(network, "float32"), 9)
    assert 1 <= len(made) <= 3 * head_start._GUESSES


@pytest.mark.parametrize("network", ["dropout between", "twice", "in a row"])
def test_nothing_of_it_stays(network, monkeypatch):
    """Neither what was taken, nor, from the next compression on, what was not."""
    left, own = [], head_start.clamp_and_begin

    def noted(*given):
        found = own(*given)
        left.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(head_start, "clamp_and_begin", noted)
    model = converted(network, "float32")
    train(model, 1)
    graph = model(random_tensor(*SHAPE, seed=1).float())  # with all that the backward pass needs
    first = list(left)
    other = model(random_tensor(*SHAPE, seed=2).float())
    gc.collect()
    assert first
    assert all(one() is None for one in first)
    del graph, other


def test_a_pass_that_is_broken_off_leaves_the_next_one_as_it_is():
    model, plain = converted("in a row", "float32"), converted("in a row", "float32")
    train(model, 2)
    train(plain, 2)

    def fail(*_):
        raise KeyboardInterrupt

    hook = model[3].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        train(model, 1, first=2)
    hook.remove()
    state = lowrank.training_state(plain)  # without the first layer's pass
    lowrank.load_training_state(model, state)
    train(model, 3, first=3)
    train(plain, 3, first=3)
    assert same(outcome(model), outcome(plain))


def test_a_model_that_is_gone_is_held_by_nobody():
    model = converted("in a row", "float32")
    train(model, 2)
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None
